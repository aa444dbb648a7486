"""Pictures that are there twice: byte by byte (SHA-256), or to the eye (a perceptual hash).

One more pass over the sources before packing, in parallel, gives each picture 24 bytes of
fingerprint. A picture is a duplicate of an earlier one of the list that is kept itself, or of one
in another source that it is compared with (training against test pictures).

The perceptual hash is imagehash's ``phash``: the signs of the 8 x 8 lowest frequencies against
their median. Copies in another size or quality differ in 0 to 4 of its 64 bits, different photos in
about 32. Pictures of one colour all look the same to it.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
from numpy.typing import NDArray

from pipeline.entry_list import DROPPED_NAME, EntryList, ListInfo
from pipeline.packing import read_picture
from pipeline.program import InputError
from pipeline.shard_format import atomic_file
from pipeline.validate import Limits, RefusedError, decode_grey
from pipeline.worker_pool import advance

PRINT = np.dtype([("sha256", "<u8", 2), ("look", "<u8"), ("state", "u1")])
UNREAD, UNDECODED, DECODED = 0, 1, 2
ENTRIES_A_JOB = 4096
LARGEST_DISTANCE = 8
HASH_SIDE_PX = 128  # of the decoded picture; the hash itself works on 32
DUPLICATES_NAME = "duplicates.jsonl"
PAIRS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """What to do with pictures that are there twice."""

    duplicates: Literal["keep", "report", "drop"] = "keep"
    """Of the same bytes: do not look for them, list them in duplicates.jsonl, or leave them out."""
    near_duplicates: int = -1
    """Also those whose perceptual hashes differ in so many of 64 bits, 0 to 8. -1: not these."""
    against: tuple[str, ...] = ()
    """Other sources (shards, folders, ...), such as the test set: their pictures count as there."""

    def __post_init__(self) -> None:
        if not -1 <= self.near_duplicates <= LARGEST_DISTANCE:
            raise InputError(
                f"--near-duplicates {self.near_duplicates}: give 0 to {LARGEST_DISTANCE}, or -1"
            )
        if self.duplicates == "keep" and (self.against or self.near_duplicates >= 0):
            raise InputError(
                "--near-duplicates and --against: say what to do with them, --duplicates report "
                "or --duplicates drop"
            )


@dataclass(frozen=True)
class PrintJob:
    """A stretch of a list whose fingerprints are to be taken."""

    listed: ListInfo
    first: int
    last: int
    limits: Limits
    look: bool
    """Also the perceptual hash, which needs decoding."""

    @property
    def path(self) -> Path:
        """Where the fingerprints are kept; a packing that goes on finds them again."""
        kind = "look" if self.look else "bytes"
        name = f"prints-{self.listed.sha256[:16]}-{kind}-{self.first:012d}.npy"
        return self.listed.folder.parent / name


def print_jobs(listed: ListInfo, limits: Limits, *, look: bool) -> list[PrintJob]:
    """The stretches of a list."""
    firsts = range(0, listed.count, ENTRIES_A_JOB)
    return [
        PrintJob(listed, first, min(first + ENTRIES_A_JOB, listed.count), limits, look)
        for first in firsts
    ]


def take_prints(job: PrintJob) -> None:
    """Write the fingerprints of a stretch, unless they are there."""
    if job.path.exists():
        advance(job.last - job.first)
        return
    prints = np.zeros(job.last - job.first, PRINT)
    entries = EntryList(job.listed.folder, job.listed.count, 0)
    try:
        for number in range(job.first, job.last):
            entry = entries.at(number)
            try:
                data, _ = read_picture(entry, job.limits)
                prints[number - job.first] = _print_of(data, job.limits, look=job.look)
            except (OSError, RefusedError):
                pass  # is refused with its reason when it is packed
            advance(1)
    finally:
        entries.close()
    with atomic_file(job.path) as file:
        np.save(file, prints)


def _print_of(data: bytes, limits: Limits, *, look: bool) -> tuple[NDArray[np.uint64], int, int]:
    digest = np.frombuffer(hashlib.sha256(data).digest()[:16], np.uint64)
    if not look:
        return digest, 0, UNDECODED
    try:
        bits = imagehash.phash(decode_grey(data, limits, HASH_SIDE_PX)).hash
    except RefusedError:
        return digest, 0, UNDECODED
    return digest, int(np.packbits(bits.reshape(-1)).view(">u8")[0]), DECODED


def read_prints(jobs: list[PrintJob]) -> NDArray[np.void]:
    """The fingerprints of a list, in its order."""
    parts = [np.load(job.path, allow_pickle=False) for job in jobs]
    joined: NDArray[np.void] = np.concatenate(parts) if parts else np.zeros(0, PRINT)
    return joined


def find_duplicates(
    prints: NDArray[np.void], ours: int, distance: int
) -> Iterator[tuple[int, int, int]]:
    """Which of our pictures are duplicates, of which one, and in how many bits they differ.

    Args:
        prints: of the other sources first, then of ours, in the order of the lists.
        ours: the place of our first one.
        distance: most bits of the perceptual hash; -1: the bytes alone.

    Yields:
        Places of the duplicate and of the original; bits, or -1 for equal bytes. In order; an
        original is no duplicate itself.
    """
    pairs = [_equal_bytes(prints)]
    if distance >= 0:
        pairs.append(_equal_looks(prints, distance))
    duplicate, original, bits = (np.concatenate(columns) for columns in zip(*pairs, strict=True))
    order = np.lexsort((bits, original, duplicate))
    gone: set[int] = set()
    for late, early, difference in zip(
        duplicate[order].tolist(), original[order].tolist(), bits[order].tolist(), strict=True
    ):
        if late >= ours and late not in gone and early not in gone:
            gone.add(late)
            yield late, early, difference


Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _equal_bytes(prints: NDArray[np.void]) -> Pairs:
    """Each picture with the first of the same bytes."""
    read = np.flatnonzero(prints["state"] != UNREAD)
    high, low = prints["sha256"][read].T
    order = np.lexsort((read, low, high))
    high, low, place = high[order], low[order], read[order]
    starts = np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])][: len(place)]
    first = place[starts][np.cumsum(starts) - 1]
    again = first != place
    return place[again], first[again], np.full(int(again.sum()), -1)


def _equal_looks(prints: NDArray[np.void], distance: int) -> Pairs:
    """All pairs whose hashes differ in at most ``distance`` bits.

    Two such hashes agree in one of ``distance + 1`` bands of bits at least, so only those that
    share a band are compared (Norouzi et al. 2012, section 2).
    """
    seen = np.flatnonzero(prints["state"] == DECODED)
    looks, which = np.unique(prints["look"][seen], return_inverse=True)
    order = np.lexsort((seen, which))
    starts = np.searchsorted(which[order], np.arange(len(looks) + 1))
    members = [seen[order[a:b]] for a, b in itertools.pairwise(starts.tolist())]
    found: list[Pairs] = [  # of one hash: each with the first
        (same[1:], np.full(len(same) - 1, same[0]), np.zeros(len(same) - 1, int))
        for same in members
        if len(same) > 1
    ]
    for one, other, bits in _near_hashes(looks, distance):
        # The first of either hash stands for the others, which are its own duplicates.
        early, late = sorted((int(members[one][0]), int(members[other][0])))
        found.append((np.array([late]), np.array([early]), np.array([bits])))
        rest = np.concatenate([members[one][1:], members[other][1:]])
        rest = rest[rest > early]
        found.append((rest, np.full(len(rest), early), np.full(len(rest), bits)))
    if not found:
        return (np.zeros(0, int),) * 3
    late_all, early_all, bits_all = (np.concatenate(column) for column in zip(*found, strict=True))
    return late_all, early_all, bits_all


def _near_hashes(looks: NDArray[np.uint64], distance: int) -> Iterator[tuple[int, int, int]]:
    """Pairs of different hashes, each once."""
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    seen: set[tuple[int, int]] = set()
    for low, high in itertools.pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        band = (looks >> np.uint64(low)) & mask
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(band[order]) != 0])
        for start, end in itertools.pairwise([*starts.tolist(), len(order)]):
            for one, other, bits in _near_of(looks, order[start:end], distance):
                pair = (min(one, other), max(one, other))
                if pair not in seen:
                    seen.add(pair)
                    yield *pair, bits


def _near_of(
    looks: NDArray[np.uint64], group: NDArray[np.int64], distance: int
) -> Iterator[tuple[int, int, int]]:
    rows = max(1, PAIRS_AT_ONCE // max(1, len(group)))
    for start in range(0, len(group), rows):
        some = group[start : start + rows]
        bits = np.bitwise_count(looks[some][:, None] ^ looks[group][None])
        one, other = np.nonzero((bits <= distance) & (some[:, None] < group[None]))
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            yield int(some[a]), int(group[b]), int(bits[a, b])


def write_duplicates(
    lists: list[ListInfo], prints: NDArray[np.void], config: CurationConfig
) -> tuple[int, int]:
    """List what is there twice beside the list of ours, which is the last, and mark it as dropped.

    Returns:
        How many have the same bytes as another, and how many look the same.
    """
    listed = lists[-1]
    ours = sum(other.count for other in lists[:-1])
    readers = [EntryList(some.folder, some.count, 0) for some in lists]
    firsts = np.cumsum([0, *(some.count for some in lists)]).tolist()
    counts, gone = [0, 0], []
    with (listed.folder / DUPLICATES_NAME).open("wb") as file:
        for late, early, bits in find_duplicates(prints, ours, config.near_duplicates):
            which = int(np.searchsorted(firsts, early, "right")) - 1
            row = {
                "file": readers[-1].at(late - ours).name,
                "duplicate_of": readers[which].at(early - firsts[which]).name,
                "how": "same bytes" if bits < 0 else f"looks the same: {bits} of 64 bits differ",
            }
            if which < len(config.against):
                row["in"] = config.against[which]
            file.write(json.dumps(row).encode() + b"\n")
            counts[bits >= 0] += 1
            gone.append(late - ours)
    for reader in readers:
        reader.close()
    if config.duplicates == "drop":
        np.array(sorted(gone), np.uint64).tofile(listed.folder / DROPPED_NAME)
    return counts[0], counts[1]
