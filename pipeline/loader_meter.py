"""What a loader measures of itself: how fast each stage is, and who waits for whom.

Three stages follow each other through bounded queues: the reading thread (bytes, checks, view
parameters), the engine (decoding and views, on threads or a GPU of its own) and the consumer. Who
waits is told by clocks around the two queues. How fast the reading is follows from the time that
its thread works. An engine does not say when it works; but between two batches that were both
waited for it did nothing else, so its speed is taken from these intervals, and is unknown where
the engine is always ahead.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Self

# A batch that is ready is handed over faster than this.
AT_ONCE_S = 1e-3
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class LoaderFigures:
    """Counts and seconds of a stretch of time, of one process."""

    seconds: float = 0.0
    """Length of the stretch."""
    images: int = 0
    """Given to the consumer."""
    waited_s: float = 0.0
    """By the consumer, for whatever reason."""
    starved_s: float = 0.0
    """By the engine for the reading thread; most of it is in ``waited_s`` too."""
    read_images: int = 0
    read_bytes: int = 0
    """Of encoded pictures, checked."""
    read_s: float = 0.0
    """Reading thread at work, waiting for shards from a server included."""
    blocked_s: float = 0.0
    """Reading thread in front of a full queue: the stages after it are slower."""
    views_images: int = 0
    """In the intervals of ``views_s``."""
    views_s: float = 0.0
    """Between batches that were both waited for, less what the engine starved."""
    bad_samples: int = 0
    """Met by this process, each time counted."""
    fetched_bytes: int = 0
    """From a server, retries not counted."""
    retries: int = 0
    fetch_waited_s: float = 0.0
    """By the reading thread for shards that were not there yet; part of ``read_s``."""

    def since(self, earlier: Self) -> Self:
        """What was added after an earlier reading."""
        pairs = {f.name: getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)}
        return type(self)(**pairs)

    def values(self) -> dict[str, float]:
        """Speeds and shares by the names that logs use; a speed that is not known is left out."""
        seconds = max(self.seconds, 1e-9)
        reading_s = self.read_s - self.fetch_waited_s
        known = {
            "read_images_per_second": (self.read_images, reading_s),
            "read_mib_per_second": (self.read_bytes / MIB, reading_s),
            "views_images_per_second": (self.views_images, self.views_s),
        }
        values = {name: amount / time for name, (amount, time) in known.items() if time > 0}
        values |= {
            "engine_wait_share": min(self.starved_s / seconds, 1.0),
            "reader_wait_share": min(self.blocked_s / seconds, 1.0),
            "bad_samples": float(self.bad_samples),
        }
        if self.fetched_bytes or self.fetch_waited_s:
            values |= {
                "fetched_mib_per_second": self.fetched_bytes / MIB / seconds,
                "fetch_wait_share": min(self.fetch_waited_s / seconds, 1.0),
                "fetch_retries": float(self.retries),
            }
        return values


class LoaderMeter:
    """Clocks of the reading thread and of the consumer, who may be two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums: dict[str, Any] = {f.name: f.default for f in fields(LoaderFigures)}
        self._started = time.perf_counter()
        self._last_waited_end: float | None = None
        self._starved_at_end = 0.0

    def add(self, **amounts: float) -> None:
        """Add to counts and seconds, by their names in ``LoaderFigures``."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    @contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the time of the body to one of the seconds, also when it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(**{name: time.perf_counter() - started})

    def given(self, images: int, asked: float) -> None:
        """Take note of a batch for the consumer, who asked for it at that ``perf_counter``."""
        now = time.perf_counter()
        with self._lock:
            sums = self._sums
            starved = sums["starved_s"] - self._starved_at_end
            was_waited_for = now - asked > AT_ONCE_S
            if was_waited_for and self._last_waited_end is not None:
                sums["views_s"] += max(now - self._last_waited_end - starved, 0.0)
                sums["views_images"] += images
            sums["waited_s"] += now - asked
            sums["images"] += images
            self._last_waited_end = now if was_waited_for else None
            self._starved_at_end = sums["starved_s"]

    def figures(self, **counters: Any) -> LoaderFigures:
        """All of it since the beginning, with what others have counted."""
        with self._lock:
            seconds = time.perf_counter() - self._started
            return LoaderFigures(**{**self._sums, "seconds": seconds, **counters})
