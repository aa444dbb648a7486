"""Samples that could not be used: each is logged, and too many of them end the run."""

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.program import DataError

# The rule of Megatron-Energon: this many bad samples in a row are a broken disk, not bad luck.
BAD_IN_A_ROW = 100
# The reading thread is some steps ahead of the repair of a batch that could not be decoded.
STEPS_IN_FLIGHT = 64


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """One line of the log: which sample could not be used at which step, and why."""

    step: int
    shard: str
    index: int
    key: str
    reason: str


class Quarantine:
    """Counts and logs samples that could not be used; ends the run when they are too many.

    Any number of threads may use it. A sample that stands in for two others of a step is counted
    twice and logged once.

    Args:
        path: JSON lines file to append to, or None.
        max_share: of all samples delivered so far, once a thousand were.
    """

    def __init__(self, path: Path | None, max_share: float) -> None:
        self._path = path
        self._max_share = max_share
        self.bad = 0
        self._good = 0
        self._in_a_row = 0
        self._logged: set[tuple[int, str, int]] = set()
        self._lock = threading.Lock()

    def accept(self) -> None:
        """Take note of a good sample."""
        with self._lock:
            self._good += 1
            self._in_a_row = 0

    def reject(self, sample: BadSample) -> None:
        """Log one bad sample.

        Raises:
            DataError: if it is one too many.
        """
        with self._lock:
            self.bad += 1
            self._in_a_row += 1
            self._log(sample)
            self._judge(sample.reason)

    def _log(self, sample: BadSample) -> None:
        if self._path is None:
            return
        oldest = sample.step - STEPS_IN_FLIGHT
        self._logged = {place for place in self._logged if place[0] > oldest}
        place = (sample.step, sample.shard, sample.index)
        if place in self._logged:
            return
        self._logged.add(place)
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(sample)) + "\n")

    def _judge(self, reason: str) -> None:
        where = f"; see {self._path}" if self._path else ""
        if self._in_a_row >= BAD_IN_A_ROW:
            raise DataError(
                f"{self._in_a_row} samples in a row could not be used, the last one because of "
                f"'{reason}'{where}: check the disk and the shards"
            )
        seen = self._good + self.bad
        if seen >= 1000 and self.bad > self._max_share * seen:
            raise DataError(
                f"{self.bad} of {seen} samples could not be used, more than "
                f"--data.max-bad-share {self._max_share}{where}: repair the shards or raise it"
            )
