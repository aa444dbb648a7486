"""Samples that could not be used: each is logged, and too many of them end the run."""

import json
from pathlib import Path

from pipeline.program import DataError

# The rule of Megatron-Energon: this many bad samples in a row are a broken disk, not bad luck.
BAD_IN_A_ROW = 100


class Quarantine:
    """Counts and logs samples that could not be used; ends the run when they are too many.

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

    def accept(self) -> None:
        """Take note of a good sample."""
        self._good += 1
        self._in_a_row = 0

    def reject(self, **line: str | int) -> None:
        """Log one bad sample.

        Raises:
            DataError: if it is one too many.
        """
        self.bad += 1
        self._in_a_row += 1
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        where = f"; see {self._path}" if self._path else ""
        if self._in_a_row >= BAD_IN_A_ROW:
            raise DataError(
                f"{self._in_a_row} samples in a row could not be used, the last one because of "
                f"'{line['reason']}'{where}: check the disk and the shards"
            )
        seen = self._good + self.bad
        if seen >= 1000 and self.bad > self._max_share * seen:
            raise DataError(
                f"{self.bad} of {seen} samples could not be used, more than "
                f"--data.max-bad-share {self._max_share}{where}: repair the shards or raise it"
            )
