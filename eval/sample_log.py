"""Which samples a run has trained on, step by step: one JSON line per step and process.

Off unless asked for (``--log-samples``): what it says follows from seed and step, and this is how
to check that it does. It survives a kill at any moment, because a resume cuts it to the step that
it resumes from.
"""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eval.run_report import step_of

LOG_NAMES = "samples-*.jsonl"


class SampleLog:
    """Appends to ``samples-RANK.jsonl`` in the folder of a run; a context that closes it.

    Args:
        run: the folder; None where nothing is to be logged.
        rank: of this process.
        world: number of processes. The first one cuts the logs of ranks that are no more.
        first_step: steps done before; what was logged after them is dropped.
    """

    def __init__(self, run: Path | None, rank: int, world: int, first_step: int) -> None:
        self._file = None
        if run is None:
            return
        own = run / f"samples-{rank}.jsonl"
        for path in run.glob(LOG_NAMES) if rank == 0 else [own]:
            if path == own or int(path.stem.partition("-")[2]) >= world:
                cut(path, first_step)
        self._file = own.open("a")

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
        if self._file is not None:
            self._file.write(json.dumps({"step": step, "samples": sample_N.tolist()}) + "\n")
            self._file.flush()  # to the system, so that a kill of this process loses nothing


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
    logs = sorted(run.glob(LOG_NAMES), key=lambda path: int(path.stem.partition("-")[2]))
    batches: dict[int, list[int]] = {}
    for path in logs:
        for line in path.read_text().splitlines():
            logged = json.loads(line)
            batches.setdefault(logged["step"], []).extend(logged["samples"])
    return dict(sorted(batches.items()))
