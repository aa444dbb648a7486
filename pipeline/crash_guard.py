"""A picture that ends its worker, or keeps it busy for ever, costs itself and not the packing.

Decoders are C code that reads what strangers made. Each worker notes which picture it has in hand.
When one dies, the pictures that were in hand are decoded again, each in a process of its own; the
one that dies once more is to blame and is refused by name. A picture that takes longer than allowed
is to blame at once, and its worker is ended from outside; one that is decoded alone by the system's
alarm.
"""

import json
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from pipeline.entry_list import Entry, EntryList
from pipeline.packing import IN_HAND, Plan, read_blamed, read_picture
from pipeline.program import InputError
from pipeline.shard_format import atomic_file
from pipeline.unfinished import IN_HAND_NAME, WORK_NAME, blamed_path
from pipeline.validate import Limits, RefusedError, StoredForm, accept_picture
from pipeline.worker_pool import run_jobs

TIRED_OF_TRYING = 3  # times that workers died and no picture was to blame
CRASHED = "crashed its decoder"


@dataclass(frozen=True)
class Probe:
    """A picture that is decoded once more, alone."""

    entry: Entry
    limits: Limits
    form: StoredForm
    max_seconds: int
    """0: any time."""


def probe(job: Probe) -> None:
    """Do with a picture what packing does; a decoder that hangs ends with its process."""
    signal.alarm(job.max_seconds)
    with suppress(OSError, RefusedError):
        data, _ = read_picture(job.entry, job.limits)
        accept_picture(data, job.limits, job.form)
    signal.alarm(0)


@dataclass
class CrashGuard:
    """Watches the workers of one packing."""

    plan: Plan
    max_seconds: int
    """For one picture; 0: any time."""
    _deaths: int = 0
    _overdue: dict[tuple[int, int], str] = field(default_factory=dict)
    _looked_s: float = 0.0

    def begin(self) -> None:
        """Forget what workers of an earlier run had in hand."""
        for path in (self.plan.output / WORK_NAME).glob(f"{IN_HAND_NAME}*"):
            path.unlink(missing_ok=True)

    def watch(self) -> None:
        """End the worker of a picture that takes too long; looks once a second."""
        now = time.monotonic()
        if not self.max_seconds or now - self._looked_s < 1:
            return
        self._looked_s = now
        for shard, (count, process, since_s) in self._in_hand().items():
            if now - since_s > self.max_seconds and (shard, count) not in self._overdue:
                self._overdue[shard, count] = self._too_long()
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)

    def settle(self) -> None:
        """After a worker died: find the picture that is to blame.

        Raises:
            InputError: if none is, several times, so that something else ends the workers.
        """
        guilty = dict(self._overdue)
        self._overdue.clear()
        if not guilty:
            for shard, (count, _, _) in self._in_hand().items():
                if (entry := self._entry(shard, count)) and (reason := self._fault_of(entry)):
                    guilty[shard, count] = reason
        for (shard, count), reason in guilty.items():
            blamed = read_blamed(self.plan.output, shard) | {count: reason}
            with atomic_file(blamed_path(self.plan.output, shard)) as file:
                file.write(json.dumps(blamed).encode())
        self._deaths = 0 if guilty else self._deaths + 1
        if self._deaths == TIRED_OF_TRYING:
            raise InputError(
                f"the workers were ended from outside {TIRED_OF_TRYING} times, and no picture is "
                "to blame; was the memory used up? Try fewer --workers or a lower --max-pixels"
            )
        self.begin()

    def _too_long(self) -> str:
        return f"took too long: more than {self.max_seconds} s"

    def _fault_of(self, entry: Entry) -> str:
        """What a picture does to a process of its own, or "" if nothing."""
        started = time.monotonic()
        job = Probe(entry, self.plan.limits, self.plan.form, self.max_seconds)
        try:
            run_jobs(probe, [job], 1, lambda *_: None, lambda _: None)
        except BrokenProcessPool:
            is_late = self.max_seconds and time.monotonic() - started > self.max_seconds
            return self._too_long() if is_late else CRASHED
        return ""

    def _in_hand(self) -> dict[int, tuple[int, int, float]]:
        found = {}
        for path in (self.plan.output / WORK_NAME).glob(f"{IN_HAND_NAME}*"):
            with suppress(OSError):
                data = path.read_bytes()
                if len(data) == IN_HAND.size:
                    found[int(path.name.removeprefix(IN_HAND_NAME))] = IN_HAND.unpack(data)
        return found

    def _entry(self, shard: int, count: int) -> Entry | None:
        entries = EntryList(self.plan.list_folder, self.plan.count, self.plan.seed)
        try:
            found = islice(entries.read(*self.plan.places_of(shard)), count, None)
            return next((entry for _, entry in found), None)
        finally:
            entries.close()
