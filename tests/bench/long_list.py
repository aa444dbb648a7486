"""Memory and time of listing, shuffling and planning a long list, in a process for each length.

    python tests/bench/long_list.py [ENTRIES...]

For 10^5, 10^6 and 10^7 entries (or ENTRIES): a list is written as make_shards does it, the entries
of the first and of the middle shard are read back in the shuffled order. Prints a JSON line for
each with the seconds and the growth of the peak memory over that of the imports.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from pipeline.entry_list import Entry, EntryList, write_list

LENGTHS = (10**5, 10**6, 10**7)
SHARD_SAMPLES = 10_000


def entries_of(count: int) -> Iterator[Entry]:
    """Pictures in a thousand classes, each name 30 characters long."""
    for number in range(count):
        label = f"n{number % 1000:08d}"
        yield Entry(f"{label}/{label}_{number:010d}.JPEG", "", 107_000, label)


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int) -> dict[str, object]:
    """One length."""
    before = peak_mib()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        listed = write_list(folder, entries_of(count))
        written = time.perf_counter()
        entries = EntryList(folder, count, seed=0)
        for first in (0, count // 2):
            found = list(entries.read(first, first + SHARD_SAMPLES))
            assert len({key for key, _ in found}) == SHARD_SAMPLES
        read = time.perf_counter()
        size = sum(path.stat().st_size for path in folder.iterdir())
    return {
        "entries": count,
        "classes": len(listed.classes),
        "list_s": round(written - started, 2),
        "read_two_shards_s": round(read - written, 2),
        "memory_growth_mib": round(peak_mib() - before, 1),
        "on_disk_mib": round(size / 2**20, 1),
    }


def main() -> None:
    """Measure each length in a process of its own."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(measure(int(sys.argv[2]))) + "\n")
        return
    for count in map(int, sys.argv[1:] or LENGTHS):
        subprocess.run([sys.executable, __file__, "--one", str(count)], check=True)


if __name__ == "__main__":
    main()
