"""Stopping on a signal, and what else all ranks must do after the same step."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from model.collectives import is_distributed
from model.meeting import MissingRankError

# Ctrl-C reaches a process from the terminal and again from its launcher; a person who presses it
# once more than that wants out at once. Schedulers repeat their signals, and mean one save.
PATIENCE = 3
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# EX_TEMPFAIL of sysexits.h: stopped and saved, nothing is wrong, start me again.
RESTART_CODE = 75
# EX_PROTOCOL: hung, or another process is gone. Start me again, but not for ever: it may come back.
LOST_CODE = 76


class StopRequest:
    """Notes the signals after which a run saves and leaves.

    They are SIGINT, SIGTERM, SIGUSR1, and SIGHUP, which says that the terminal was closed; not
    where that is ignored, as by nohup.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._count = 0
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self._count += number == signal.SIGINT
        if self._count >= PATIENCE:
            os.write(sys.stderr.fileno(), b"stopping at once\n")
            os._exit(128 + number)


def exit_code(number: int) -> int:
    """What a stopped run leaves with: 130 after Ctrl-C, else the code that asks for a restart."""
    return 128 + number if number == signal.SIGINT else RESTART_CODE


# What the back ends say when the process at the other end is gone; they have no class for it.
LOST = re.compile(
    r"Connection (closed|reset) by|Broken pipe|Socket (Timeout|closed)|remote process (exited|has)"
    r"|NCCL communicator was aborted|Connection refused|wait timeout|Timed out waiting",
    re.IGNORECASE,
)


def has_lost_a_rank(error: BaseException) -> bool:
    """Whether an error of a collective says that another process of the run is gone."""
    is_lost = isinstance(error, RuntimeError) and bool(LOST.search(str(error)))
    return is_lost or isinstance(error, MissingRankError)


@contextmanager
def may_be_started_again() -> Iterator[None]:
    """Around a run, which leaves with a code that says so where another start goes on with it.

    When another process is gone, with one line and ``LOST_CODE``. At a scheduler's signal while it
    starts, when there is nothing to save yet, at once and with ``RESTART_CODE``; ``StopRequest``
    takes over from that.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(RESTART_CODE))
    try:
        yield
    except RuntimeError as error:
        if not has_lost_a_rank(error):
            raise
        reason = str(error).strip().splitlines()[0]
        what = "missing" if isinstance(error, MissingRankError) else "gone"
        sys.stderr.write(
            f"[rank {os.environ.get('RANK', '0')}] another process of this run is {what}: ended, "
            f"--resume goes on from the last checkpoint ({reason})\n"
        )
        sys.exit(LOST_CODE)


class Agreement:
    """What one rank wants to do, all ranks do, after the same step.

    The ranks' wishes are combined by a small all-reduce on the CPU that runs during the step and
    is read at its end, so asking costs no waiting; the answer is one step late.

    Args:
        count: number of wishes.
    """

    def __init__(self, count: int) -> None:
        self._group: Any = dist.new_group(backend="gloo") if is_distributed() else None
        self._wishes = torch.zeros(count, dtype=torch.int32)
        self._work: dist.Work | None = None

    def on(self, *wishes: int) -> list[int]:
        """The largest of all ranks' wishes of the step before; 0 stands for none.

        Every rank calls it once after each step, and all get one answer.
        """
        if self._group is None:
            return list(wishes)
        agreed = [0] * len(wishes)
        if self._work is not None:
            self._work.wait()
            agreed = [int(wish) for wish in self._wishes]
        self._wishes.copy_(torch.tensor(wishes, dtype=torch.int32))
        self._work = dist.all_reduce(
            self._wishes, op=dist.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed
