"""The bytes of a tar on a disk, by position: mapped where that is safe, else read.

A page of a map that is no longer behind the file, because somebody cut it short, kills the process
with SIGBUS, which nothing can catch. On a local disk shards are written once and renamed, so that
does not happen; on a network mount another machine may do it, and a lost connection does the same.
"""

import mmap
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# As the kernel names them; whatever is behind FUSE is not ours to trust either.
NETWORK_FILE_SYSTEMS = (
    *("nfs", "cifs", "smb", "lustre", "fuse", "ceph", "glusterfs", "gpfs", "beegfs", "9p"),
    *("afs", "ocfs2", "gfs2", "orangefs", "pvfs2", "panfs", "weka", "virtiofs", "ncpfs"),
)


class Tar(Protocol):
    """Read access to the bytes of one tar."""

    def read(self, start: int, size: int) -> Bytes:
        """Bytes from ``start``, read-only, fewer at the end of the file."""
        ...

    def size_bytes(self) -> int:
        """Of the file."""
        ...


class MappedTar:
    """A tar in memory; what it gives are views that keep the map alive.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is empty.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), "u1")

    def read(self, start: int, size: int) -> Bytes:
        """A view, without a copy."""
        return self._data[start : start + size]

    def size_bytes(self) -> int:
        """At the time of opening."""
        return len(self._data)


class FileTar:
    """A tar that stays open; what it gives are copies.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def read(self, start: int, size: int) -> Bytes:
        """A copy.

        Raises:
            OSError: if the mount fails.
        """
        return np.frombuffer(os.pread(self._handle, size, start), np.uint8)

    def size_bytes(self) -> int:
        """Of the file as it is now."""
        return os.fstat(self._handle).st_size


def open_tar(path: Path, *, is_local: bool) -> Tar:
    """The tar at ``path``.

    Raises:
        OSError, ValueError: if it cannot be opened or is empty.
    """
    return MappedTar(path) if is_local else FileTar(path)


def file_system(folder: Path, table: str | None = None) -> str:
    """The kernel's name for the file system that ``folder`` is on, empty where it is unknown.

    Args:
        folder: need not exist.
        table: the contents of ``/proc/self/mountinfo``, for tests.
    """
    if table is None:
        try:
            table = Path("/proc/self/mountinfo").read_text(errors="surrogateescape")
        except OSError:  # not Linux
            return ""
    resolved = folder.resolve()
    best, kind = -1, ""
    for line in table.splitlines():
        fields = line.split()
        # man 5 proc_pid_mountinfo: the mount point is field 5, the type follows a lone hyphen.
        point = Path(fields[4].encode("latin-1", "replace").decode("unicode_escape"))
        if resolved.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), fields[fields.index("-", 6) + 1]
    return kind


def is_network(kind: str) -> bool:
    """Whether files on such a file system may be cut short by another machine."""
    return kind.startswith(NETWORK_FILE_SYSTEMS)
