"""Figures as PNG files, drawn without a window, also where there is a screen."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from pipeline.shard_format import atomic_file


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure whole or not at all, and let go of it."""
    with atomic_file(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
