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
from pipeline.engines import engine_for
from pipeline.kernel_views import Floats, decoded_rgb, fill_row, kernel_inputs, level_tables
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
    decoded: list[Bytes]
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
    decoded: list[Bytes] = []
    free = DECODED_BYTES
    for row, picture in enumerate(planned.pictures):
        free -= 3 * int(planned.size_px_N2[row].prod())
        if decoded and free < 0:
            break
        with suppress(DecodeError):
            decoded.append(np.array(decode(picture)))  # writable, as the kernels want it
            rows.append(row)
    if not decoded:
        raise DecodeError("no picture of the first batch can be decoded")
    return ResidentPictures(
        [planned.pictures[row] for row in rows],
        decoded,
        planned.size_px_N2[rows],
        planned.places.sample[rows],
    )


def engine_of(config: DataConfig, device: torch.device) -> str:
    """What makes the views of a run: ``dali``, ``kernels`` or ``torchvision``."""
    return engine_for(device) if config.engine == "auto" else config.engine


@contextmanager
def decode_probe(
    config: DataConfig, pictures: ResidentPictures, device: torch.device
) -> Iterator[Probe]:
    """Decoding, with the run's engine and threads."""
    encoded, threads = pictures.encoded, cpu_threads(config)
    engine = engine_of(config, device)
    if engine != "dali":
        one: Callable[[Bytes], Any] = decoded_rgb if engine == "kernels" else decode
        with ThreadPoolExecutor(threads) as pool:
            yield Probe(lambda: [None for _ in pool.map(one, encoded)], len(encoded))
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
    """Drawing the parameters and making both views of decoded pictures, with engine and threads."""
    epochs = itertools.count()

    def draw() -> tuple[ViewParameters, ...]:
        epoch = next(epochs)
        return tuple(
            draw_view(recipe, pictures.size_px_N2, (0, epoch, view), pictures.sample_N)
            for view, recipe in enumerate(PAIRS[config.views])
        )

    engine = engine_of(config, device)
    if engine == "dali":
        yield _dali_views(config, pictures, device, draw, half=half)
        return
    count = len(pictures.decoded)
    with ThreadPoolExecutor(cpu_threads(config)) as pool:
        if engine == "kernels":
            yield Probe(lambda: _kernel_views(pool, pictures.decoded, draw(), config), count)
        else:
            images = [Image.fromarray(pixels) for pixels in pictures.decoded]
            yield Probe(lambda: _torch_views(pool, images, draw(), config), count)


def _dali_views(
    config: DataConfig,
    pictures: ResidentPictures,
    device: torch.device,
    draw: Callable[[], tuple[ViewParameters, ...]],
    *,
    half: bool,
) -> Probe:
    recipes = PAIRS[config.views]
    pixels: list[Any] = list(pictures.decoded)
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
        **dali_views.pipeline_arguments(len(pixels), cpu_threads(config), device),
    )
    pipeline.build()
    return Probe(pipeline.run, len(pixels))


def _kernel_views(
    pool: ThreadPoolExecutor,
    decoded: list[Bytes],
    views: tuple[ViewParameters, ...],
    config: DataConfig,
) -> list[Floats]:
    inputs = [kernel_inputs(view) for view in views]
    tables = level_tables(config.mean, config.std)
    side = config.image_px
    outputs = [torch.empty((len(decoded), 3, side, side)).numpy() for _ in views]

    def one(row: int) -> None:
        for view, output in zip(inputs, outputs, strict=True):
            fill_row(decoded[row], view, row, tables, output[row])

    for _ in pool.map(one, range(len(decoded))):
        pass
    return outputs


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
