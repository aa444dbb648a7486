"""Two views of each picture on the CPU: this project's loader against torchvision's.

    python tests/bench/two_views.py

Five interleaved rounds over the same pictures (full-size ones of $MOCO_TEST_DATA or
../shared/data, else synthetic 500 x 375 ones) with the moco-v2 recipe at 224 pixels. Prints a JSON
line for each side with images/s as median and range, then one with their ratio.
"""

import json
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from torchvision import transforms
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from pipeline.loader import PairLoader
from pipeline.make_shards import PackConfig, pack

ROUNDS, BATCH, BATCHES = 5, 64, 12
CORES = len(os.sched_getaffinity(0))


def picture_folder(folder: Path) -> str:
    """Fill ``folder/all`` with pictures; what they are."""
    inside = folder / "all"
    inside.mkdir(parents=True)
    pack_of_pictures = Path(os.environ.get("MOCO_TEST_DATA", ROOT.parent / "shared" / "data"))
    archive = pack_of_pictures / "imagenet_samples.tar"
    if archive.exists():
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.name.endswith(".JPEG"):
                    content = tar.extractfile(member)
                    assert content is not None
                    (inside / Path(member.name).name).write_bytes(content.read())
        return "imagenet_samples"
    rng = np.random.default_rng(0)
    for number in range(250):
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(
            inside / f"{number}.jpg", quality=90
        )
    return "synthetic"


class TwoCrops:
    """The official code's pair of random views of one picture."""

    def __init__(self) -> None:
        jitter = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
        self.view = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, scale=(0.2, 1.0)),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([self.blur], p=0.5),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    @staticmethod
    def blur(picture: Image.Image) -> Image.Image:
        """PIL's blur with a sigma from 0.1 to 2."""
        return picture.filter(ImageFilter.GaussianBlur(float(np.random.uniform(0.1, 2.0))))

    def __call__(self, picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key."""
        return self.view(picture), self.view(picture)


def timed(next_batch: Callable[[], object]) -> float:
    """Images per second of some batches, after two for warming up."""
    for _ in range(2):
        next_batch()
    started = time.perf_counter()
    for _ in range(BATCHES):
        next_batch()
    return BATCH * BATCHES / (time.perf_counter() - started)


def ours(shards: Path) -> float:
    """This project's loader, DALI with a thread for each core."""
    config = DataConfig(shards=shards, views="moco-v2", threads=CORES)
    with PairLoader(config, global_batch=BATCH, seed=0, device=torch.device("cpu")) as loader:
        return timed(lambda: next(loader))


def torchvisions(folder: Path) -> float:
    """ImageFolder and DataLoader with a worker for each core."""
    data = ImageFolder(str(folder), TwoCrops())
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=BATCH * 20)
    loader = iter(
        torch.utils.data.DataLoader(data, BATCH, sampler=sampler, num_workers=CORES, drop_last=True)
    )
    return timed(lambda: next(loader))


def main() -> None:
    """Time both in turns and print what came out."""
    with tempfile.TemporaryDirectory() as name:
        pictures, shards = Path(name, "pictures"), Path(name, "shards")
        what = picture_folder(pictures)
        pack(PackConfig(source=pictures, output=shards), Console(quiet=True))
        sides = {"mocostream": lambda: ours(shards), "torchvision": lambda: torchvisions(pictures)}
        speeds: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, measure in sides.items():
                speeds[side].append(measure())
    for side, found in speeds.items():
        line = {
            "side": side,
            "pictures": what,
            "cores": CORES,
            "images_per_second": round(statistics.median(found), 1),
            "range": [round(min(found), 1), round(max(found), 1)],
        }
        sys.stdout.write(json.dumps(line) + "\n")
    ratios = [a / b for a, b in zip(speeds["mocostream"], speeds["torchvision"], strict=True)]
    line = {"ratio": round(statistics.median(ratios), 2), "rounds": ROUNDS}
    line["range"] = [round(min(ratios), 2), round(max(ratios), 2)]  # type: ignore[assignment]
    sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
