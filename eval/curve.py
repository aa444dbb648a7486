"""The curve of a run as a picture: loss against chance, pretext accuracy, kNN, the dictionary."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Series = dict[str, list[tuple[int, Any]]]
NAMES = (
    *("loss", "pretext_accuracy", "knn_top1", "alarm"),
    *("effective_rank", "highest_rank", "positive_similarity", "negative_similarity"),
)


def draw_curve(log: Path, picture: Path, chance_loss: float) -> None:
    """Draw a run's ``run.jsonl``.

    Args:
        log: JSON lines with ``step`` and any of ``NAMES``.
        picture: PNG to write.
        chance_loss: log(K + 1), the loss of an encoder for which all keys are alike.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    series = {n: [(line["step"], line[n]) for line in lines if n in line] for n in NAMES}
    has_health = bool(series["effective_rank"])
    figure, axes = plt.subplots(
        2 + has_health,
        1,
        figsize=(8, 8 if has_health else 6),
        sharex=True,
        layout="constrained",
    )
    _draw_loss(axes[0], series, chance_loss)
    _draw_scores(axes[1], series)
    if has_health:
        _draw_health(axes[2], series)
    axes[-1].set_xlabel("step")
    for axis in axes:
        axis.grid(alpha=0.3)
        for step, _ in series["alarm"]:
            axis.axvline(step, color="tab:red", linewidth=1)
    for step, name in series["alarm"]:
        axes[0].annotate(
            name, (step, 0.03), xycoords=("data", "axes fraction"), rotation=90, color="tab:red"
        )
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def _draw_loss(axis: Axes, series: Series, chance_loss: float) -> None:
    if series["loss"]:
        axis.plot(*zip(*series["loss"], strict=True), color="tab:blue", label="InfoNCE loss")
    axis.axhline(chance_loss, color="grey", linestyle="--", label="log(K + 1), chance")
    axis.set_ylabel("loss (nats)")
    axis.set_ylim(bottom=0)
    axis.legend()


def _draw_scores(axis: Axes, series: Series) -> None:
    for name, label, style in (
        ("pretext_accuracy", "pretext accuracy", "-"),
        ("knn_top1", "kNN top-1", "o-"),
    ):
        if series[name]:
            steps, values = zip(*series[name], strict=True)
            axis.plot(steps, [100 * value for value in values], style, label=label, markersize=4)
    axis.set_ylabel("%")
    axis.set_ylim(0, 100)
    if axis.get_lines():
        axis.legend()


def _draw_health(axis: Axes, series: Series) -> None:
    """What the dictionary is like: from 0, a collapse, to 1."""
    most = dict(series["highest_rank"])
    rank = [(step, value / most[step]) for step, value in series["effective_rank"]]
    axis.plot(*zip(*rank, strict=True), color="tab:green", label="effective rank / dimensions")
    for name, label, colour in (
        ("positive_similarity", "similarity of own keys", "tab:purple"),
        ("negative_similarity", "of other keys", "tab:brown"),
    ):
        axis.plot(*zip(*series[name], strict=True), color=colour, label=label)
    axis.set_ylabel("keys")
    axis.set_ylim(top=1.02)
    axis.legend()
