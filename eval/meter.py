"""How fast a run is, and how much of its time it waits for data."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pipeline.loader_meter import LoaderFigures

# The first steps compile kernels and fill pipelines.
WARM_UP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Totals:
    """What a run has done since its first step, in all its parts.

    A checkpoint holds them, so the steps between it and a kill count once.
    """

    images: int = 0
    training_s: float = 0.0
    """Pauses (saves, copies for a score) left out; warm-up and waiting for data count."""
    waited_s: float = 0.0
    """For data; part of ``training_s``."""

    def values(self) -> dict[str, float]:
        """By the names that logs use."""
        return {
            "images_seen": float(self.images),
            "training_seconds": self.training_s,
            "data_wait_share_so_far": min(self.waited_s / max(self.training_s, 1e-9), 1.0),
        }


class Meter:
    """Throughput between two readings, without warm-up, checkpoints and evaluations.

    Args:
        images_per_step: of all processes together.
        figures: what this process's loader has measured so far.
        before: totals of the parts of the run that this one goes on from.
        of_speed: what follows from images per second, by the names that logs use.
    """

    def __init__(
        self,
        images_per_step: int,
        figures: Callable[[], LoaderFigures],
        before: Totals = Totals(),
        of_speed: Callable[[float], dict[str, float]] = lambda _: {},
    ) -> None:
        self._images_per_step = images_per_step
        self._figures = figures
        self._before = before
        self._of_speed = of_speed
        self._all_waited_s = self._all_paused_s = 0.0
        self._steps = 0
        self._begun: float | None = None
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
        if self._begun is None:
            self._begun = started
        yield
        waited_s = time.perf_counter() - started
        self._waited_s += waited_s
        self._all_waited_s += waited_s
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training."""
        started = time.perf_counter()
        yield
        paused_s = time.perf_counter() - started
        self._paused_s += paused_s
        self._all_paused_s += paused_s

    def totals(self) -> Totals:
        """Since the run's first step."""
        spent_s = 0.0 if self._begun is None else time.perf_counter() - self._begun
        return Totals(
            images=self._before.images + self._steps * self._images_per_step,
            training_s=self._before.training_s + spent_s - self._all_paused_s,
            waited_s=self._before.waited_s + self._all_waited_s,
        )

    def read(self) -> dict[str, float]:
        """Speed, share of waiting and the loader's figures since the last reading; totals."""
        spent_s = max(time.perf_counter() - self._started - self._paused_s, 1e-9)
        steps = self._steps - self._steps_at_start
        values = {
            "images_per_second": steps * self._images_per_step / spent_s,
            "data_wait_share": min(self._waited_s / spent_s, 1.0),
        }
        values |= self._figures().since(self._figures_at_start).values()
        values |= self._of_speed(values["images_per_second"])
        values |= self.totals().values()
        self._begin()
        return values
