"""Which samples a run has trained on (``--log-samples``), and those of steps left out.

One JSON line per step, one file per process. A log survives a kill at any moment, because a resume
cuts it to the step that it resumes from (``eval/run_folder.py``). What was trained on follows from
seed and step; the log is how to check that it does.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from eval.run_report import step_of


class StepLog:
    """Appends to ``NAME-RANK.jsonl``, which the first line makes; a context that closes it.

    Args:
        run: folder of the run.
        name: what is logged.
        rank: of this process.
    """

    def __init__(self, run: Path, name: str, rank: int) -> None:
        self.folder = run
        self._path = run / f"{name}-{rank}.jsonl"
        self._file: TextIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, step: int, sample_N: Any) -> None:
        """Log that ``step`` steps are done, the last one with these samples.

        Args:
            step: steps done.
            sample_N: numbers of the samples in the set, in the order of the batch, NumPy int64.
        """
        if self._file is None:
            self._file = self._path.open("a")
        self._file.write(json.dumps({"step": step, "samples": sample_N.tolist()}) + "\n")
        self._file.flush()  # to the system, so that a kill of this process loses nothing


def logs_of(run: Path, name: str) -> list[Path]:
    """The logs of a name, in the order of the ranks."""
    return sorted(run.glob(f"{name}-*.jsonl"), key=rank_of)


def rank_of(path: Path) -> int:
    """The rank that a log's name ends in."""
    return int(path.stem.rpartition("-")[2])


def cut(path: Path, step: int) -> None:
    """Drop all lines of later steps, and a last line that a kill left half-written."""
    if not path.exists():
        return
    kept_bytes = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or step_of(line.decode(errors="replace")) > step:
                break
            kept_bytes += len(line)
    os.truncate(path, kept_bytes)


def global_batches(run: Path) -> dict[int, list[int]]:
    """For each step done, the samples of its whole batch, in the order of the ranks."""
    batches: dict[int, list[int]] = {}
    for path in logs_of(run, "samples"):
        for line in path.read_text().splitlines():
            logged = json.loads(line)
            batches.setdefault(logged["step"], []).extend(logged["samples"])
    return dict(sorted(batches.items()))
