"""The tables and the figure of an ablation, from its finished runs."""

import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from rich.table import Table

Results = list[dict[str, Any]]
NAMES = {"end-to-end": "end-to-end", "memory-bank": "memory bank", "queue": "MoCo, queue"}
COLOURS = {"end-to-end": "tab:blue", "memory-bank": "tab:orange", "queue": "tab:green"}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over the seeds; of one value no deviation (NaN)."""
    if not values:
        return math.nan, math.nan
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def chosen(results: Results, **wanted: Any) -> Results:
    """The runs with these values."""
    return [run for run in results if all(run[name] == value for name, value in wanted.items())]


def score(runs: Results) -> str:
    """The kNN score in per cent as mean ± deviation (number of runs), and how many diverged."""
    values = [100 * run["knn_top1"] for run in runs if not run["diverged"]]
    diverged = len(runs) - len(values)
    note = f", {diverged} diverged" if diverged else ""
    if not values:
        return f"-{note}"
    mean, deviation = spread(values)
    shown = f"{mean:.1f}" if math.isnan(deviation) else f"{mean:.1f} ± {deviation:.1f}"
    return f"{shown} ({len(values)}{note})"


def mean_of(runs: Results, name: str) -> str:
    """The mean of a logged value over the runs that did not diverge."""
    values = [run[name] for run in runs if not run["diverged"]]
    return f"{statistics.mean(values):.3f}" if values else "-"


def tables(
    results: Results, momenta: tuple[float, ...], momentum: float, longest: int
) -> list[Table]:
    """Mechanism by length, and momentum.

    Args:
        results: of the finished runs.
        momenta: of the second table.
        momentum: of the queue in the first table.
        longest: length of the queue in the second table.
    """
    lengths = sorted({run["length"] for run in results})
    by_length = Table("mechanism", *(f"K = {length}" for length in lengths))
    by_length.title = "kNN top-1 (%), mean ± deviation over seeds (runs)"
    for mechanism, name in NAMES.items():
        wanted: dict[str, Any] = {"mechanism": mechanism}
        if mechanism == "queue":
            wanted |= {"momentum": momentum}
        cells = [chosen(results, length=length, **wanted) for length in lengths]
        by_length.add_row(name, *(score(runs) if runs else "" for runs in cells))
    untrained = [100 * run["untrained_top1"] for run in results if "untrained_top1" in run]
    if untrained:
        by_length.caption = f"encoder before training: {spread(untrained)[0]:.1f}"
    by_momentum = Table("momentum m", "kNN top-1 (%)", "loss", "pretext accuracy")
    by_momentum.title = f"Momentum of the key encoder, queue of {longest}"
    for value in momenta:
        runs = chosen(results, mechanism="queue", length=longest, momentum=value)
        if runs:
            shown = (score(runs), mean_of(runs, "loss"), mean_of(runs, "pretext_accuracy"))
            by_momentum.add_row(f"{value:g}", *shown)
    return [by_length, by_momentum]


def draw_figure(results: Results, picture: Path, momentum: float, longest: int) -> None:
    """Figure 3 of the paper and the sweep of the momentum, with each run as a dot.

    Args:
        results: of the finished runs.
        picture: PNG to write.
        momentum: of the queue on the left.
        longest: length of the queue on the right.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for mechanism in NAMES:
        wanted: dict[str, Any] = {"mechanism": mechanism}
        if mechanism == "queue":
            wanted |= {"momentum": momentum}
        draw_line(left, chosen(results, **wanted), "length", mechanism)
    left.set_xscale("log", base=2)
    lengths = sorted({run["length"] for run in results if run["mechanism"] != "end-to-end"})
    left.set_xticks(lengths, [str(length) for length in lengths])
    left.set_xlabel("K, keys that a query is compared with")
    left.set_ylabel("kNN top-1 (%)")
    swept = chosen(results, mechanism="queue", length=longest)
    # 0, 0.9, 0.99, 0.999 one place apart: powers of ten of 1 - m.
    swept = [{**run, "place": -math.log10(max(1 - run["momentum"], 1e-9))} for run in swept]
    draw_line(right, swept, "place", "queue")
    ticks = sorted({(run["place"], f"{run['momentum']:g}") for run in swept})
    right.set_xticks([place for place, _ in ticks], [label for _, label in ticks])
    right.set_xlabel(f"momentum m of the key encoder, K = {longest}")
    untrained = [100 * run["untrained_top1"] for run in results if "untrained_top1" in run]
    for axis in (left, right):
        if untrained:
            mean = statistics.mean(untrained)
            axis.axhline(mean, color="grey", linestyle="--", label="before training")
        axis.grid(alpha=0.3)
    left.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def draw_line(axis: Axes, runs: Results, place: str, mechanism: str) -> None:
    """Each run as a dot, the means joined by a line."""
    runs = [run for run in runs if not run["diverged"]]
    if not runs:
        return
    places = sorted({run[place] for run in runs})
    means = [
        statistics.mean(100 * run["knn_top1"] for run in chosen(runs, **{place: x})) for x in places
    ]
    colour = COLOURS[mechanism]
    axis.plot(places, means, "-", color=colour, label=NAMES[mechanism])
    xs, ys = [run[place] for run in runs], [100 * run["knn_top1"] for run in runs]
    axis.plot(xs, ys, "o", color=colour, markersize=4)
