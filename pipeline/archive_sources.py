"""Sources inside tar files, read where they lie; nothing is unpacked to the disk.

A tar of tars is ImageNet's training set as it is downloaded: the name of each inner tar is the
class. A tar with ``KEY.cls`` or ``KEY.json`` members is a WebDataset shard. Other tars hold
pictures alone, whose labels may lie in a file of their own, as those of ImageNet's validation set.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from pipeline.entry_list import Entry, Ignored
from pipeline.program import InputError
from pipeline.shard_format import (
    BLOCK_BYTES,
    FLAG_DROPPED,
    MANIFEST_NAME,
    index_name,
    read_index,
    read_manifest,
)
from pipeline.sources import PICTURE_SUFFIXES, Source, SourceConfig
from pipeline.tar_members import Member, TarMembers, split_name

SMALL_BYTES = 1 << 20  # of a member that is no picture
DEVKIT_SYNSETS, DEVKIT_LABELS = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
LabelOf = Callable[[str], str | int | None]


def tar_files(place: Path) -> list[Path]:
    """The tar itself, or the tars of a folder of shards; none for anything else."""
    if place.is_file():
        return [place] if place.suffix == ".tar" else []
    if not place.is_dir():
        return []
    others = (path for path in place.iterdir() if not path.name.startswith("."))
    if any(path.suffix.lower() in PICTURE_SUFFIXES or path.is_dir() for path in others):
        return []
    return sorted(place.glob("*.tar"))


def tar_source(place: Path, tars: list[Path], config: SourceConfig) -> Source:
    """The pictures of these tars.

    Args:
        place: the source as it was given: a tar or a folder of them.
        tars: in the order in which they are read.
        config: may name a file of labels.

    Raises:
        InputError: if a tar or the labels cannot be read; for the tars while they are read.
    """
    label_of, classes = read_labels(config.labels) if config.labels else (_no_label, None)
    ours = (place / MANIFEST_NAME).exists() and place.is_dir()
    if ours:
        manifest = read_manifest(place)
        tars = [place / shard.name for shard in manifest.shards]
        classes = list(manifest.classes) or None
    entries = (entry for tar in tars for entry in _entries_of(tar, label_of, ours))
    return Source(entries, classes)


def _no_label(_: str) -> None:
    return None


def _entries_of(tar: Path, label_of: LabelOf, ours: bool) -> Iterator[Entry | Ignored]:
    prefix = "" if ours else f"{tar.stem}/"
    dropped = _dropped_of(tar) if ours else frozenset()
    with tar.open("rb") as file:
        size = tar.stat().st_size
        members = TarMembers(file, size, str(tar))
        sample: list[Member] = []
        for member in members:
            if member.reason:
                yield Ignored(prefix + member.name, member.reason)
            elif member.name.endswith(".tar"):
                yield from _inner_entries(tar, file, member)
            else:
                if sample and _key(sample[0]) != _key(member):
                    yield from _sample_entries(tar, file, sample, prefix, label_of, dropped)
                    sample = []
                sample.append(member)
        yield from _sample_entries(tar, file, sample, prefix, label_of, dropped)
        if members.ending:
            yield Ignored(tar.name, f"read to byte {file.tell()}: {members.ending}")


def _dropped_of(tar: Path) -> frozenset[int]:
    """Where the pictures start that must not be used any more."""
    records = read_index(tar.with_name(index_name(tar.name)))
    dropped = records[records["flags"] & FLAG_DROPPED > 0]
    return frozenset((dropped["block"].astype(int) * BLOCK_BYTES).tolist())


def _key(member: Member) -> str:
    found = split_name(member.name)
    return found[0] if found else member.name


def _suffix(member: Member) -> str:
    return PurePosixPath(member.name).suffix.lower()


def _sample_entries(
    tar: Path,
    file: BinaryIO,
    sample: list[Member],
    prefix: str,
    label_of: LabelOf,
    dropped: frozenset[int],
) -> Iterator[Entry | Ignored]:
    """The picture of the members that share a key."""
    pictures = [member for member in sample if _suffix(member) in PICTURE_SUFFIXES]
    others = {_suffix(member): member for member in sample if member not in pictures}
    label: str | int | None = None
    if pictures and (found := others.pop(".cls", None)):
        label = _as_label(_small(file, found).decode("utf-8", "replace"))
    metadata = None
    if pictures and (found := others.pop(".json", None)):
        metadata = _as_object(_small(file, found))
    for other in others.values():
        yield Ignored(prefix + other.name, f"ending {_suffix(other)}")
    plain = [member for member in pictures if "." not in (split_name(member.name) or ("", "."))[1]]
    for picture in pictures:
        if plain and picture not in plain:  # KEY.seg.png beside KEY.jpg
            yield Ignored(prefix + picture.name, "not the picture of its sample")
            continue
        if picture.start in dropped:
            yield Ignored(prefix + picture.name, "dropped from its set")
            continue
        name = prefix + picture.name
        of_file = label_of(picture.name) if label is None else label
        yield Entry(name, str(tar), picture.size, of_file, picture.start, metadata)


def _inner_entries(tar: Path, file: BinaryIO, outer: Member) -> Iterator[Entry | Ignored]:
    """The pictures of a tar in a tar; its name is their class."""
    label = PurePosixPath(outer.name).stem
    place = file.tell()
    inner = _Window(file, outer.start, outer.size)
    try:
        members = TarMembers(inner, outer.size, f"{outer.name} in {tar}")  # type: ignore[arg-type]
        for member in members:
            name = f"{label}/{member.name}"
            if member.reason or _suffix(member) not in PICTURE_SUFFIXES:
                yield Ignored(name, member.reason or f"ending {_suffix(member)}")
            else:
                yield Entry(name, str(tar), member.size, label, outer.start + member.start)
        if members.ending:
            yield Ignored(outer.name, f"read in part: {members.ending}")
    except InputError as error:
        yield Ignored(outer.name, str(error))
    finally:
        file.seek(place)


class _Window:
    """A part of a file as a file of its own, for reading headers."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._size = file, start, size
        self._place = 0

    def read(self, size: int) -> bytes:
        self._file.seek(self._start + self._place)
        data = self._file.read(max(0, min(size, self._size - self._place)))
        self._place += len(data)
        return data

    def seek(self, place: int) -> int:
        self._place = place
        return place

    def tell(self) -> int:
        return self._place


def _small(file: BinaryIO, member: Member) -> bytes:
    place = file.tell()
    file.seek(member.start)
    data = file.read(min(member.size, SMALL_BYTES))
    file.seek(place)
    return data


def _as_label(text: str) -> str | int | None:
    """A number is an index of a class, anything else its name."""
    text = text.strip()
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text or None


def _as_object(data: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_labels(path: Path) -> tuple[LabelOf, list[str] | None]:
    """What a file of labels says of a picture, and the classes where it fixes their order.

    It is the devkit of ILSVRC2012 (``.tar.gz``); or text with a label a line, for the picture whose
    number is that of the line (``..._00000001.JPEG`` is the first); or with a name and a label.

    Raises:
        InputError: if it cannot be read as any of these.
    """
    if not path.is_file():
        raise InputError(f"--labels {path}: no such file")
    if path.suffix in (".gz", ".tgz", ".tar"):
        labels = _devkit_labels(path)
        return lambda name: _by_number(labels, name, path), sorted(set(labels))
    lines = [re.split(r"[\s,]+", line.strip()) for line in path.read_text().splitlines() if line]
    if lines and all(len(words) == 1 for words in lines):
        in_order = [_as_label(words[0]) for words in lines]
        return lambda name: _by_number(in_order, name, path), None
    if lines and all(len(words) == 2 for words in lines):
        named = {PurePosixPath(name).name: _as_label(label) for name, label in lines}
        return lambda name: named.get(PurePosixPath(name).name), None
    raise InputError(
        f"--labels {path}: give the devkit's tar.gz, or text with a label a line, or with a name "
        "and a label a line"
    )


def _by_number(labels: list[Any], name: str, path: Path) -> Any:
    digits = re.search(r"(\d+)$", PurePosixPath(name).stem)
    if not digits or not 1 <= int(digits[1]) <= len(labels):
        raise InputError(f"{name} has no number from 1 to {len(labels)}, the labels of {path}")
    return labels[int(digits[1]) - 1]


def _devkit_labels(path: Path) -> list[str]:
    """The synset of each validation picture; the devkit has numbers of its own for them."""
    from scipy.io import loadmat  # type: ignore[import-untyped]  # seldom needed, slow to import

    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path) as devkit:
            for member in devkit:
                name = PurePosixPath(member.name).name
                if name in (DEVKIT_SYNSETS, DEVKIT_LABELS) and member.size <= 64 * SMALL_BYTES:
                    content = devkit.extractfile(member)
                    found[name] = content.read() if content else b""
        synsets = loadmat(io.BytesIO(found[DEVKIT_SYNSETS]), squeeze_me=True)["synsets"]
        name_of = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        return [name_of[int(number)] for number in found[DEVKIT_LABELS].split()]
    except (tarfile.TarError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"--labels {path} is not the devkit of ILSVRC2012 ({error!r})") from error
