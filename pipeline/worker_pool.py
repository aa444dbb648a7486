"""One job after another in parallel processes: progress, a clean stop, no orphans."""

import errno
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait as wait_for_process
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
TELL_EVERY_S = 0.05  # locks of several processes take longer than a small picture's header
Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shared:
    """What the worker processes and the program share."""

    done: "Synchronized[int]"
    """For the progress bar, in units of the job's own."""
    stopping: Event


_shared: Shared | None = None
_has_failed = False
_untold = 0
_told_s = -math.inf


def _start_worker(shared: Shared, environment: dict[str, str]) -> None:
    global _shared  # a pool has no other way to hand a worker shared memory
    _shared = shared
    os.environ.clear()  # is that of the time when the server began
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # libtiff writes a line to standard error for every odd tag; reasons travel as exceptions.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with_parent() -> None:
    """A worker waits for work for ever; without the program there will be none."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_process([parent.sentinel])
        os._exit(1)


def _run(work: Callable[[Job], Result], job: Job) -> Result:
    """A job; after one that failed this process begins no other, the program is about to end."""
    global _has_failed
    if _has_failed:
        raise InterruptedError(errno.EINTR, "stopped")
    try:
        return work(job)
    except BaseException:
        _has_failed = True
        raise


def advance(count: int) -> None:
    """Called by a job: so much more of it is done.

    Raises:
        InterruptedError: if the program is stopping; the job cleans up and ends.
    """
    global _untold, _told_s
    _untold += count
    now = time.monotonic()
    if _shared is None or now - _told_s < TELL_EVERY_S:
        return
    with _shared.done.get_lock():
        _shared.done.value += _untold
    _untold, _told_s = 0, now
    if _shared.stopping.is_set():
        raise InterruptedError(errno.EINTR, "stopped")


def warm_up(work: Callable[[Any], Any]) -> ForkServerContext | SpawnContext:
    """Start what makes worker processes; it imports the module of ``work`` while we go on.

    Forking this program itself could deadlock, it has threads. A server that has none and has
    imported everything once makes a worker in milliseconds instead of 0.2 s.
    """
    forkserver.set_forkserver_preload([work.__module__])
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # The server starts it where it does not run, which lets Ctrl-C through again.
    resource_tracker.ensure_running()
    try:
        with _without_ctrl_c(), _environment(PYTHONPATH=path, OPENBLAS_NUM_THREADS="1"):
            forkserver.ensure_running()
    except OSError:  # no room for its socket, or too long a path to it
        return multiprocessing.get_context("spawn")
    return multiprocessing.get_context("forkserver")


@contextmanager
def _environment(**changes: str) -> Iterator[None]:
    """Other variables for the processes that start in here."""
    before = os.environ.copy()
    os.environ.update(changes)
    try:
        yield
    finally:
        for name in changes.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: before[name] for name in changes.keys() & before.keys()})


@contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that start in here never see the Ctrl-C that reaches all of a terminal.

    They inherit that it is blocked, so that the program alone answers it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _an_empty_program() -> Iterator[None]:
    """Processes that start in here import what their job needs, not the whole program as well.

    Each would else read its command line in a tenth of a second, and torch in seconds.
    """
    program = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = program


def run_jobs(
    work: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    finished: Callable[[int, Result], None],
    progress: Callable[[int], None],
) -> None:
    """Run ``work`` on every job; the first failure stops the others and is raised.

    Args:
        work: importable by name; runs in another process and calls ``advance``.
        jobs: at least one.
        workers: most processes at once.
        finished: told the number of a job and its result, as they end, in this process.
        progress: told the sum of what all jobs advanced, several times a second.
    """
    context = warm_up(work)
    shared = Shared(context.Value("q", 0), context.Event())
    with ProcessPoolExecutor(
        min(workers, len(jobs)),
        context,
        initializer=_start_worker,
        initargs=(shared, dict(os.environ)),
    ) as pool:
        with _without_ctrl_c(), _an_empty_program():
            futures: dict[Future[Result], int] = {
                pool.submit(_run, work, job): number for number, job in enumerate(jobs)
            }
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=0.1)
                # In their order: jobs not begun after a failure come after the one that failed.
                for future in sorted(ended, key=futures.__getitem__):
                    finished(futures[future], future.result())
                progress(shared.done.value)
        except BaseException:
            shared.stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
