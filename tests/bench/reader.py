"""Reading pictures alone, without decoding: this project's reader against other ways to a tar.

    python tests/bench/reader.py

2,000 pictures of 95 KB in four shards that lie in the page cache, in five interleaved rounds, one
thread. Prints a JSON line for each side with images/s as median and range. ``mocostream`` looks up
random places and checks bounds, CRC and header, as a run does; ``file reads`` checks the CRC;
``tarfile`` and ``webdataset`` go through the tars in order, which is all that they can do, and
check nothing.
"""

import io
import json
import multiprocessing
import statistics
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from pipeline.header_check import checked_picture
from pipeline.local_tar import FileTar
from pipeline.shard_format import BLOCK_BYTES, Sample, write_manifest, write_shard
from pipeline.shard_store import ShardStore
from pipeline.validate import Limits

ROUNDS, SHARDS, EACH, PICTURE_BYTES = 5, 4, 500, 95_000
READS = 20_000
HEADER_BYTES = 200  # up to the size and a little further


def write_set(folder: Path) -> list[tuple[int, int]]:
    """Four shards of noise behind a JPEG's header; the places of all samples in a random order."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.new("RGB", (500, 375)).save(buffer, "JPEG")
    header = buffer.getvalue()[:HEADER_BYTES]
    infos = []
    for shard in range(SHARDS):
        samples = (
            Sample(key=f"{shard}-{n:05d}", picture=header + noise, width=500, height=375)
            for n in range(EACH)
            for noise in [rng.bytes(PICTURE_BYTES - HEADER_BYTES)]
        )
        infos.append(write_shard(folder / f"shard-{shard:06d}.tar", samples))
    write_manifest(folder, [info for info in infos if info], (), {"program": "bench"})
    places = [(shard, n) for shard in range(SHARDS) for n in range(EACH)]
    return [places[i] for i in rng.permutation(len(places))] * (READS // len(places))


def speed(count: int, work: Callable[[], object]) -> float:
    """Images per second."""
    started = time.perf_counter()
    work()
    return count / (time.perf_counter() - started)


def checked(store: ShardStore, places: list[tuple[int, int]]) -> float:
    """Through ``checked_picture``: bounds, CRC, header."""
    limits = Limits()
    return speed(len(places), lambda: [checked_picture(store, *place, limits) for place in places])


def unchecked(store: ShardStore, places: list[tuple[int, int]]) -> float:
    """Views of the maps alone: what the checks cost is the difference."""
    tars = [store._shard(shard).tar for shard in range(SHARDS)]
    blocks = [store.records(shard)["block"].tolist() for shard in range(SHARDS)]

    def work() -> None:
        for shard, n in places:
            tar = tars[shard]
            assert tar is not None
            tar.read(blocks[shard][n] * BLOCK_BYTES, PICTURE_BYTES)

    return speed(len(places), work)


def file_reads(store: ShardStore, folder: Path, places: list[tuple[int, int]]) -> float:
    """``pread`` and CRC, as on a network mount."""
    tars = [FileTar(folder / f"shard-{shard:06d}.tar") for shard in range(SHARDS)]
    records = [store.records(shard) for shard in range(SHARDS)]

    def work() -> None:
        for shard, n in places:
            record = records[shard][n]
            data = tars[shard].read(int(record["block"]) * BLOCK_BYTES, int(record["size"]))
            assert zlib.crc32(data.data) == record["crc32"]

    return speed(len(places), work)


def with_tarfile(folder: Path) -> float:
    """The standard library, in order."""

    def work() -> None:
        for path in folder.glob("*.tar"):
            with tarfile.open(path) as tar:
                for member in tar:
                    content = tar.extractfile(member)
                    assert content is not None
                    content.read()

    return speed(SHARDS * EACH, work)


def with_webdataset(folder: Path) -> float:
    """The library, in order, without decoding or shuffling."""
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    data = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    return speed(SHARDS * EACH, lambda: sum(len(sample["jpg"]) for sample in data))


def in_process(folder: str, places: list[tuple[int, int]]) -> float:
    """One of two processes."""
    return checked(ShardStore(folder), places)


def main() -> None:
    """Time all in turns and print what came out."""
    with tempfile.TemporaryDirectory() as name, multiprocessing.get_context("spawn").Pool(2) as two:
        folder = Path(name)
        places = write_set(folder)
        store = ShardStore(folder)
        sides: dict[str, Callable[[], float]] = {
            "mocostream": lambda: checked(store, places),
            "mocostream, each of two processes at once": lambda: statistics.mean(
                two.starmap(in_process, [(name, places)] * 2, chunksize=1)
            ),
            "mocostream without checks, bytes not touched": lambda: unchecked(store, places),
            "file reads": lambda: file_reads(store, folder, places),
            "tarfile": lambda: with_tarfile(folder),
            "webdataset": lambda: with_webdataset(folder),
        }
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(ROUNDS + 1):
            for side, measure in sides.items():
                found = measure()
                if number:  # the first round fills caches
                    speeds[side].append(found)
    for side, values in speeds.items():
        line = {
            "side": side,
            "picture_bytes": PICTURE_BYTES,
            "images_per_second": round(statistics.median(values)),
            "range": [round(min(values)), round(max(values))],
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
