"""Two views of each picture on the CPU: this project's loaders, torchvision's and DALI's own.

    python tests/bench/two_views.py

Five interleaved rounds over the same pictures (full-size ones of $MOCO_TEST_DATA or
../shared/data, else synthetic 500 x 375 ones) with the moco-v2 recipe at 224 pixels. Prints a JSON
line for each side with images/s as median and range, then one with the ratio of ours to each other.

DALI's side reads the same shards with its own reader and draws with its own operators: one decode
for both views, colour and grey in one ``color_twist``, colour and blur only where they were drawn.
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
from typing import Any, Literal

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image, ImageFilter
from rich.console import Console
from torchvision import transforms
from torchvision.datasets import ImageFolder

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from pipeline.loader import PairLoader
from pipeline.make_shards import pack
from pipeline.pack_config import PackConfig

ROUNDS, BATCH, BATCHES = 5, 64, 20
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


def ours(shards: Path, engine: Literal["kernels", "dali"]) -> float:
    """This project's loader with a thread for each core."""
    config = DataConfig(shards=str(shards), views="moco-v2", threads=CORES, engine=engine)
    with PairLoader(config, global_batch=BATCH, seed=0, device=torch.device("cpu")) as loader:
        return timed(lambda: next(loader))


def torchvisions(folder: Path) -> float:
    """ImageFolder and DataLoader with a worker for each core."""
    data = ImageFolder(str(folder), TwoCrops())
    sampler = torch.utils.data.RandomSampler(
        data, replacement=True, num_samples=BATCH * (BATCHES + 2 + 2 * CORES)
    )
    loader = iter(
        torch.utils.data.DataLoader(data, BATCH, sampler=sampler, num_workers=CORES, drop_last=True)
    )
    return timed(lambda: next(loader))


def coin(probability: float) -> Any:
    """True in this share of the samples."""
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def dali_view(pictures: Any) -> Any:
    """One moco-v2 view of decoded pictures with DALI's random operators."""
    view = fn.random_resized_crop(pictures, size=224, random_area=(0.2, 1.0))
    jitter, grey = coin(0.8), coin(0.2)
    if jitter or grey:
        brightness, contrast, saturation = (
            fn.random.uniform(range=(-0.4, 0.4)) * jitter + 1 for _ in range(3)
        )
        view = fn.color_twist(
            view,
            brightness=brightness,
            contrast=contrast,
            # Grey costs nothing here: it is no saturation.
            saturation=saturation * (1 - grey),
            hue=fn.random.uniform(range=(-36.0, 36.0)) * jitter,
        )
    if coin(0.5):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
    return fn.crop_mirror_normalize(
        view,
        mean=[255 * v for v in IMAGENET_MEAN],
        std=[255 * v for v in IMAGENET_STD],
        mirror=fn.random.coin_flip(),
        dtype=types.FLOAT,
    )


@pipeline_def(enable_conditionals=True)
def dali_graph(tars: list[str]) -> tuple[Any, Any]:
    """Query and key views of the pictures in shards."""
    encoded = fn.readers.webdataset(paths=tars, ext=["jpg"], random_shuffle=True, initial_fill=128)
    pictures = fn.decoders.image(encoded, adjust_orientation=False, jpeg_fancy_upsampling=True)
    return dali_view(pictures), dali_view(pictures)


def dalis(shards: Path) -> float:
    """DALI's own reader and operators with a thread for each core."""
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    pipeline = dali_graph(tars, batch_size=BATCH, num_threads=CORES, device_id=None, seed=0)
    pipeline.build()
    return timed(lambda: [torch.from_dlpack(output.as_tensor()) for output in pipeline.run()])


def main() -> None:
    """Time all in turns and print what came out."""
    with tempfile.TemporaryDirectory() as name:
        pictures, shards = Path(name, "pictures"), Path(name, "shards")
        what = picture_folder(pictures)
        pack(PackConfig(source=str(pictures), output=shards), Console(quiet=True))
        sides = {
            "mocostream": lambda: ours(shards, "kernels"),
            "mocostream, engine dali": lambda: ours(shards, "dali"),
            "torchvision": lambda: torchvisions(pictures),
            "dali": lambda: dalis(shards),
        }
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
    for side in list(sides)[1:]:
        ratios = [a / b for a, b in zip(speeds["mocostream"], speeds[side], strict=True)]
        line = {"against": side, "rounds": ROUNDS, "ratio": round(statistics.median(ratios), 2)}
        line["range"] = [round(min(ratios), 2), round(max(ratios), 2)]  # type: ignore[assignment]
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
