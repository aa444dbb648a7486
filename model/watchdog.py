"""Ends a process that hangs, and leaves where every one of its threads stood.

A rank that waits for ever, for data or for another rank, makes all others wait in their next
collective. So each rank watches itself: the ranks' dumps come within a step of each other, and the
one whose stack is not in a collective is the one to look at.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from model.stopping import LOST_CODE

# Where a thread that hangs holds Python's lock, this one cannot run: then faulthandler's own timer,
# which needs no lock, dumps and ends the process (with code 1) after as much more of the time.
GRACE = 0.2
# Looks between a rank's dump and its end: the first one that ended would break the others'
# collectives, and its launcher stops them, before they have left theirs.
LINGER = 5
STDERR = 2  # the descriptor: sys.stderr may be anything


class Watchdog:
    """A context; within it ``beat`` must be called at least every ``seconds``.

    Args:
        dump: file that the stacks are written to; it is made when there is something to write.
        seconds: without a beat, after which the process ends with ``LOST_CODE``; 0 for never.
    """

    def __init__(self, dump: Path, seconds: float) -> None:
        self._dump = dump
        self._seconds = seconds
        self._look_s = min(seconds / 10, 1.0)
        self._last = time.monotonic()
        self._is_paused = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self.beat()
        if self._seconds > 0:
            self._arm(0.0)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Say that the run goes on."""
        self._last = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what may take as long as it likes."""
        self._is_paused = True
        yield
        self.beat()
        self._is_paused = False

    def _watch(self) -> None:
        while not self._over.wait(self._look_s):
            if self._is_paused:
                self.beat()
            silent_s = time.monotonic() - self._last
            if silent_s >= self._seconds:
                self._end(silent_s)
            self._arm(silent_s)

    def _arm(self, silent_s: float) -> None:
        left_s = self._seconds * (1 + GRACE) - silent_s
        faulthandler.dump_traceback_later(left_s, exit=True, file=STDERR)

    def _end(self, silent_s: float) -> None:
        rank = os.environ.get("RANK", "0")
        faulthandler.dump_traceback_later(2 * LINGER * self._look_s, exit=True, file=STDERR)
        try:
            with self._dump.open("a") as file:
                file.write(f"rank {rank}, {time.strftime('%F %T')}, silent for {silent_s:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file)
            where = f"its threads' stacks are in {self._dump}"
        except OSError:
            where = "its threads' stacks:"
            faulthandler.dump_traceback(STDERR)
        line = f"[rank {rank}] no step for {silent_s:.0f} s (--hang-seconds): ended; {where}\n"
        os.write(STDERR, line.encode())
        time.sleep(LINGER * self._look_s)
        # At once: whatever would be cleaned up may hang as well.
        os._exit(LOST_CODE)
