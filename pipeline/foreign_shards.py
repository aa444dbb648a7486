"""One pass over a tar that somebody else wrote: its samples, their sizes, checksums and labels.

Samples are grouped by webdataset's rule: members that follow each other and share the key are one
sample, and its first picture counts. Whatever a member is called, nothing is written by its name.
"""

import hashlib
import io
import json
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from pipeline.found_tars import FoundTar, local_copy
from pipeline.header_check import judge_header
from pipeline.picture_header import PictureHeader
from pipeline.shard_format import (
    BLOCK_BYTES,
    INDEX_RECORD,
    NO_LABEL,
    ShardInfo,
    atomic_file,
    index_bytes,
    index_name,
)
from pipeline.sources import PICTURE_SUFFIXES
from pipeline.tar_members import Member, TarMembers, split_name
from pipeline.validate import FORMATS, Limits
from pipeline.worker_pool import advance

PIECE_BYTES = 1 << 20
NOTE_LIMIT_BYTES = 1 << 20  # of a .cls or .json
INDEX_SIDE_LIMIT_PX = 65_535
LABEL_FIELD = list(INDEX_RECORD.names or ()).index("label")
# A number above it as a label is a mistaken key rather than a class.
LABEL_LIMIT = 1_000_000
UNDECODABLE = {"gif": "a GIF, which DALI does not decode"}


@dataclass(frozen=True, kw_only=True)
class IndexRules:
    """What an index depends on besides its tar."""

    decode: bool = False
    """Decode every picture and leave out what fails."""
    label_key: str | None = None
    """Label in the json of a sample; None: its .cls."""


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """A tar to be indexed."""

    tar: FoundTar
    output: Path
    """Folder for the index."""
    rules: IndexRules
    known: "IndexedShard | None" = None
    """An earlier index of a tar of this size: good if the bytes are still the same."""


@dataclass(kw_only=True)
class IndexedShard:
    """What came out of one tar; ``info.samples`` may be 0, and then there is no index."""

    info: ShardInfo
    version: str
    rules: IndexRules
    ending: str
    """What is wrong with the end of the tar, empty where nothing is."""
    unusual: list[tuple[str, str, bool]]
    """Members with something to say: name, reason, and whether it is a sample all the same."""
    formats: dict[str, int]
    """Samples of each picture format."""
    classes: dict[int, str] | None
    """The names of the labels in the index; None where they are numbers without names."""
    top_label: int
    """The largest label, -1 without any."""
    labelled: int
    """Samples with a label."""


@dataclass
class _Group:
    """The members of one key so far."""

    key: str
    picture: str = ""
    record: list[int] = field(default_factory=list)
    label: str | None = None


class _Reader:
    """The bytes of a tar from the first to the last, each once, through its SHA-256."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._place = 0

    def at(self, start: int, size: int) -> bytes:
        """These bytes, which lie behind those that were read before."""
        self._pass_to(start)
        data = self._file.read(size)
        self._took(data)
        return data

    def finish(self) -> tuple[int, str]:
        """The size of the tar and its SHA-256."""
        self._pass_to(None)
        return self._place, self._sha256.hexdigest()

    def _pass_to(self, end: int | None) -> None:
        while end is None or self._place < end:
            left = PIECE_BYTES if end is None else min(PIECE_BYTES, end - self._place)
            piece = self._file.read(left)
            if not piece:
                return
            self._took(piece)

    def _took(self, piece: bytes) -> None:
        self._sha256.update(piece)
        self._place += len(piece)
        advance(len(piece))


class ShardIndexer:
    """Collects the samples of one tar.

    Args:
        rules: of the index.
        limits: of a picture.
    """

    def __init__(self, rules: IndexRules, limits: Limits) -> None:
        self._rules = rules
        self._limits = limits
        self.records: list[list[int]] = []
        self.labels: list[str | None] = []
        self.unusual: list[tuple[str, str, bool]] = []
        self.formats: Counter[str] = Counter()

    def read(self, members: TarMembers, reader: _Reader) -> None:
        """Go through all members."""
        group = _Group("")
        for member in members:
            parts = split_name(member.name)
            if member.reason or parts is None:
                reason = member.reason or "no key before a dot in its name"
                self.unusual.append((member.name, reason, False))
                continue
            key, suffix = parts
            if key != group.key:
                self._end(group)
                group = _Group(key)
            self._member(group, suffix, member, reader)
        self._end(group)

    def _member(self, group: _Group, suffix: str, member: Member, reader: _Reader) -> None:
        if f".{suffix.rpartition('.')[2]}" in PICTURE_SUFFIXES:
            if group.picture:
                reason = "not the first picture of its sample"
                self.unusual.append((member.name, reason, False))
            else:
                self._picture(group, member, reader)
        elif suffix == ("json" if self._rules.label_key else "cls"):
            if member.size > NOTE_LIMIT_BYTES:
                self.unusual.append((member.name, "label unreadable: too many bytes", True))
            else:
                self._label(group, member, reader.at(member.start, member.size))

    def _picture(self, group: _Group, member: Member, reader: _Reader) -> None:
        if member.size > self._limits.max_bytes:
            self.unusual.append((member.name, f"too many bytes: {member.size}", False))
            return
        data = reader.at(member.start, member.size)
        header, problem = judge_header(data, self._limits)
        kind = header.format if header else "unknown"
        width = height = 0
        if header and not problem and max(header.width, header.height) <= INDEX_SIDE_LIMIT_PX:
            width, height = header.width, header.height
        if header and not problem and self._rules.decode:
            problem = decode_problem(data, header)
        is_sample = kind not in UNDECODABLE and not (problem and self._rules.decode)
        problem = UNDECODABLE.get(kind, problem)
        if problem:
            self.unusual.append((member.name, problem, is_sample))
        if is_sample:
            self.formats[kind] += 1
            group.picture = member.name
            group.record = [
                *(member.start // BLOCK_BYTES, member.size, zlib.crc32(data)),
                *(NO_LABEL, width, height, 0, 0),
            ]

    def _label(self, group: _Group, member: Member, data: bytes) -> None:
        try:
            group.label = parse_label(data, self._rules.label_key)
        except ValueError as error:
            self.unusual.append((member.name, f"label unreadable: {error}", True))

    def _end(self, group: _Group) -> None:
        if group.record:
            self.records.append(group.record)
            self.labels.append(group.label)

    def number_labels(self) -> dict[int, str] | None:
        """Write the labels into the records: as they are if all are numbers, else by name."""
        texts = {label for label in self.labels if label is not None}
        number_of = numbers_of(texts)
        for record, label in zip(self.records, self.labels, strict=True):
            if label is not None:
                record[LABEL_FIELD] = number_of[label]
        named = not all(is_number(text) for text in texts)
        return {number: text for text, number in number_of.items()} if named else None


def numbers_of(labels: Iterable[str]) -> dict[str, int]:
    """The number of each label: its own where all are numbers, else its place in the alphabet."""
    texts = set(labels)
    if all(is_number(text) for text in texts):
        return {text: int(text) for text in texts}
    return {text: number for number, text in enumerate(sorted(texts))}


def is_number(label: str) -> bool:
    """Whether a label is the number of a class, without a sign and zeros in front."""
    is_plain = label.isascii() and label.isdigit() and str(int(label)) == label
    return is_plain and int(label) < LABEL_LIMIT


def parse_label(data: bytes, key: str | None) -> str | None:
    """The label in a ``.cls``, or under ``key`` in a ``.json``; None where that lacks it.

    Raises:
        ValueError: if it cannot be read; the message is the reason.
    """
    text = data.decode()  # UnicodeDecodeError is a ValueError
    if key is None:
        label: Any = text.strip()
    else:
        try:
            content = json.loads(text)
        except RecursionError:
            raise ValueError("nested too deep") from None
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        label = content.get(key)
    if label is None:
        return None
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise ValueError(f"{label!r:.40} is neither a number nor a name")
    return str(label)


def decode_problem(data: bytes, header: PictureHeader) -> str:
    """Why a picture cannot be decoded to RGB, "" where it can; its header was checked."""
    with warnings.catch_warnings():
        # Pillow warns of odd metadata and of sizes for which there are limits of our own.
        warnings.simplefilter("ignore")
        Image.MAX_IMAGE_PIXELS = None
        try:
            Image.open(io.BytesIO(data), formats=FORMATS[header.format]).convert("RGB")
        except MemoryError:
            return "cannot be decoded: needs more memory than there is"
        except Exception as error:  # Pillow's decoders raise a dozen kinds for broken input
            return f"cannot be decoded: {error}"
    return ""


def index_shard(job: IndexJob) -> IndexedShard:
    """Index one tar; its index appears complete or not at all.

    Raises:
        InputError: if it is not a tar, or is empty.
        OSError: if it cannot be read, or the index not be written.
    """
    with local_copy(job.tar, job.output) as path:
        size = path.stat().st_size
        if job.known is not None:
            if (size, sha256_of(path)) == (job.known.info.bytes, job.known.info.sha256):
                job.known.version = job.tar.version
                return job.known
            advance(-size)
        indexer = ShardIndexer(job.rules, Limits())
        with path.open("rb") as headers, path.open("rb") as file:
            members = TarMembers(headers, size, str(job.tar))
            reader = _Reader(file)
            indexer.read(members, reader)
            size, sha256 = reader.finish()
    classes = indexer.number_labels()
    labels = [record[LABEL_FIELD] for record in indexer.records]
    index_sha256 = ""
    if indexer.records:
        rows = [tuple(record) for record in indexer.records]
        index_sha256 = write_index(job.output / index_name(job.tar.name), rows)
    return IndexedShard(
        info=ShardInfo(
            name=job.tar.name,
            samples=len(indexer.records),
            bytes=size,
            sha256=sha256,
            index_sha256=index_sha256,
        ),
        version=job.tar.version,
        rules=job.rules,
        ending=members.ending,
        unusual=indexer.unusual,
        formats=dict(indexer.formats),
        classes=classes,
        top_label=max(labels, default=NO_LABEL),
        labelled=sum(label != NO_LABEL for label in labels),
    )


def write_index(path: Path, rows: list[tuple[int, ...]]) -> str:
    """Write an index and give its SHA-256."""
    data = index_bytes(np.array(rows, dtype=INDEX_RECORD))
    with atomic_file(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Of a file, read in small pieces."""
    with path.open("rb") as file:
        return _Reader(file).finish()[1]
