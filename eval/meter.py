"""How fast a run is, and how much of its time it waits for data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.loader_meter import LoaderFigures

# The first steps compile kernels and fill pipelines.
WARM_UP_STEPS = 3


class Meter:
    """Throughput between two readings, without warm-up, checkpoints and evaluations.

    Args:
        images_per_step: of all processes together.
        figures: what this process's loader has measured so far.
    """

    def __init__(self, images_per_step: int, figures: Callable[[], LoaderFigures]) -> None:
        self._images_per_step = images_per_step
        self._figures = figures
        self._steps = 0
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._waited_s = 0.0
        self._paused_s = 0.0
        self._steps_at_start = self._steps
        self._figures_at_start = self._figures()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the fetching of a step's batch."""
        if self._steps == WARM_UP_STEPS:
            self._begin()
        started = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - started
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training."""
        started = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - started

    def read(self) -> dict[str, float]:
        """Images per second, share of waiting and the loader's figures since the last reading."""
        spent_s = max(time.perf_counter() - self._started - self._paused_s, 1e-9)
        steps = self._steps - self._steps_at_start
        values = {
            "images_per_second": steps * self._images_per_step / spent_s,
            "data_wait_share": min(self._waited_s / spent_s, 1.0),
        }
        values |= self._figures().since(self._figures_at_start).values()
        self._begin()
        return values
