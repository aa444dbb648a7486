"""Logged values to TensorBoard, through Accelerate's tracker."""

from typing import Any

from accelerate import Accelerator

from model.health import BINS


def track(accelerator: Accelerator, values: dict[str, Any], step: int) -> None:
    """Numbers as curves, text as text, counts of bins from -1 to 1 as histograms.

    Args:
        accelerator: with the tracker started.
        values: by name.
        step: steps done.
    """
    counts = {name: value for name, value in values.items() if isinstance(value, list)}
    accelerator.log({k: v for k, v in values.items() if k not in counts}, step=step)
    if counts and accelerator.is_main_process:
        writer = accelerator.get_tracker("tensorboard", unwrap=True)
        for name, bins in counts.items():
            _histogram(writer, name, bins, step)


def _histogram(writer: Any, name: str, counts: list[float], step: int) -> None:
    width = 2 / BINS
    middles = [-1 + width * (n + 0.5) for n in range(BINS)]
    writer.add_histogram_raw(
        name,
        min=-1.0,
        max=1.0,
        num=sum(counts),
        sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
        sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
        bucket_limits=[x + width / 2 for x in middles],
        bucket_counts=counts,
        global_step=step,
    )
