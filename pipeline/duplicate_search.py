"""Which of many pictures are there twice, in memory that does not grow with their number.

Fingerprints are spread over files by what they are compared by, so that those that can be equal lie
in one file and a file fits in memory; what is found is spread again by the place of the later
picture, and judged in that order. Memory holds one file (about 2^20 rows) and one bit for each
picture; the disk, for a while, 24 bytes a picture, with looks 40 and 16 more for each bit of the
distance. One file is larger where very many pictures are the same.

Hashes that differ in at most ``distance`` bits agree in one of ``distance + 1`` bands of bits at
least, so only those that share a band are compared (Norouzi et al. 2012, section 2). The time for
that grows with the square of the number divided by 2^(64 / (distance + 1)).
"""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.integer_hash import mix

PRINT = np.dtype([("sha256", "<u8", 2), ("look", "<u8"), ("state", "u1")])
UNREAD, UNDECODED, DECODED = 0, 1, 2
ROWS_AT_ONCE = 1 << 20
PAIRS_AT_ONCE = 1 << 22
FILES = 512  # at most, of one kind

_BYTES = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<i8")])
_LOOK = np.dtype([("look", "<u8"), ("place", "<i8")])
_NEAR = np.dtype([("look", "<u8"), ("early", "<i8"), ("bits", "<i8")])
_PAIR = np.dtype([("late", "<i8"), ("early", "<i8"), ("bits", "<i8")])
Rows = NDArray[np.void]


class _Spread:
    """Rows in files of their own for each value of a small number."""

    def __init__(self, folder: Path, name: str, kind: np.dtype[np.void], files: int) -> None:
        self._kind = kind
        self._paths = [folder / f"{name}-{number:04d}" for number in range(files)]

    def add(self, rows: Rows, file: NDArray[np.integer]) -> None:
        """Append rows, each to the file of its number."""
        order = np.argsort(file, kind="stable")
        rows, file = rows[order], file[order]
        starts = np.flatnonzero(np.r_[True, file[1:] != file[:-1]][: len(file)])
        for start, end in itertools.pairwise([*starts.tolist(), len(file)]):
            with self._paths[int(file[start])].open("ab") as appended:
                rows[start:end].tofile(appended)

    def take(self, number: int) -> Rows:
        """The rows of one file, in the order in which they came; the file is gone then."""
        path = self._paths[number]
        if not path.exists():
            return np.zeros(0, self._kind)
        rows = np.fromfile(path, self._kind)
        path.unlink()
        return rows


def find_duplicates(
    prints: Iterable[Rows], count: int, ours: int, distance: int, folder: Path
) -> Iterator[tuple[int, int, int]]:
    """Which of our pictures are duplicates, of which one, and in how many bits they differ.

    Args:
        prints: stretches of ``PRINT``, of the other sources first, then of ours, in the order of
            the lists.
        count: of all of them.
        ours: the place of our first one.
        distance: most bits of the perceptual hash; -1: the bytes alone.
        folder: for files while it runs.

    Yields:
        Places of the duplicate and of the original; bits, or -1 for equal bytes. In order; an
        original is no duplicate itself.
    """
    files = min(FILES, 1 + count // ROWS_AT_ONCE)
    by_bytes = _Spread(folder, "bytes", _BYTES, files)
    by_look = _Spread(folder, "looks", _LOOK, files)
    pairs = _Spread(folder, "pairs", _PAIR, files)
    start = 0
    for stretch in prints:
        places = np.arange(start, start + len(stretch))
        start += len(stretch)
        read = stretch["state"] != UNREAD
        high, low = stretch["sha256"][read].T
        rows = _rows(_BYTES, high=high, low=low, place=places[read])
        by_bytes.add(rows, high % np.uint64(files))
        if distance >= 0:
            seen = stretch["state"] == DECODED
            rows = _rows(_LOOK, look=stretch["look"][seen], place=places[seen])
            by_look.add(rows, _file_of(rows["look"], files))
    for number in range(files):
        _add_pairs(pairs, _equal_bytes(by_bytes.take(number)), count, files)
    if distance >= 0:
        for found in _equal_looks(by_look, files, distance, folder):
            _add_pairs(pairs, found, count, files)
    yield from _judged(pairs, files, count, ours)


def _rows(kind: np.dtype[np.void], **columns: NDArray[np.generic] | int) -> Rows:
    rows = np.empty(next(np.size(column) for column in columns.values()), kind)
    for name, column in columns.items():
        rows[name] = column
    return rows


def _file_of(keys: NDArray[np.uint64], files: int) -> NDArray[np.uint64]:
    return mix(keys) % np.uint64(files)


def _add_pairs(pairs: _Spread, found: Rows, count: int, files: int) -> None:
    pairs.add(found, found["late"] * files // count)


def _judged(pairs: _Spread, files: int, count: int, ours: int) -> Iterator[tuple[int, int, int]]:
    gone = bytearray(count // 8 + 1)
    for number in range(files):
        found = pairs.take(number)
        order = np.lexsort((found["bits"], found["early"], found["late"]))
        for late, early, bits in found[order].tolist():
            is_gone = gone[late >> 3] >> (late & 7) & 1 or gone[early >> 3] >> (early & 7) & 1
            if late >= ours and not is_gone:
                gone[late >> 3] |= 1 << (late & 7)
                yield late, early, bits


def _equal_bytes(rows: Rows) -> Rows:
    """Each picture with the first of the same bytes."""
    rows = rows[np.lexsort((rows["place"], rows["low"], rows["high"]))]
    high, low, place = rows["high"], rows["low"], rows["place"]
    starts = np.r_[True, (high[1:] != high[:-1]) | (low[1:] != low[:-1])][: len(rows)]
    first = place[starts][np.cumsum(starts) - 1]
    again = first != place
    return _rows(_PAIR, late=place[again], early=first[again], bits=-1)


def _equal_looks(by_look: _Spread, files: int, distance: int, folder: Path) -> Iterator[Rows]:
    """Enough of the pairs whose hashes differ in at most ``distance`` bits.

    Of pictures with one hash, each is paired with the first. That one stands for all of them where
    their hash is near to another: the first of either hash is the original of all others of both.
    """
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64).tolist()
    bands = [(np.uint64(a), np.uint64((1 << (b - a)) - 1)) for a, b in itertools.pairwise(edges)]
    by_band = [_Spread(folder, f"band{n}", _LOOK, files) for n in range(len(bands))]
    members = _Spread(folder, "members", _LOOK, files)
    near = _Spread(folder, "near", _NEAR, files)
    for number in range(files):
        rows = by_look.take(number)
        rows = rows[np.lexsort((rows["place"], rows["look"]))]
        members.add(rows, np.full(len(rows), number))
        looks, starts = np.unique(rows["look"], return_index=True)
        first = rows["place"][starts]
        same = np.repeat(first, np.diff(np.r_[starts, len(rows)]))
        again = same != rows["place"]
        yield _rows(_PAIR, late=rows["place"][again], early=same[again], bits=0)
        unique = _rows(_LOOK, look=looks, place=first)
        for (shift, mask), spread in zip(bands, by_band, strict=True):
            spread.add(unique, _file_of(looks >> shift & mask, files))
    for band, spread in enumerate(by_band):
        for number in range(files):
            for one, other, bits in _near_in(spread.take(number), bands, band, distance):
                early = np.minimum(one["place"], other["place"])
                for looks in (one["look"], other["look"]):
                    rows = _rows(_NEAR, look=looks, early=early, bits=bits)
                    near.add(rows, _file_of(looks, files))
    for number in range(files):
        yield from _with_members(near.take(number), members.take(number))


def _near_in(
    rows: Rows, bands: list[tuple[np.uint64, np.uint64]], band: int, distance: int
) -> Iterator[tuple[Rows, Rows, NDArray[np.int64]]]:
    """Pairs of different hashes that share this band and none before it, and their distance."""
    shift, mask = bands[band]
    values = rows["look"] >> shift & mask
    order = np.argsort(values, kind="stable")
    rows, values = rows[order], values[order]
    edges = np.flatnonzero(np.r_[True, values[1:] != values[:-1], True][: len(rows) + 1])
    several = np.flatnonzero(np.diff(edges) > 1)
    for start, end in zip(edges[several].tolist(), edges[several + 1].tolist(), strict=True):
        group = rows[start:end]
        at_once = max(1, PAIRS_AT_ONCE // len(group))
        for first in range(0, len(group) - 1, at_once):
            some, rest = group[first : first + at_once], group[first + 1 :]
            differ = some["look"][:, None] ^ rest["look"][None]
            is_near = np.triu(np.bitwise_count(differ) <= distance)
            for earlier, other in bands[:band]:
                is_near &= (differ >> earlier & other) != 0  # found there
            one, two = np.nonzero(is_near)
            if len(one):
                bits = np.bitwise_count(differ[one, two]).astype(np.int64)
                yield some[one], rest[two], bits


def _with_members(near: Rows, members: Rows) -> Iterator[Rows]:
    """All pictures of a hash that is near to another, with the first of both."""
    starts = np.searchsorted(members["look"], near["look"], "left")
    ends = np.searchsorted(members["look"], near["look"], "right")
    sums = np.cumsum(ends - starts)
    cuts = np.searchsorted(sums, np.arange(0, sums[-1] if len(sums) else 0, PAIRS_AT_ONCE))
    for first, last in itertools.pairwise([*np.unique(cuts).tolist(), len(near)]):
        counts = ends[first:last] - starts[first:last]
        row = np.repeat(np.arange(first, last), counts)
        within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        late, early = members["place"][starts[row] + within], near["early"][row]
        is_late = late > early
        bits = near["bits"][row][is_late]
        yield _rows(_PAIR, late=late[is_late], early=early[is_late], bits=bits)
