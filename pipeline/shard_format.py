"""Shards on disk: a plain tar, a binary index beside it, one manifest for the set.

The tar is USTAR with members ``KEY.jpg``, ``KEY.cls`` (label as decimal text) and ``KEY.json``
(metadata), so that any WebDataset reader can read it. The index holds 24 bytes for each sample and
is all that random access needs. The manifest is written last: a folder without one is unfinished.
``shards/README.md`` is the specification for readers in other languages.

Every file is written under a temporary name, fsynced and renamed, and all bytes are a function of
the samples alone (owner, mode and time are fixed), so equal input gives equal files.
"""

import hashlib
import itertools
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.direct_file import direct_file
from pipeline.program import InputError

FORMAT_VERSION = 1
BLOCK_BYTES = 512  # tar: every member starts at a multiple of this
MANIFEST_NAME = "manifest.json"
INDEX_SUFFIX = ".index"  # not .idx: that is the name of DALI's text index of the same tar

INDEX_MAGIC = b"MOCOIDX\x00"
# magic, version, bytes per record, records, crc32 of all records, padding
INDEX_HEADER = struct.Struct("<8sIIQI4x")
INDEX_RECORD = np.dtype(
    [
        ("block", "<u4"),  # where the picture's bytes start, in blocks of 512 bytes
        ("size", "<u4"),  # bytes of the picture
        ("crc32", "<u4"),  # of the picture's bytes
        ("label", "<i4"),  # index into the manifest's classes, -1: none
        ("width", "<u2"),  # pixels, as stored (EXIF rotation is not applied by any reader)
        ("height", "<u2"),
        ("flags", "<u2"),  # bit 0: dropped, never to be used
        ("reserved", "<u2"),
    ]
)
FLAG_DROPPED = 1
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One picture ready to be stored: ``picture`` is a JPEG of ``width`` x ``height`` pixels."""

    key: str
    picture: bytes
    width: int
    height: int
    label: int = NO_LABEL
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One line of the manifest. ``bytes`` and ``sha256`` are those of the tar."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a folder of shards holds. ``sha256`` identifies the data set in checkpoints."""

    shards: tuple[ShardInfo, ...]
    classes: tuple[str, ...]
    made_by: dict[str, Any]
    sha256: str
    tars: str = ""
    """Folder or URL where the tars lie; empty: beside the manifest, as do the indexes always."""

    @property
    def samples(self) -> int:
        """Pictures in all shards together."""
        return sum(shard.samples for shard in self.shards)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is complete and on the disk.

    Leaves nothing behind when the body raises; a kill can leave ``.NAME.part``, which no reader
    looks at and the next writer replaces.
    """
    with atomic_parts(path) as (part,), part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_parts(*paths: Path) -> Iterator[tuple[Path, ...]]:
    """Names to write files under that get their own names together; the body fsyncs them."""
    parts = tuple(path.with_name(f".{path.name}.part") for path in paths)
    made = list(parts)
    try:
        yield parts
        for part, path in zip(parts, paths, strict=True):
            part.replace(path)
            made.append(path)
    except BaseException as error:
        for path in made:
            path.unlink(missing_ok=True)
        # A failed write says what is wrong, but not where; nobody knows the other names.
        if isinstance(error, OSError) and error.filename in (None, *map(str, parts)):
            error.filename = str(paths[0])
        raise
    sync_folder(paths[0].parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def tar_header(name: str, size_bytes: int) -> bytes:
    """The 512 bytes in front of a member, the same for every user, machine and day.

    Filled in here where the name fits into its field: 3 instead of 22 microseconds, and a sample
    has two or three of them.
    """
    if len(name) > TAR_NAME_BYTES or size_bytes > TAR_SIZE_LIMIT:
        return _tar_header_of_tarfile(name, size_bytes)
    name_field = name.encode("ascii")
    size_field = b"%011o" % size_bytes
    checksum = _HEADER_SUM + sum(name_field) + sum(size_field)
    return (
        name_field.ljust(TAR_NAME_BYTES, b"\0")
        + _EMPTY_HEADER[100:124]
        + size_field
        + _EMPTY_HEADER[135:148]
        + b"%06o" % checksum
        + _EMPTY_HEADER[154:]
    )


def _tar_header_of_tarfile(name: str, size_bytes: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size_bytes
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


TAR_NAME_BYTES = 100
TAR_SIZE_LIMIT = 8**11 - 1
_EMPTY_HEADER = _tar_header_of_tarfile("", 0)
# A checksum counts its own field as spaces; the size field adds itself.
_HEADER_SUM = int(_EMPTY_HEADER[148:154], 8) - sum(_EMPTY_HEADER[124:135])


def sample_members(sample: Sample) -> Iterator[tuple[str, bytes]]:
    """The members of a sample, the picture first."""
    yield f"{sample.key}.jpg", sample.picture
    if sample.label != NO_LABEL:
        yield f"{sample.key}.cls", str(sample.label).encode()
    if sample.metadata is not None:
        text = json.dumps(sample.metadata, sort_keys=True, ensure_ascii=True)
        yield f"{sample.key}.json", text.encode()


def write_shard(path: Path, samples: Iterable[Sample]) -> ShardInfo | None:
    """Write a tar and its index; both appear complete or not at all.

    Args:
        path: of the tar, which gives the shard its name; the index lies beside it.
        samples: in the order in which they are stored.

    Returns:
        The manifest's entry, or None (and no file) where there were no samples.
    """
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        return None
    sha256 = hashlib.sha256()
    records: list[tuple[int, ...]] = []
    offset = 0
    with atomic_parts(path, path.with_name(index_name(path.name))) as (tar_part, index_part):
        with direct_file(tar_part) as file:
            for sample in itertools.chain((first,), remaining):
                (name, picture), *others = sample_members(sample)
                record = (offset // BLOCK_BYTES + 1, len(picture), zlib.crc32(picture))
                records.append((*record, sample.label, sample.width, sample.height, 0, 0))
                tail = [bytes(-len(picture) % BLOCK_BYTES)]
                for other, data in others:
                    tail += tar_header(other, len(data)), data, bytes(-len(data) % BLOCK_BYTES)
                for piece in (tar_header(name, len(picture)), picture, b"".join(tail)):
                    file.write(piece)
                    sha256.update(piece)
                    offset += len(piece)
            end = bytes(tarfile.RECORDSIZE - offset % tarfile.RECORDSIZE)
            if len(end) < 2 * BLOCK_BYTES:  # the end of a tar is two empty blocks
                end += bytes(tarfile.RECORDSIZE)
            file.write(end)
            sha256.update(end)
        index = index_bytes(np.array(records, dtype=INDEX_RECORD))
        with index_part.open("wb") as index_file:
            index_file.write(index)
            index_file.flush()
            os.fsync(index_file.fileno())
    return ShardInfo(
        name=path.name,
        samples=len(records),
        bytes=offset + len(end),
        sha256=sha256.hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def index_bytes(records: NDArray[np.void]) -> bytes:
    """The index file of these records: 32 bytes of header, then 24 bytes for each sample."""
    body = records.tobytes()
    header = INDEX_HEADER.pack(
        INDEX_MAGIC, FORMAT_VERSION, INDEX_RECORD.itemsize, len(records), zlib.crc32(body)
    )
    return header + body


def index_name(shard_name: str) -> str:
    """The name of a shard's index, which lies beside it."""
    return Path(shard_name).with_suffix(INDEX_SUFFIX).name


def read_index(path: Path) -> NDArray[np.void]:
    """The records of one shard, in the order of its samples.

    Raises:
        InputError: if the file is not an index, is of another version, or is damaged.
        FileNotFoundError: if there is none.
    """
    return parse_index(path.read_bytes(), str(path))


def parse_index(data: bytes, where: str) -> NDArray[np.void]:
    """The records in the bytes of an index file; ``where`` names it in messages.

    Raises:
        InputError: if they are not an index, are of another version, or are damaged.
    """
    if len(data) < INDEX_HEADER.size or not data.startswith(INDEX_MAGIC):
        raise InputError(f"{where} is not a shard index: write it again with make_shards")
    _, version, record_bytes, count, crc32 = INDEX_HEADER.unpack_from(data)
    if (version, record_bytes) != (FORMAT_VERSION, INDEX_RECORD.itemsize):
        raise InputError(
            f"{where} has index version {version} with {record_bytes} bytes per sample, this "
            f"program reads version {FORMAT_VERSION} with {INDEX_RECORD.itemsize}: pack again"
        )
    body = memoryview(data)[INDEX_HEADER.size :]
    if len(body) != count * record_bytes or zlib.crc32(body) != crc32:
        raise InputError(f"{where} is damaged (its checksum differs): restore it or pack again")
    return np.frombuffer(body, dtype=INDEX_RECORD)


def write_manifest(
    folder: Path,
    shards: Iterable[ShardInfo],
    classes: Iterable[str],
    made_by: dict[str, Any],
    tars: str = "",
) -> Manifest:
    """Declare a folder finished; ``made_by`` holds settings only, so equal input stays equal.

    ``tars`` is ``Manifest.tars``.
    """
    content: dict[str, Any] = {
        "format": "mocostream-shards",
        "version": FORMAT_VERSION,
        "classes": list(classes),
        "made_by": made_by,
        "shards": [asdict(shard) for shard in shards],
    }
    if tars:
        content["tars"] = tars
    with atomic_file(folder / MANIFEST_NAME) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")
    return read_manifest(folder)


def rewrite_shards(path: Path, shards: Iterable[ShardInfo]) -> None:
    """Give a manifest other lines for its shards and leave the rest as it is."""
    content = json.loads(path.read_bytes())
    content["shards"] = [asdict(shard) for shard in shards]
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1, sort_keys=True).encode() + b"\n")


def read_manifest(folder: Path) -> Manifest:
    """What ``folder`` holds.

    Raises:
        InputError: if it is not a folder of finished shards; the message says what it is instead.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder of shards: make one with make_shards")
    if not path.is_file():
        tars = sum(1 for _ in folder.glob("*.tar"))
        raise InputError(
            f"{folder} has {tars} tar files but no {MANIFEST_NAME}: its packing did not end (run "
            "make_shards again), or the tars come from elsewhere (run check_shards index)"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of its file; ``where`` names it in messages.

    Raises:
        InputError: if they are no manifest, or one of another version.
    """
    try:
        content = json.loads(data)
        if content["version"] != FORMAT_VERSION:
            raise InputError(
                f"{where} has version {content['version']}, this program reads {FORMAT_VERSION}"
            )
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
        for shard in shards:
            if shard.name in ("", ".", "..") or Path(shard.name).name != shard.name:
                raise InputError(f"{where} names {shard.name!r}, which is not a file in its folder")
            if type(shard.samples) is not int or shard.samples < 0:
                raise InputError(
                    f"{where} gives {shard.name} {shard.samples!r} samples: pack again"
                )
        manifest = Manifest(
            shards=shards,
            classes=tuple(content["classes"]),
            made_by=content["made_by"],
            sha256=hashlib.sha256(data).hexdigest(),
            tars=content.get("tars", ""),
        )
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not a manifest of shards ({error}): pack again") from error
    return manifest
