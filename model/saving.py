"""When a run saves, and that it trains on meanwhile.

The training loop waits for the copy of its state to the host only. A thread writes, hashes and
fsyncs it, outside Python's lock, and one save is over before the next one copies: where the disk
is slower than saves come, the loop goes at the speed of the disk, with one copy in memory.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from model.checkpoint import folder_name, save_checkpoint
from model.run_state import RunState, Snapshot

# Of waiting for the disk, after which it is said; again after ten times as much.
TELL_AFTER_S = 1.0


class Copies(Protocol):
    """Takes finished checkpoints to another place, in its own time."""

    def take(self, folder: Path) -> None:
        """Copy this one next."""

    def in_hand(self) -> frozenset[Path]:
        """Folders that must stay until they are copied."""

    def finish(self) -> None:
        """Wait for the last copy."""

    @property
    def uncopied(self) -> Path | None:
        """The last folder taken, if it could not be copied."""


class Saver:
    """Writes the checkpoints of a run; every rank has one, the first rank's writes.

    A context, at whose end also a run that an error ends has its last checkpoint copied.

    Args:
        state: what is saved.
        run: folder of the run.
        keep: checkpoints that stay.
        minutes: time between two saves after which ``is_wanted`` says so; 0 for never.
        failed: told of a save that could not be written, and why; called from the thread.
        waited: told by a save, with its step, how many seconds all have waited for those before.
        copies: takes each checkpoint elsewhere, once it stands; on another rank than the first it
            is told of each, whose folder is not there.
    """

    def __init__(
        self,
        state: RunState,
        run: Path,
        *,
        keep: int,
        minutes: float,
        failed: Callable[[int, OSError], None],
        waited: Callable[[int, float], None] = lambda *_: None,
        copies: Copies | None = None,
    ) -> None:
        self._state = state
        self._run = run
        self._keep = keep
        self._minutes = minutes
        self._failed = failed
        self._waited = waited
        self._waited_s, self._tell_after_s = 0.0, TELL_AFTER_S
        self._copies = copies
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._join()
            if self._copies:
                self._copies.finish()

    def is_wanted(self) -> bool:
        """Whether this rank's clock asks for a save; ranks have to agree on one."""
        is_late = time.monotonic() - self._last >= self._minutes * 60
        return self._minutes > 0 and is_late and not self._is_writing()

    def save(self, step: int, identity: dict[str, Any]) -> None:
        """Copy the state and begin to write it; every rank calls it after the same step.

        A disk that is full or gone costs this save, not the run and not the older checkpoints.

        Raises:
            RuntimeError: if encoders or queue differ between ranks, which is a defect.
        """
        began = time.monotonic()
        self._join()
        self._waited_s += time.monotonic() - began
        if self._waited_s >= self._tell_after_s:
            self._waited(step, self._waited_s)
            self._tell_after_s = 10 * self._waited_s
        if self._error is not None and not isinstance(self._error, OSError):
            raise self._error
        snapshot = self._state.snapshot(step, identity)
        self._last = time.monotonic()
        if snapshot is not None:
            self._error = None
            self._thread = threading.Thread(target=self._write, args=(snapshot,), name="saver")
            self._thread.start()
        elif self._copies:
            self._copies.take(self._run / folder_name(step))

    @property
    def uncopied(self) -> Path | None:
        """The last checkpoint, after ``finish``, if it could not be copied."""
        return self._copies.uncopied if self._copies else None

    def finish(self) -> None:
        """Wait for the last save and its copy.

        Raises:
            OSError: if it could not be written.
        """
        self._join()
        if self._error is not None:
            raise self._error
        if self._copies:
            self._copies.finish()

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        try:
            spared = self._copies.in_hand() if self._copies else frozenset()
            what = snapshot.step, snapshot.tensors, snapshot.state
            folder = save_checkpoint(self._run, *what, self._keep, spared)
            if self._copies:
                self._copies.take(folder)
        except OSError as error:
            self._error = error
            self._failed(snapshot.step, error)
        except Exception as error:  # a defect: raised in the loop, by the next call
            self._error = error
