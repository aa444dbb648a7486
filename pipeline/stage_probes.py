"""The parts of the data path, each by itself: what reading, decoding and views cost alone.

Letters in names: N pictures.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.batch_plan import Bytes, PlannedBatch
from pipeline.data_config import DataConfig, cpu_threads
from pipeline.loader import PairLoader
from pipeline.order import Ints
from pipeline.torch_views import DecodeError, decode, normalise, view_picture
from pipeline.view_recipe import PAIRS, ViewParameters, draw_view

try:
    from pipeline import dali_views
except ImportError:  # DALI has wheels for Linux only
    dali_views = None  # type: ignore[assignment]

# Decoded pictures are held in memory while their views are timed.
DECODED_BYTES = 1 << 30


@dataclass(frozen=True)
class Probe:
    """A part of the data path: calling ``run`` once does it for ``images`` pictures."""

    run: Callable[[], Any]
    images: int


@dataclass(frozen=True)
class ResidentPictures:
    """Pictures of a batch in memory, encoded and decoded."""

    encoded: list[Bytes]
    decoded: list[Image.Image]
    size_px_N2: Ints
    sample_N: Ints


def read_probe(loader: PairLoader) -> Probe:
    """Order, bytes, checksum and header of a batch, as the reading thread does it: on one thread.

    Its steps lie half an epoch ahead of the loader's own, so that the page cache helps as little
    as it can.
    """
    steps = itertools.count(loader.order.steps_per_epoch // 2)
    images = len(loader.plan(next(steps)).pictures)
    return Probe(lambda: loader.plan(next(steps)), images)


def resident(planned: PlannedBatch) -> ResidentPictures:
    """The pictures of a batch that can be decoded, as many as may be in memory, at least one.

    Raises:
        DecodeError: if there is none.
    """
    rows: list[int] = []
    decoded: list[Image.Image] = []
    free = DECODED_BYTES
    for row, picture in enumerate(planned.pictures):
        free -= 3 * int(planned.size_px_N2[row].prod())
        if decoded and free < 0:
            break
        with suppress(DecodeError):
            decoded.append(decode(picture))
            rows.append(row)
    if not decoded:
        raise DecodeError("no picture of the first batch can be decoded")
    return ResidentPictures(
        [planned.pictures[row] for row in rows],
        decoded,
        planned.size_px_N2[rows],
        planned.places.sample[rows],
    )


def uses_dali(config: DataConfig) -> bool:
    """Whether the views of a run are made by DALI."""
    return dali_views is not None and config.engine != "torchvision"


@contextmanager
def decode_probe(
    config: DataConfig, pictures: ResidentPictures, device: torch.device
) -> Iterator[Probe]:
    """Decoding, with the run's threads."""
    encoded, threads = pictures.encoded, cpu_threads(config)
    if not uses_dali(config):
        with ThreadPoolExecutor(threads) as pool:
            yield Probe(lambda: list(pool.map(decode, encoded)), len(encoded))
        return
    inputs = [encoded]
    pipeline = dali_views.decode_graph(
        source=lambda: inputs,
        device="gpu" if device.type == "cuda" else "cpu",
        **dali_views.pipeline_arguments(len(encoded), threads, device),
    )
    pipeline.build()
    yield Probe(pipeline.run, len(encoded))


@contextmanager
def views_probe(
    config: DataConfig, pictures: ResidentPictures, device: torch.device, *, half: bool
) -> Iterator[Probe]:
    """Drawing the parameters and making both views of decoded pictures, with the run's threads."""
    recipes, epochs = PAIRS[config.views], itertools.count()
    count, threads = len(pictures.decoded), cpu_threads(config)

    def draw() -> tuple[ViewParameters, ...]:
        epoch = next(epochs)
        return tuple(
            draw_view(recipe, pictures.size_px_N2, (0, epoch, view), pictures.sample_N)
            for view, recipe in enumerate(recipes)
        )

    if not uses_dali(config):
        with ThreadPoolExecutor(threads) as pool:
            yield Probe(lambda: _torch_views(pool, pictures.decoded, draw(), config), count)
        return
    pixels: list[Any] = [np.asarray(picture) for picture in pictures.decoded]
    if device.type == "cuda":
        pixels = [torch.tensor(picture, device=device) for picture in pixels]
    given: list[list[Any]] = []  # inputs are not copied, so they must live until they were used

    def feed() -> list[Any]:
        given.append(dali_views.graph_inputs([], recipes, draw())[1:])
        del given[: -2 * dali_views.PREFETCH_BATCHES - 2]
        return given[-1]

    pipeline = dali_views.decoded_graph(
        source=feed,
        decoded_source=lambda: pixels,
        recipes=recipes,
        image_px=config.image_px,
        normalisation=(config.mean, config.std),
        device="gpu" if device.type == "cuda" else "cpu",
        half=half,
        **dali_views.pipeline_arguments(count, threads, device),
    )
    pipeline.build()
    yield Probe(pipeline.run, count)


def _torch_views(
    pool: ThreadPoolExecutor,
    decoded: list[Image.Image],
    views: tuple[ViewParameters, ...],
    config: DataConfig,
) -> list[torch.Tensor]:
    def one(row: int) -> list[Image.Image]:
        return [view_picture(decoded[row], view, row, config.image_px) for view in views]

    made = list(pool.map(one, range(len(decoded))))
    return [normalise(side, config.mean, config.std) for side in zip(*made, strict=True)]
