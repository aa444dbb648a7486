"""A picture of what a recipe does: originals, their query and key views, and what was drawn.

    python pipeline/show_views.py SHARDS OUTPUT.png --views moco-v2

Look at it before a long run: views that hide what matters, or show no difference, train nothing.
The views are made by the same code as in training. Beside OUTPUT.png a second picture,
OUTPUT-drawn.png, has the distribution of every parameter over many samples.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console

from pipeline.command_line import parse_flags, require_at_least_1
from pipeline.data_config import DataConfig
from pipeline.figure_file import save_figure
from pipeline.loader import PairLoader
from pipeline.program import InputError, run_program
from pipeline.torch_views import decode
from pipeline.view_recipe import PAIRS, PairName, ViewParameters, draw_view

DRAWN_SAMPLES = 20_000
JITTER_NAMES = ("brightness", "contrast", "saturation", "hue")


@dataclass(frozen=True, kw_only=True)
class ShowConfig:
    """Which views of which pictures."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder that make_shards wrote, or its URL."""
    output: Annotated[Path, tyro.conf.Positional]
    """PNG to write."""
    views: PairName = "moco-v2"
    """Augmentation recipe."""
    image_px: int = 224
    """Side of a view, in pixels."""
    pictures: int = 8
    """Rows of the sheet."""
    repeats: int = 3
    """Pairs of each picture: the views of as many epochs."""
    seed: int = 0
    """Of the order and the views."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "image_px", "pictures", "repeats")
        if self.output.suffix.lower() != ".png":
            raise InputError(f"{self.output}: give a name that ends in .png")


def as_pictures(views_N3HW: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """Normalised views as 8-bit ``[N, H, W, 3]``."""
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    views_NHW3 = views_N3HW.float().cpu().permute(0, 2, 3, 1) * std + mean
    pictures: NDArray[np.uint8] = (views_NHW3 * 255).round().clamp(0, 255).byte().numpy()
    return pictures


def collect(
    config: ShowConfig,
) -> tuple[list[Image.Image], list[list[NDArray[np.uint8]]], NDArray[np.int64]]:
    """Originals, their views of several epochs (query, key, ...), and sizes of many samples."""
    data = DataConfig(shards=config.shards, views=config.views, image_px=config.image_px, lanes=1)
    columns: list[list[NDArray[np.uint8]]] = []
    with PairLoader(
        data, global_batch=config.pictures, seed=config.seed, device=torch.device("cpu")
    ) as loader:
        planned = loader.plan(0)
        originals = [decode(picture) for picture in planned.pictures]
        for epoch in range(config.repeats):
            query_N3HW, key_N3HW = loader.make(planned, epoch)
            columns += [list(as_pictures(query_N3HW, data)), list(as_pictures(key_N3HW, data))]
        records = loader.store.records(int(planned.places.shard[0]))
    size_px_N2 = np.stack([records["width"], records["height"]], axis=1).astype(np.int64)
    return originals, columns, size_px_N2


def draw_sheet(config: ShowConfig, originals: list[Image.Image], columns: list[Any]) -> Figure:
    """The contact sheet: one row for each picture, the original first."""
    rows, width = len(originals), 1 + len(columns)
    figure, axes = plt.subplots(
        rows, width, figsize=(1.7 * width, 1.75 * rows + 0.5), layout="constrained", squeeze=False
    )
    titles = ["original"] + [
        f"{w} {e + 1}" for e in range(config.repeats) for w in ("query", "key")
    ]
    for row, original in enumerate(originals):
        for column, shown in enumerate([original, *(views[row] for views in columns)]):
            axis = axes[row, column]
            axis.imshow(shown)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(titles[column], fontsize=10)
    figure.suptitle(
        f"{config.views} at {config.image_px} px, {Path(config.shards).name}", fontsize=11
    )
    return figure


def drawn_values(view: ViewParameters, size_px_N2: NDArray[np.int64]) -> dict[str, Any]:
    """What the histograms show of one view's parameters."""
    area = view.crop_xywh_px[:, 2] * view.crop_xywh_px[:, 3]
    values = {
        "share of area": area / size_px_N2.prod(axis=1),
        "aspect (width / height)": view.crop_xywh_px[:, 2] / view.crop_xywh_px[:, 3],
    }
    for number, name in enumerate(JITTER_NAMES):
        values[name] = view.factors[view.jitter, number]
    values["blur sigma (px)"] = view.sigma_px[view.sigma_px > 0]
    shares = {
        "flip": view.flip,
        "jitter": view.jitter,
        "grey": view.grey,
        "blur": view.sigma_px > 0,
        "solarise": view.solarise,
    }
    values["share of samples"] = {name: float(drawn.mean()) for name, drawn in shares.items()}
    return values


def draw_histograms(config: ShowConfig, size_px_N2: NDArray[np.int64]) -> Figure:
    """Distributions of the parameters of both views, over many samples."""
    sizes = size_px_N2[np.arange(DRAWN_SAMPLES) % len(size_px_N2)]
    figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
    for number, (recipe, name) in enumerate(
        zip(PAIRS[config.views], ("query", "key"), strict=True)
    ):
        drawn = draw_view(recipe, sizes, (config.seed, 0, number), np.arange(DRAWN_SAMPLES))
        for axis, (title, values) in zip(
            axes.flat, drawn_values(drawn, sizes).items(), strict=True
        ):
            axis.set_title(title, fontsize=10)
            if isinstance(values, dict):
                places = np.arange(len(values)) + 0.4 * number
                bars = axis.bar(places, list(values.values()), 0.4, label=name)
                axis.bar_label(bars, fmt="%.2f", fontsize=7)
                axis.set_xticks(np.arange(len(values)) + 0.2, list(values), fontsize=8)
                axis.legend(fontsize=8)
            elif len(values) and np.ptp(values) > 0:
                axis.hist(values, bins=40, histtype="step", linewidth=1.5, label=name)
            else:
                axis.text(0.5, 0.5 - 0.12 * number, f"{name}: never", ha="center", fontsize=9)
    figure.suptitle(f"{config.views}: what {DRAWN_SAMPLES:,} samples drew", fontsize=11)
    return figure


def main() -> None:
    """Parse the command line and draw both pictures."""
    config = parse_flags(ShowConfig, __doc__)
    originals, columns, size_px_N2 = collect(config)
    drawn = config.output.with_name(f"{config.output.stem}-drawn.png")
    save_figure(draw_sheet(config, originals, columns), config.output)
    save_figure(draw_histograms(config, size_px_N2), drawn)
    Console().print(f"wrote {config.output} and {drawn}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_program(main)
