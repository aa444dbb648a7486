"""Packing full-size photographs: this project's packer against others that write the same files.

    python tests/bench/packing.py [PICTURES]

The ImageNet samples of the test data, repeated under distinct names to 5,000 files (or PICTURES) in
the page cache, in five interleaved rounds on two processes where a side can use two. Prints a JSON
line for each side: images/s and MB/s as median and range, and GNU tar's time over the side's own.

``mocostream`` decodes every picture; ``mocostream --no-validate`` looks at headers only; both check
sums, write the index, fsync and rename, and start their processes within the time measured. GNU
tar, ShardWriter and MDSWriter do nothing of that; ``GNU tar, synced`` waits for the disk as well.
``decoding alone`` is the limit of the validating side: the same decoder in two processes, with
the bytes in memory.
"""

import importlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import simplejpeg
import webdataset
from rich.console import Console

from pipeline.make_shards import pack
from pipeline.pack_config import PackConfig
from pipeline.validate import StoredForm

# Shards that two processes can share out evenly: 8 of them; at 256 MiB one would pack two of three.
ROUNDS, PROCESSES, SHARD_MIB = 5, 2, 70
DATA = Path(os.environ.get("MOCO_TEST_DATA", ROOT.parent / "shared" / "data"))


def write_pictures(folder: Path, count: int) -> int:
    """Fill a folder with ``count`` files in classes of 250; their bytes in all."""
    with tarfile.open(DATA / "imagenet_samples.tar") as tar:
        members = [member for member in tar if member.name.endswith(".JPEG")]
        pictures = [(Path(m.name).name, tar.extractfile(m).read()) for m in members]  # type: ignore[union-attr]
    size = 0
    for number in range(count):
        name, data = pictures[number % len(pictures)]
        path = folder / f"class{number // len(pictures):03d}" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        size += len(data)
    return size


def pictures_of(source: Path) -> list[tuple[str, Path, int]]:
    """Key, file and label of every picture."""
    folders = sorted(source.iterdir())
    return [
        (f"{folder.name}/{path.stem}", path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
    ]


def mocostream(source: Path, output: Path, *, validate: bool) -> None:
    """This project's packer, as ``make_shards`` runs it."""
    form = StoredForm(validate=validate)
    config = PackConfig(
        source=str(source), output=output, workers=PROCESSES, shard_mib=SHARD_MIB, form=form
    )
    pack(config, Console(file=io.StringIO()))


def gnu_tar(source: Path, output: Path, *, synced: bool) -> None:
    """One archive; an extra fsync where the disk shall have it."""
    output.mkdir()
    subprocess.run(["tar", "-cf", output / "all.tar", "-C", source, "."], check=True)
    if synced:
        with (output / "all.tar").open("rb") as file:
            os.fsync(file.fileno())


def shard_writer(source: Path, output: Path) -> None:
    """The webdataset library, given the files' bytes and labels."""
    output.mkdir()
    pattern = str(output / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_MIB << 20, verbose=0) as writer:
        for key, path, label in pictures_of(source):
            writer.write({"__key__": key, "jpg": path.read_bytes(), "cls": label})


def mds_writer(streaming: Any) -> Callable[[Path, Path], None]:
    """MosaicML's format, with the columns as they come."""

    def write(source: Path, output: Path) -> None:
        columns = {"jpg": "bytes", "cls": "int"}
        with streaming.MDSWriter(
            out=str(output), columns=columns, size_limit=SHARD_MIB << 20
        ) as writer:
            for _, path, label in pictures_of(source):
                writer.write({"jpg": path.read_bytes(), "cls": label})

    return write


def decode_all(paths: list[Path]) -> float:
    """Seconds to decode files whose bytes are in memory."""
    pictures = [path.read_bytes() for path in paths]
    started = time.perf_counter()
    for data in pictures:
        simplejpeg.decode_jpeg(data)
    return time.perf_counter() - started


def sides_of(source: Path) -> dict[str, Callable[[Path], None]]:
    """What is timed; MDSWriter only where it is installed."""
    sides: dict[str, Callable[[Path], None]] = {
        "GNU tar": lambda output: gnu_tar(source, output, synced=False),
        "GNU tar, synced": lambda output: gnu_tar(source, output, synced=True),
        "mocostream --no-validate": lambda output: mocostream(source, output, validate=False),
        "mocostream": lambda output: mocostream(source, output, validate=True),
        "webdataset ShardWriter": lambda output: shard_writer(source, output),
    }
    try:
        write = mds_writer(importlib.import_module("streaming"))
        sides["mosaicml-streaming MDSWriter"] = lambda output: write(source, output)
    except ImportError:
        tell({"side": "mosaicml-streaming MDSWriter", "skipped": "not installed"})
    return sides


def tell(line: dict[str, object]) -> None:
    """One JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")


def measured(source: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds of each side in each round, the first round left out."""
    sides = sides_of(source)
    pictures = [path for _, path, _ in pictures_of(source)]
    halves = [pictures[start::PROCESSES] for start in range(PROCESSES)]
    seconds: dict[str, list[float]] = {side: [] for side in (*sides, "decoding alone")}
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        for number in range(ROUNDS + 1):
            for side, work in sides.items():
                output = folder / "output"
                started = time.perf_counter()
                work(output)
                if number:
                    seconds[side].append(time.perf_counter() - started)
                shutil.rmtree(output)
                os.sync()
            if number:
                seconds["decoding alone"].append(max(pool.map(decode_all, halves, chunksize=1)))
    return seconds


def main() -> None:
    """Time all in turns and print what came out."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    if not (DATA / "imagenet_samples.tar").exists():
        tell({"skipped": f"no imagenet_samples.tar in {DATA}: set MOCO_TEST_DATA"})
        return
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "pictures"
        source.mkdir()
        size = write_pictures(source, count)
        seconds = measured(source, Path(name))
    for side, values in seconds.items():
        speeds = sorted(count / value for value in values)
        shares = {}
        for other in ("GNU tar", "GNU tar, synced", "decoding alone"):
            ratios = [mine / theirs for mine, theirs in zip(values, seconds[other], strict=True)]
            shares[f"time over {other}"] = round(statistics.median(ratios), 2)
        tell(
            {
                "side": side,
                "pictures": count,
                "images_per_second": round(statistics.median(speeds)),
                "range": [round(speeds[0]), round(speeds[-1])],
                "mb_per_second": round(statistics.median(speeds) * size / count / 1e6),
                **shares,
            }
        )


if __name__ == "__main__":
    main()
