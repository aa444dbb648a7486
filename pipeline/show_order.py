"""A picture of how well the order of a run mixes the shards, and what it costs in open shards.

    python pipeline/show_order.py SHARDS --output order.png --batch 256

Look at it to choose --data.window and --data.lanes: a longer window and more lanes mix more and
keep more shards in use at once, which a local cache of remote shards must hold. Instead of SHARDS,
--simulate SAMPLES SHARDS plans a set that does not exist yet.

Two figures say how far the order is from a full shuffle. Neighbours of a shard, which often show
the same thing, should be met far apart: their distance in steps is compared with that of a full
shuffle, a third of the epoch on average. And a global batch should draw on many shards.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from pipeline.command_line import parse_flags
from pipeline.data_config import DataConfig, make_order, open_store
from pipeline.figure_file import save_figure
from pipeline.order import Order, default_lanes
from pipeline.program import InputError, run_program

Ints = NDArray[np.int64]

# Windows looked at: each is one of a lane, spread over the lanes. Batches and looks ahead likewise.
WINDOWS, BATCHES = 8, 16
DRAWN_STEPS, DRAWN_SAMPLES = 400, 6000


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """Which order of which shards."""

    shards: Annotated[str | None, tyro.conf.Positional] = None
    """Folder that make_shards wrote, or its URL; left out with --simulate."""
    output: Path = Path("order.png")
    """PNG to write."""
    simulate: tuple[int, int] | None = None
    """Samples and shards of a set to plan for, in place of a folder."""
    batch: int = 256
    """Pictures in a step, all processes together."""
    lanes: int = 0
    """Canonical lanes of the order. 0: at most 64."""
    window: int = DataConfig().window
    """Samples of a lane that are shuffled with each other."""
    world: int = 1
    """Processes."""
    seed: int = 0
    """Of the order."""

    def __post_init__(self) -> None:
        if self.output.suffix.lower() != ".png":
            raise InputError(f"{self.output}: give a name that ends in .png")
        if (self.shards is None) == (self.simulate is None):
            raise InputError("give a folder of shards, or --simulate SAMPLES SHARDS, not both")
        if self.simulate and not 1 <= self.simulate[1] <= self.simulate[0]:
            raise InputError(
                f"--simulate {self.simulate[0]} {self.simulate[1]}: give at least one shard, and "
                "at least as many samples as shards"
            )


@dataclass(frozen=True)
class Mixing:
    """What was measured of an order."""

    distance_steps: Ints
    """Steps between the two pictures of pairs that lie side by side in a shard."""
    batch_shards: float
    """Different shards that a global batch draws on."""
    full_batch_shards: float
    """The same in a full shuffle."""
    rank_shards: float
    """Different shards that one process reads while a lane goes through one window."""


def order_of(config: OrderConfig) -> Order:
    """The order to look at.

    Raises:
        InputError: if shards, batch, lanes and processes do not fit together.
    """
    if config.simulate:
        samples, shards = config.simulate
        ends = np.linspace(0, samples, shards + 1).astype(np.int64)
        lanes = config.lanes or default_lanes(config.batch)
        order = Order(ends[1:] - ends[:-1], config.batch, config.seed, lanes, config.window)
    else:
        data = DataConfig(shards=config.shards, lanes=config.lanes, window=config.window)
        order = make_order(open_store(data), data, config.batch, config.seed)
    order.batch(0, 0, config.world)
    return order


def window_steps(order: Order) -> int:
    """Steps that a lane needs for one window, at most an epoch."""
    per_lane = order.global_batch // order.lanes
    return min(-(-order.window // per_lane), order.steps_per_epoch)


def neighbour_distances(order: Order, lane: int, first_step: int) -> Ints:
    """Steps between pictures that lie side by side, in one lane from ``first_step`` on."""
    steps = range(first_step, min(first_step + window_steps(order), order.steps_per_epoch))
    position = np.concatenate([order.batch(step, lane, order.lanes).position for step in steps])
    by_position = np.argsort(position)
    step_of = by_position // (order.global_batch // order.lanes)
    is_beside = np.diff(position[by_position]) == 1
    distance: Ints = np.abs(np.diff(step_of))[is_beside].astype(np.int64)
    return distance


def measure(order: Order, world: int) -> Mixing:
    """Sample an epoch: a few windows, a few batches."""
    lanes = np.linspace(0, order.lanes - 1, min(WINDOWS, order.lanes)).astype(int)
    steps_of_window = window_steps(order)
    windows = max(order.steps_per_epoch // steps_of_window, 1)
    firsts = [steps_of_window * (number % windows) for number in range(len(lanes))]
    distances = [
        neighbour_distances(order, int(lane), first)
        for lane, first in zip(lanes, firsts, strict=True)
    ]
    looked_at = np.linspace(0, order.steps_per_epoch - 1, BATCHES).astype(int)
    batch_shards = np.mean([len(np.unique(order.batch(int(s)).shard)) for s in looked_at])
    shares = order.shard_samples / order.samples
    full = float((1 - (1 - shares) ** order.global_batch).sum())
    rank_shards = float(len(order.shards_ahead(firsts[-1], steps_of_window, 0, world)))
    return Mixing(np.concatenate(distances), float(batch_shards), full, rank_shards)


def report(order: Order, mixing: Mixing, world: int) -> Table:
    """The figures, beside those of a full shuffle."""
    table = Table(title=f"{order.samples:,} pictures in {len(order.shard_samples):,} shards")
    table.add_column("")
    table.add_column("this order", justify="right")
    table.add_column("full shuffle", justify="right")
    distance = mixing.distance_steps
    if len(distance):
        low, middle, high = np.percentile(distance, [5, 50, 95])
        # The distance of two uniform places in an epoch of n steps is triangular.
        full = order.steps_per_epoch * (1 - np.sqrt(1 - np.array([0.05, 0.5, 0.95])))
        table.add_row(
            "steps between neighbours of a shard: 5 %, median, 95 %",
            f"{low:,.0f}  {middle:,.0f}  {high:,.0f}",
            "  ".join(f"{value:,.0f}" for value in full),
        )
        table.add_row(
            "neighbours that meet in one global batch",
            f"{100 * (distance == 0).mean():.2g} %",
            f"{100 / order.steps_per_epoch:.2g} %",
        )
    table.add_row(
        f"shards that a global batch of {order.global_batch:,} draws on",
        f"{mixing.batch_shards:,.0f}",
        f"{mixing.full_batch_shards:,.0f}",
    )
    table.add_row(
        f"shards that one process of {world:,} reads in {window_steps(order):,} steps",
        f"{mixing.rank_shards:,.0f}",
        f"{len(order.shard_samples):,}",
    )
    return table


def draw(order: Order, mixing: Mixing) -> Figure:
    """Where the pictures of the coming steps lie, and how far apart neighbours are met."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    steps = np.unique(np.linspace(0, order.steps_per_epoch - 1, DRAWN_STEPS).astype(int))
    places = [order.batch(int(step)) for step in steps]
    step = np.repeat(steps, order.global_batch)
    sample = np.concatenate([place.sample for place in places])
    shown = np.linspace(0, len(step) - 1, min(DRAWN_SAMPLES, len(step))).astype(int)
    lane = np.tile(np.repeat(np.arange(order.lanes), order.global_batch // order.lanes), len(steps))
    left.scatter(step[shown], sample[shown], s=3, c=lane[shown], cmap="viridis", linewidths=0)
    left.set_xlabel("step of the first epoch")
    left.set_ylabel("place of the picture in the set")
    left.set_title(f"what is read when (colour: one of {order.lanes} lanes)", fontsize=11)
    if len(mixing.distance_steps):
        top = int(mixing.distance_steps.max()) + 1
        edges = np.linspace(0, top, min(top, 60) + 1)
        right.hist(mixing.distance_steps, bins=edges, density=True, label="this order")
        at = np.linspace(0, top, 200)
        span = order.steps_per_epoch
        density = np.clip(2 * (span - at) / span**2, 0, None)
        right.plot(at, density, color="black", label="full shuffle")
        right.legend()
    right.set_xlabel("steps between neighbours of a shard")
    right.set_title("how far apart neighbours are met", fontsize=11)
    right.set_yticks([])
    return figure


def main() -> None:
    """Parse the command line, print the figures and draw the picture."""
    config = parse_flags(OrderConfig, __doc__)
    order = order_of(config)
    mixing = measure(order, config.world)
    save_figure(draw(order, mixing), config.output)
    console = Console()
    console.print(report(order, mixing, config.world))
    console.print(f"wrote {config.output}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_program(main)
