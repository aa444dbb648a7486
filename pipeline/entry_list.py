"""The list of what is to be packed, on disk: it may be longer than memory is large.

A source is walked once and each entry becomes one JSON line. ``places`` holds where each line
starts, so that a worker reads the lines of its shard alone; which they are is a bijection of the
seed (no shuffled list exists anywhere). Memory does not grow with the number of entries, only with
that of the classes.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.integer_hash import UInts, hash_of, permute

WHOLE_FILE = -1
# A USTAR name holds 100 characters; a suffix of 17 and an extension of 5 must fit behind the stem.
KEY_STEM_LENGTH = 72
DROPPED_NAME = "dropped"  # places in the list that are left out, as duplicates
BUFFERED = 1 << 16  # values in memory before they are written
_as_json = json.JSONEncoder(sort_keys=True).encode  # json.dumps makes one for each call
_ODD = re.compile(r"[^A-Za-z0-9_/-]")
_HIDDEN = re.compile(r"(^|/)__+")
_PAIR = struct.Struct("=QQ")
NOTHING = np.zeros(0, np.uint64)
STEMS_AT_ONCE = 1 << 20  # of which those that occur twice are looked for


class Entry(NamedTuple):
    """One picture of a source."""

    name: str
    """Its path below the source, for people and for its key."""
    path: str
    """The file that holds its bytes."""
    size_bytes: int
    """What it adds to a shard; 0 where nobody knows."""
    label: str | int | None = None
    """Name of its class or index of it."""
    offset: int = WHOLE_FILE
    """Where its ``size_bytes`` start in the file, or ``WHOLE_FILE``."""
    metadata: dict[str, Any] | str | None = None
    """What its KEY.json shall hold, or the file where that is written."""


class Ignored(NamedTuple):
    """A file that is not looked at, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class ListInfo:
    """What is known of a list when it is complete."""

    folder: Path
    count: int
    total_bytes: int
    sha256: str
    classes: list[str]
    """Names in the order of the labels, of the entries that have one."""
    largest_label: int
    """Of those that are numbers; -1 where none is."""
    unlabelled: str
    """The first entry without a label, or ""."""
    ignored: int


class Numbers:
    """A file of uint64 that is appended to."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._waiting = array("Q")

    def add(self, value: int) -> None:
        """Append."""
        self._waiting.append(value)
        if len(self._waiting) >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        """Write what is in memory."""
        self._waiting.tofile(self._file)
        del self._waiting[:]

    def close(self) -> None:
        """Write the rest and close the file."""
        self.flush()
        self._file.close()


def write_list(
    folder: Path, entries: Iterable[Entry | Ignored], max_bytes: int | None = None
) -> ListInfo:
    """Write the list of a source into an empty folder.

    Args:
        folder: exists; gets ``entries.jsonl``, ``places``, ``shared`` and ``ignored.jsonl``.
        entries: in an order that depends on the source alone.
        max_bytes: of one picture; what has more is refused later and adds nothing to a shard.
    """
    sha256 = hashlib.sha256()
    count = total_bytes = place = ignored = 0
    classes: set[str] = set()
    unlabelled, largest = "", -1
    with contextlib.ExitStack() as stack:
        file, no = (
            stack.enter_context((folder / name).open("wb"))
            for name in ("entries.jsonl", "ignored.jsonl")
        )
        places, stems = (
            stack.enter_context(contextlib.closing(Numbers(folder / name)))
            for name in ("places", "stems")
        )
        for entry in entries:
            if isinstance(entry, Ignored):
                row = {"file": entry.name, "reason": entry.reason}
                no.write(json.dumps(row).encode() + b"\n")
                ignored += 1
                continue
            line = _as_json(entry).encode() + b"\n"
            file.write(line)
            sha256.update(line)
            places.add(place)
            stems.add(_stem_hash(entry.name))
            place += len(line)
            count += 1
            if max_bytes is None or entry.size_bytes <= max_bytes:
                total_bytes += entry.size_bytes
            if isinstance(entry.label, str):
                classes.add(entry.label)
            elif entry.label is not None:
                largest = max(largest, entry.label)
            else:
                unlabelled = unlabelled or entry.name
        places.add(place)
    _shared_stems(folder / "stems").tofile(folder / "shared")
    (folder / "stems").unlink()
    digest, names = sha256.hexdigest(), sorted(classes)
    return ListInfo(folder, count, total_bytes, digest, names, largest, unlabelled, ignored)


def _shared_stems(path: Path) -> UInts:
    """The hashes that occur more than once, sorted; the file is read once for each 2^20 of them."""
    count = path.stat().st_size // 8
    parts = 1 << max(0, (count // STEMS_AT_ONCE).bit_length())
    shared: list[UInts] = []
    for part in range(parts):
        found = [
            values[values % np.uint64(parts) == part] for values in _chunks(path, STEMS_AT_ONCE)
        ]
        values = np.sort(np.concatenate(found)) if found else np.zeros(0, np.uint64)
        shared.append(np.unique(values[1:][values[1:] == values[:-1]]))
    return np.sort(np.concatenate(shared))


def _chunks(path: Path, size: int) -> Iterator[NDArray[np.uint64]]:
    with path.open("rb") as file:
        while len(values := np.fromfile(file, np.uint64, size)):
            yield values


class EntryList:
    """Reads entries back in the order in which they are packed."""

    def __init__(self, folder: Path, count: int, seed: int) -> None:
        self._lines = os.open(folder / "entries.jsonl", os.O_RDONLY)
        self._places = os.open(folder / "places", os.O_RDONLY)
        self._shared = np.fromfile(folder / "shared", np.uint64)
        self._count = count
        self._order_key = hash_of(seed)
        dropped = folder / DROPPED_NAME
        self._dropped = np.fromfile(dropped, np.uint64) if dropped.exists() else NOTHING

    def close(self) -> None:
        """Close the files."""
        os.close(self._lines)
        os.close(self._places)

    def at(self, number: int) -> Entry:
        """The entry at a place of the list itself."""
        start, end = _PAIR.unpack(os.pread(self._places, _PAIR.size, 8 * number))
        return Entry(*json.loads(os.pread(self._lines, end - start, start)))

    def read(self, first: int, last: int) -> Iterator[tuple[str, Entry]]:
        """Keys and entries at the places ``first`` to ``last - 1`` of the shuffled order.

        Those that were dropped are passed over.
        """
        numbers = permute(np.arange(first, last, dtype=np.uint64), self._count, self._order_key)
        for number in numbers[~_are_among(numbers, self._dropped)].tolist():
            entry = self.at(number)
            yield key_of(entry.name, is_shared=self._is_shared(entry.name)), entry

    def _is_shared(self, name: str) -> bool:
        if not len(self._shared):
            return False  # as nearly always, at no cost
        return bool(_are_among(np.array([_stem_hash(name)], np.uint64), self._shared)[0])


def _are_among(values: UInts, ordered: UInts) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), bool)
    nearest = np.searchsorted(ordered, values).clip(max=len(ordered) - 1)
    are_there: NDArray[np.bool_] = ordered[nearest] == values
    return are_there


def _stem_of(name: str) -> str:
    stem = _ODD.sub("_", name.rpartition(".")[0] or name)
    # webdataset keeps folders such as "__meta__" for notes of its own.
    return _HIDDEN.sub(r"\1_", stem) if "__" in stem else stem


def _stem_hash(name: str) -> int:
    # "A" and "a" would be one file where a tar is unpacked on a disk that ignores case.
    stem = _stem_of(name).lower().encode()
    return int.from_bytes(hashlib.blake2b(stem, digest_size=8).digest(), "little")


def key_of(name: str, *, is_shared: bool) -> str:
    """A tar key: ASCII, no dots, no spaces, unique, still readable.

    A name that cannot be kept as it is, or shares its key with another, gets 16 digits of its own
    SHA-256 behind it, so that a key depends on nothing but the names.
    """
    stem = _stem_of(name)
    if stem == name.rpartition(".")[0] and len(stem) <= KEY_STEM_LENGTH and not is_shared:
        return stem
    digits = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{stem[:KEY_STEM_LENGTH]}-{digits}"
