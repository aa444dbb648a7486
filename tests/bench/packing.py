"""Packing pictures: this project's packer against others that write the same files.

    python tests/bench/packing.py [PICTURES]

The ImageNet samples of the test data, repeated under distinct names to 5,000 files (or PICTURES) in
the page cache, in five interleaved rounds on two processes where a side can use two; then 100,000
pictures of CIFAR-10. Prints a JSON line for each side: images/s and MB/s as median and range, and
its time over GNU tar's.

``mocostream`` decodes every picture; ``mocostream --no-validate`` looks at headers only; both check
sums, write the index, fsync and rename, and start their processes within the time measured, in a
new program for each round. ``make_shards --no-validate`` is the whole program, with its own start
and imports. GNU tar, ShardWriter and MDSWriter do nothing of that; ``GNU tar, synced`` waits for
the disk as well. ``decoding alone`` is the limit of the validating side: the same decoder in two
processes, with the bytes in memory.
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


def write_small_pictures(folder: Path, _: int) -> int:
    """Fill a folder with CIFAR-10's training pictures, twice; their bytes in all."""
    size = 0
    with tarfile.open(DATA / "cifar10.tar.gz") as tar:
        for member in tar:
            if "/train/" not in member.name or not member.name.endswith(".jpg"):
                continue
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            path = folder / member.name.split("/")[-2] / Path(member.name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            path.with_name(f"again{path.name}").write_bytes(data)
            size += 2 * len(data)
    return size


def pictures_of(source: Path) -> list[tuple[str, Path, int]]:
    """Key, file and label of every picture."""
    folders = sorted(source.iterdir())
    return [
        (f"{folder.name}/{path.stem}", path, label)
        for label, folder in enumerate(folders)
        for path in sorted(folder.iterdir())
    ]


def mocostream(source: Path, output: Path, *, validate: bool) -> float:
    """Seconds of this project's packer in a new program that has imported it."""
    words = [sys.executable, __file__, "--pack", source, output, *(["validate"] * validate)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def pack_here(source: str, output: str, *validate: str) -> None:
    """Pack and print the seconds that it took."""
    form = StoredForm(validate=bool(validate))
    sizes = {"workers": PROCESSES, "shard_mib": SHARD_MIB}
    config = PackConfig(source=source, output=Path(output), form=form, **sizes)
    started = time.perf_counter()
    pack(config, Console(file=io.StringIO()))
    sys.stdout.write(str(time.perf_counter() - started))


def make_shards(source: Path, output: Path) -> None:
    """The program."""
    flags = f"--no-validate --workers {PROCESSES} --shard-mib {SHARD_MIB}".split()
    program = ROOT / "pipeline" / "make_shards.py"
    words = [sys.executable, program, source, output, *flags]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


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


def sides_of(source: Path) -> dict[str, Callable[[Path], float | None]]:
    """What is timed, unless it gives its seconds itself; MDSWriter only where it is installed."""
    sides: dict[str, Callable[[Path], float | None]] = {
        "GNU tar": lambda output: gnu_tar(source, output, synced=False),
        "GNU tar, synced": lambda output: gnu_tar(source, output, synced=True),
        "mocostream --no-validate": lambda output: mocostream(source, output, validate=False),
        "make_shards --no-validate": lambda output: make_shards(source, output),
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
                own = work(output)
                if number:
                    seconds[side].append(own or time.perf_counter() - started)
                shutil.rmtree(output)
                os.sync()
            if number:
                seconds["decoding alone"].append(max(pool.map(decode_all, halves, chunksize=1)))
    return seconds


def main() -> None:
    """Time all in turns and print what came out."""
    if sys.argv[1:2] == ["--pack"]:
        pack_here(*sys.argv[2:])
        return
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 5_000
    compare("imagenet_samples.tar", write_pictures, count)
    compare("cifar10.tar.gz", write_small_pictures, 100_000)


def compare(pack_of_data: str, write: Callable[[Path, int], int], count: int) -> None:
    """Time all sides on one kind of pictures."""
    if not (DATA / pack_of_data).exists():
        tell({"skipped": f"no {pack_of_data} in {DATA}: set MOCO_TEST_DATA"})
        return
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "pictures"
        source.mkdir()
        size = write(source, count)
        seconds = measured(source, Path(name))
    for side, values in seconds.items():
        speeds = sorted(count / value for value in values)
        shares = {}
        for other in ("GNU tar", "GNU tar, synced", "decoding alone"):
            ratios = [mine / theirs for mine, theirs in zip(values, seconds[other], strict=True)]
            shares[f"time over {other}"] = round(statistics.median(ratios), 2)
        tell(
            {
                "pictures": f"{count} of {pack_of_data}",
                "side": side,
                "images_per_second": round(statistics.median(speeds)),
                "range": [round(speeds[0]), round(speeds[-1])],
                "mb_per_second": round(statistics.median(speeds) * size / count / 1e6),
                **shares,
            }
        )


if __name__ == "__main__":
    main()
