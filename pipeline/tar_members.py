"""The members of any tar, one after the other, by their headers alone; nothing is ever extracted.

Headers are parsed by the standard library, which knows USTAR, PAX and GNU. What it leaves open is
bounded here: a header may claim gigabytes for a name, point past the end of the file, or be
damaged, at which the library ends as if the archive did.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from pipeline.program import InputError

# All headers of one member together. PAX records and GNU names have some kilobytes at most.
HEADER_LIMIT_BYTES = 1 << 20
# As webdataset splits a name: the key goes up to the first dot of the base name.
KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
# Folders and files such as __meta__ hold webdataset's own notes.
NOTES = re.compile(r"__[^/]*__($|/)")
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstd"}
LARGEST_BYTES = 2**32 - 1  # that an index can say


class Member(NamedTuple):
    """One member; ``reason`` says why it cannot be used, empty where it can."""

    name: str
    start: int
    """First byte of its data in the tar, a multiple of 512."""
    size: int
    """Bytes of its data."""
    reason: str = ""


class TarMembers:
    """Iterator of ``Member``; folders and webdataset's notes are passed over.

    Args:
        file: open for reading at byte 0; read here in small pieces, never past a header.
        size_bytes: of the file.
        where: its name, for messages.

    Raises:
        InputError: if it is not a tar, or is empty.
    """

    def __init__(self, file: BinaryIO, size_bytes: int, where: str) -> None:
        self._guard = _Guard(file)
        # Any: what is used of it below is documented in its source only.
        self._tar: Any
        self._size_bytes = size_bytes
        self.ending = ""
        """Why the rest of the file was not read; empty where the archive ends as it should."""
        if size_bytes == 0:
            raise InputError(f"{where} is empty: fetch it again or leave it out")
        start = file.read(2)
        file.seek(0)
        if start in COMPRESSIONS:
            raise InputError(
                f"{where} is compressed ({COMPRESSIONS[start]}), so no picture can be reached by "
                "its position: unpack it to a plain tar first"
            )
        try:
            self._tar = tarfile.TarFile(fileobj=self._guard, mode="r")  # type: ignore[arg-type]
        except OSError:
            raise
        except Exception as error:  # tarfile raises a dozen kinds for broken input
            raise InputError(
                f"{where} is not a tar ({_reason(error)}): give WebDataset tars"
            ) from error
        first = self._tar.firstmember
        if first is not None and first.size < 0:
            raise InputError(f"{where} is not a tar (a member of {first.size} bytes)")

    def __iter__(self) -> Iterator[Member]:
        found = self._tar.next()  # parsed already, when the file was opened
        while found is not None:
            if not found.isdir() and not NOTES.match(found.name):
                yield Member(found.name, found.offset_data, found.size, self._why_not(found))
            found = self._next()

    def _next(self) -> tarfile.TarInfo | None:
        # What tarfile remembers would grow with the archive. PAX records for all members at once
        # could give them a path or a size, which makes no sense.
        self._tar.members.clear()
        self._tar.pax_headers.clear()
        before: int = self._tar.offset
        if before > self._size_bytes:
            self.ending = f"cut off in its last member, at byte {self._size_bytes}"
            return None
        self._guard.reset()
        try:
            found: tarfile.TarInfo | None = self._tar.next()
        except OSError:
            raise
        except Exception as error:  # likewise
            self.ending = f"damaged at byte {before} ({_reason(error)})"
            return None
        if found is None:
            self._judge_end(before)
        elif self._tar.offset <= before or found.size < 0:
            self.ending = f"damaged at byte {before} (a member of {found.size} bytes)"
            return None
        return found

    def _judge_end(self, place: int) -> None:
        """Two empty blocks end an archive; tarfile also ends at what it cannot read."""
        self._guard.reset()
        self._guard.seek(place)
        block = self._guard.read(tarfile.BLOCKSIZE)
        if not block:
            self.ending = "without its end mark (cut off between two members?)"
        elif len(block) < tarfile.BLOCKSIZE:
            self.ending = f"cut off in a header, at byte {self._size_bytes}"
        elif block.strip(b"\0"):
            self.ending = f"damaged at byte {place} (no tar header)"

    def _why_not(self, found: tarfile.TarInfo) -> str:
        if found.issym() or found.islnk():
            return "a link"
        if found.issparse():
            return "a sparse file"
        if not found.isreg():
            return "no regular file"
        if found.name.startswith("/") or ".." in found.name.split("/"):
            return "its name leads out of the archive"
        if found.offset_data + found.size > self._size_bytes:
            return "cut off by the end of the tar"
        if found.size > LARGEST_BYTES:
            return f"too many bytes: {found.size}"
        return ""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member by webdataset's rule; None where the rule gives no key.

    ``a/photo.seg.PNG`` has the key ``a/photo`` and the suffix ``seg.png``.
    """
    found = KEY_AND_SUFFIX.fullmatch(name)
    return (found[1], found[2].lower()) if found else None


class _TooLargeError(Exception):
    pass


class _Guard:
    """A file that gives so many bytes and no more: tarfile reads whatever a header claims."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.reset()

    def reset(self) -> None:
        self._left = HEADER_LIMIT_BYTES

    def read(self, size: int) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise _TooLargeError(f"headers of more than {HEADER_LIMIT_BYTES} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
