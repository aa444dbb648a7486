"""Pictures that are there twice: byte by byte (SHA-256), or to the eye (a perceptual hash).

One more pass over the sources before packing, in parallel, gives each picture 25 bytes of
fingerprint on the disk, where ``pipeline/duplicate_search.py`` compares them. A picture is a
duplicate of an earlier one of the list that is kept itself, or of one in another source that it is
compared with (training against test pictures).

The perceptual hash is imagehash's ``phash``: the signs of the 8 x 8 lowest frequencies against
their median. Copies in another size or quality differ in 0 to 4 of its 64 bits, different photos in
about 32. Pictures of one colour all look the same to it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imagehash
import numpy as np
from numpy.typing import NDArray

from pipeline.duplicate_search import DECODED, PRINT, UNDECODED, find_duplicates
from pipeline.entry_list import DROPPED_NAME, EntryList, ListInfo, Numbers
from pipeline.packing import read_picture
from pipeline.program import InputError
from pipeline.shard_format import atomic_file
from pipeline.validate import Limits, RefusedError, decode_grey
from pipeline.worker_pool import advance

ENTRIES_A_JOB = 4096
LARGEST_DISTANCE = 8
HASH_SIDE_PX = 128  # of the decoded picture; the hash itself works on 32
DUPLICATES_NAME = "duplicates.jsonl"


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
    folder: Path
    """Where the fingerprints are kept; a packing that goes on and other parts find them there."""

    @property
    def path(self) -> Path:
        """The file, named after all that its content depends on."""
        depends_on = f"{self.listed.sha256} {self.limits} {self.look}"
        digits = hashlib.sha256(depends_on.encode()).hexdigest()[:16]
        return self.folder / f"prints-{digits}-{self.first:012d}.npy"


def print_jobs(listed: ListInfo, limits: Limits, folder: Path, *, look: bool) -> list[PrintJob]:
    """The stretches of a list."""
    firsts = range(0, listed.count, ENTRIES_A_JOB)
    return [
        PrintJob(listed, first, min(first + ENTRIES_A_JOB, listed.count), limits, look, folder)
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


def read_prints(jobs: list[PrintJob]) -> Iterator[NDArray[np.void]]:
    """The fingerprints of lists, stretch by stretch."""
    for job in jobs:
        yield np.load(job.path, allow_pickle=False)


def write_duplicates(
    lists: list[ListInfo], prints: Iterator[NDArray[np.void]], config: CurationConfig
) -> tuple[int, int]:
    """List what is there twice beside the list of ours, which is the last, and mark it as dropped.

    Returns:
        How many have the same bytes as another, and how many look the same.
    """
    listed = lists[-1]
    ours = sum(other.count for other in lists[:-1])
    readers = [EntryList(some.folder, some.count, 0) for some in lists]
    firsts = np.cumsum([0, *(some.count for some in lists)]).tolist()
    counts = [0, 0]
    folder = listed.folder / "search"
    folder.mkdir()
    found = find_duplicates(prints, firsts[-1], ours, config.near_duplicates, folder)
    gone = listed.folder / (DROPPED_NAME if config.duplicates == "drop" else "reported")
    with (
        (listed.folder / DUPLICATES_NAME).open("wb") as file,
        contextlib.closing(Numbers(gone)) as numbers,
    ):
        for late, early, bits in found:
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
            numbers.add(late - ours)
    for reader in readers:
        reader.close()
    return counts[0], counts[1]
