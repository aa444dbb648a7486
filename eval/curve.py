"""The curve of a run as a picture: loss against chance, pretext accuracy, kNN."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window, also where there is a screen

from matplotlib import pyplot as plt


def draw_curve(log: Path, picture: Path, chance_loss: float) -> None:
    """Draw a run's ``run.jsonl``.

    Args:
        log: JSON lines with ``step`` and any of ``loss``, ``pretext_accuracy``, ``knn_top1``.
        picture: PNG to write.
        chance_loss: log(K + 1), the loss of an encoder for which all keys are alike.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    series = {
        name: [(line["step"], line[name]) for line in lines if name in line]
        for name in ("loss", "pretext_accuracy", "knn_top1")
    }
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    if series["loss"]:
        upper.plot(*zip(*series["loss"], strict=True), color="tab:blue", label="InfoNCE loss")
    upper.axhline(chance_loss, color="grey", linestyle="--", label="log(K + 1), chance")
    upper.set_ylabel("loss (nats)")
    upper.set_ylim(bottom=0)
    upper.legend()
    for name, label, style in (
        ("pretext_accuracy", "pretext accuracy", "-"),
        ("knn_top1", "kNN top-1", "o-"),
    ):
        if series[name]:
            steps, values = zip(*series[name], strict=True)
            lower.plot(steps, [100 * value for value in values], style, label=label, markersize=4)
    lower.set_ylabel("%")
    lower.set_ylim(0, 100)
    lower.set_xlabel("step")
    if lower.get_lines():
        lower.legend()
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
