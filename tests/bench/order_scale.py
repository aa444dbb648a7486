"""The order of a billion samples in a hundred thousand shards: start, memory, time of a step.

    python tests/bench/order_scale.py

Each side runs in a process of its own, five rounds, interleaved. Ours: the manifest of 10^5 shards
is read, a random step of a later epoch is reached, the shards of the next 300 steps are named, and
one rank of eight draws 512 samples a step. DALI's own WebDataset reader builds over the text index
of 10^6 and 4 x 10^6 samples, all of which are one small picture of one tar: what it needs grows
with the samples, and 10^9 of them would not fit. Prints a JSON line for each side, medians and
ranges: seconds from nothing to the first step (our manifest's included), memory that order or
reader added (our manifest's is a figure of its own), milliseconds of a step.
"""

import hashlib
import io
import json
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from pipeline.order import Order
from pipeline.shard_format import parse_manifest

ROUNDS = 5
SHARDS, SHARD_SAMPLES = 100_000, 10_000
GLOBAL_BATCH, LANES, WINDOW, WORLD = 4096, 64, 131_072, 8
STEPS, AHEAD_STEPS = 200, 300
DALI_SAMPLES = (1_000_000, 4_000_000)


def resident_mib() -> float:
    """Memory of this process that lies in RAM."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) / 1024


def measure_order(manifest: Path) -> dict[str, float]:
    """Start, memory and step of our order, in this process."""
    empty_mib, start = resident_mib(), time.perf_counter()
    shards = parse_manifest(manifest.read_bytes(), str(manifest)).shards
    shard_samples = np.array([shard.samples for shard in shards], dtype=np.int64)
    manifest_s = time.perf_counter() - start

    before_mib = resident_mib()
    order = Order(shard_samples, GLOBAL_BATCH, 0, LANES, WINDOW)
    step = random.SystemRandom().randrange(3 * order.steps_per_epoch)
    order.batch(step, 3, WORLD)
    start_s = time.perf_counter() - start

    ahead_start = time.perf_counter()
    order.shards_ahead(step, AHEAD_STEPS, 3, WORLD)
    ahead_ms = 1e3 * (time.perf_counter() - ahead_start)
    step_start = time.perf_counter()
    for ahead in range(STEPS):
        order.batch(step + ahead, 3, WORLD)
    step_ms = 1e3 * (time.perf_counter() - step_start) / STEPS
    return {
        "start_seconds": start_s,
        "manifest_seconds": manifest_s,
        "manifest_mib": before_mib - empty_mib,
        "rss_mib": resident_mib() - before_mib,
        "look_ahead_ms": ahead_ms,
        "step_ms": step_ms,
    }


def measure_dali(tar: Path, index: Path) -> dict[str, float]:
    """Start, memory and batch of DALI's reader over an index, in this process."""
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=GLOBAL_BATCH // WORLD, num_threads=1, device_id=None)
    def graph() -> object:
        return fn.readers.webdataset(
            paths=[str(tar)],
            index_paths=[str(index)],
            ext=["jpg"],
            random_shuffle=True,
            num_shards=WORLD,
            shard_id=3,
        )

    before_mib, start = resident_mib(), time.perf_counter()
    pipeline = graph()
    pipeline.build()
    pipeline.run()
    start_s, rss_mib = time.perf_counter() - start, resident_mib() - before_mib
    step_start = time.perf_counter()
    for _ in range(STEPS):
        pipeline.run()
    step_ms = 1e3 * (time.perf_counter() - step_start) / STEPS
    return {"start_seconds": start_s, "rss_mib": rss_mib, "step_ms": step_ms}


def write_manifest(path: Path) -> None:
    """A manifest of the full size; no shard of it exists."""
    shards = [
        {
            "name": f"shard-{number:06d}.tar",
            "samples": SHARD_SAMPLES,
            "bytes": 10**9,
            "sha256": hashlib.sha256(b"%d" % number).hexdigest(),
            "index_sha256": hashlib.sha256(b"i%d" % number).hexdigest(),
        }
        for number in range(SHARDS)
    ]
    content = {"version": 1, "classes": [], "made_by": {}, "shards": shards}
    path.write_text(json.dumps(content))


def write_small_tar(folder: Path) -> Path:
    """A tar with one picture of one pixel, and for each count an index that names it so often."""
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "JPEG")
    member = tarfile.TarInfo("0000000000000000.jpg")
    member.size = picture.tell()
    path = folder / "one.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(member, io.BytesIO(picture.getvalue()))
    for count in DALI_SAMPLES:
        line = f"jpg {tarfile.BLOCKSIZE} {member.size} {member.name}\n"
        (folder / f"{count}.idx").write_text(f"v1.2 {count}\n" + line * count)
    return path


def summary(results: list[dict[str, float]]) -> dict[str, object]:
    """Median and range of each figure."""
    line: dict[str, object] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        line[name] = round(statistics.median(values), 4)
        line[f"{name}_range"] = [round(min(values), 4), round(max(values), 4)]
    return line


def main() -> None:
    """All sides, one after the other, in every round."""
    if len(sys.argv) > 1:  # one side, in the process that main started for it
        side, *paths = sys.argv[1:]
        measure = measure_order if side == "order" else measure_dali
        sys.stdout.write(json.dumps(measure(*map(Path, paths))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_manifest(folder / "manifest.json")
        tar = write_small_tar(folder)
        sides = {("mocostream", SHARDS * SHARD_SAMPLES): ["order", str(folder / "manifest.json")]}
        for count in DALI_SAMPLES:
            sides["dali", count] = ["dali", str(tar), str(folder / f"{count}.idx")]
        results: dict[tuple[str, int], list[dict[str, float]]] = {side: [] for side in sides}
        progress = Console(stderr=True)
        for number in range(ROUNDS):
            progress.print(f"round {number + 1} of {ROUNDS}")
            for side, arguments in sides.items():
                done = subprocess.run(
                    [sys.executable, __file__, *arguments],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                results[side].append(json.loads(done.stdout))
        for (reader, samples), measured in results.items():
            line = {"reader": reader, "samples": samples, **summary(measured)}
            sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
