"""Memory and time of the search for duplicates, in a process for each number of fingerprints.

    python tests/bench/duplicates.py [FINGERPRINTS...]

10^5, 10^6 and 10^7 random fingerprints (or FINGERPRINTS), 1 % of them with the bytes of an earlier
picture and 1 % with two other bits in its perceptual hash; equal bytes alone, and with a distance
of 0 and 4 bits. Prints a JSON line for each with the seconds, what was found and the growth of the
peak memory over that of the imports.
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

import numpy as np
from numpy.typing import NDArray

from pipeline.duplicate_search import DECODED, PRINT, find_duplicates

LENGTHS, DISTANCES = (10**5, 10**6, 10**7), (-1, 0, 4)
STRETCH = 4096


def random_prints(number: int, size: int) -> NDArray[np.void]:
    """A stretch of pictures that are all different."""
    rng = np.random.default_rng(number)
    prints = np.zeros(size, PRINT)
    prints["sha256"] = rng.integers(0, 2**64, (size, 2), dtype=np.uint64)
    prints["look"] = rng.integers(0, 2**64, size, dtype=np.uint64)
    prints["state"] = DECODED
    return prints


def stretches(count: int) -> Iterator[NDArray[np.void]]:
    """All fingerprints; the first of each stretch repeat the last of one that came before."""
    for number, start in enumerate(range(0, count, STRETCH)):
        prints = random_prints(number, min(STRETCH, count - start))
        if number:
            earlier, copies = random_prints(number // 2, STRETCH), len(prints) // 100
            prints["look"][:copies] = earlier["look"][-copies:] ^ np.uint64(0b101)
            prints[copies : 2 * copies] = earlier[-2 * copies : -copies]
        yield prints


def peak_mib() -> float:
    """Of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(count: int, distance: int) -> dict[str, object]:
    """One search."""
    before, started = peak_mib(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = sum(1 for _ in find_duplicates(stretches(count), count, 0, distance, Path(folder)))
    return {
        "fingerprints": count,
        "distance_bits": distance,
        "found": found,
        "seconds": round(time.perf_counter() - started, 1),
        "memory_above_imports_mib": round(peak_mib() - before),
    }


def main() -> None:
    """Measure all lengths and distances, or those of the command line."""
    if sys.argv[1:2] == ["--one"]:
        sys.stdout.write(json.dumps(measure(int(sys.argv[2]), int(sys.argv[3]))) + "\n")
        return
    for count in [int(word) for word in sys.argv[1:]] or LENGTHS:
        for distance in DISTANCES:
            words = [sys.executable, __file__, "--one", str(count), str(distance)]
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
