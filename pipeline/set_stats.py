"""What a set holds, from its indexes alone: sizes, shapes, classes, equal pictures; a drawing."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from pipeline.figure_file import save_figure
from pipeline.shard_format import FLAG_DROPPED, INDEX_RECORD, Manifest
from pipeline.shard_store import BadSampleError, ShardStore

PERCENTILES = (0, 1, 25, 50, 75, 99, 100)


@dataclass(frozen=True)
class SetStats:
    """Columns of one value for each picture that is not dropped."""

    bytes_N: NDArray[np.int64]
    shorter_px_N: NDArray[np.int64]
    aspect_N: NDArray[np.float64]
    """Width over height."""
    class_sizes_C: NDArray[np.int64]
    """Pictures of each class."""
    unlabelled: int
    dropped: int
    equal: int
    """Pictures with the size and CRC-32 of another one."""
    unread: list[str]
    """Shards whose index cannot be read, and why."""


def gather(store: ShardStore) -> SetStats:
    """Read all indexes."""
    parts, unread = [], []
    for shard, info in enumerate(store.manifest.shards):
        try:
            parts.append(store.records(shard))
        except BadSampleError as error:
            unread.append(f"{info.name}: {error}")
    records = np.concatenate(parts) if parts else np.zeros(0, INDEX_RECORD)
    is_dropped = (records["flags"] & FLAG_DROPPED) > 0
    records = records[~is_dropped]
    width, height = (records[side].astype(np.int64) for side in ("width", "height"))
    labels = records["label"][records["label"] >= 0]
    same = records["size"].astype(np.uint64) << np.uint64(32) | records["crc32"]
    return SetStats(
        bytes_N=records["size"].astype(np.int64),
        shorter_px_N=np.minimum(width, height),
        aspect_N=width / np.maximum(height, 1),
        class_sizes_C=np.bincount(labels, minlength=len(store.manifest.classes)),
        unlabelled=len(records) - len(labels),
        dropped=int(is_dropped.sum()),
        equal=len(same) - len(np.unique(same)),
        unread=unread,
    )


def rows_of(stats: SetStats, manifest: Manifest) -> list[tuple[str, str]]:
    """The figures as text, for a table."""
    count = len(stats.bytes_N)
    rows = [
        ("pictures", f"{count:,}"),
        ("dropped", f"{stats.dropped:,}"),
        ("shards", f"{len(manifest.shards):,}"),
        ("equal to another", f"{stats.equal:,}, by size and CRC-32"),
    ]
    if manifest.classes:
        sizes = stats.class_sizes_C
        rows.append(("classes", f"{len(sizes):,} of {sizes.min():,} to {sizes.max():,} pictures"))
    rows.append(("without a label", f"{stats.unlabelled:,}"))
    if count:
        marks = ", ".join(f"{p} %" for p in PERCENTILES)
        rows.append(("percentiles", marks))
        for title, values, form in (
            ("bytes", stats.bytes_N, "{:,.0f}"),
            ("shorter side, px", stats.shorter_px_N, "{:,.0f}"),
            ("width over height", stats.aspect_N, "{:.2f}"),
        ):
            found = np.percentile(values, PERCENTILES)
            rows.append((title, ", ".join(form.format(value) for value in found)))
    return rows


def draw_stats(stats: SetStats, picture: Path) -> None:
    """Histograms as PNG."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    _histogram(axes[0, 0], stats.bytes_N / 1000, "kB a picture")
    _histogram(axes[0, 1], stats.shorter_px_N, "shorter side, px")
    _histogram(axes[1, 0], stats.aspect_N, "width over height")
    sizes = np.sort(stats.class_sizes_C)[::-1]
    if len(sizes):
        axes[1, 1].step(np.arange(1, len(sizes) + 1), sizes, where="mid")
        axes[1, 1].set_ylim(bottom=0)
        axes[1, 1].set_xlabel("classes, the largest first")
    else:
        axes[1, 1].text(0.5, 0.5, "no classes", ha="center", transform=axes[1, 1].transAxes)
    for axis in axes.flat:
        axis.set_ylabel("pictures")
        axis.grid(alpha=0.3)
    save_figure(figure, picture)


def _histogram(axis: Any, values: NDArray[Any], title: str) -> None:
    axis.set_xlabel(title)
    values = values[values > 0]
    if len(values):
        axis.hist(values, bins=np.geomspace(values.min() * 0.95, values.max() * 1.05, 60))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
