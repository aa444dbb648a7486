"""Stopping on a signal, at the same step on all ranks."""

import os
import signal
import sys
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from model.collectives import is_distributed

# Ctrl-C reaches a process from the terminal and again from its launcher; a person who presses it
# once more than that wants out at once.
PATIENCE = 3


class StopRequest:
    """Turns SIGINT and SIGTERM into a stop that all ranks take after the same step.

    The ranks' flags are combined by a small all-reduce on the CPU that runs during the step and is
    read at its end, so asking costs no waiting; a stop comes one step after its signal.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._count = 0
        self._group: Any = dist.new_group(backend="gloo") if is_distributed() else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._count += 1
        if self._count >= PATIENCE:
            os.write(sys.stderr.fileno(), b"stopping at once\n")
            os._exit(128 + number)

    def agreed(self) -> bool:
        """Whether to stop now; every rank calls it once after each step and gets one answer."""
        if self._group is None:
            return bool(self.signal)
        if self._work is not None:
            self._work.wait()
            if self._flag.item():
                self.signal = self.signal or int(self._flag.item())
                return True
        self._flag.fill_(self.signal)
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return False
