"""One job after another in parallel processes: progress, a clean stop, no orphans."""

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_process
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from types import ModuleType
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Shared:
    """What the worker processes and the program share."""

    done: "Synchronized[int]"
    """For the progress bar, in units of the job's own."""
    stopping: Event


_shared: Shared | None = None


def _start_worker(shared: Shared) -> None:
    global _shared  # a pool has no other way to hand a worker shared memory
    _shared = shared
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # libtiff writes a line to standard error for every odd tag; reasons travel as exceptions.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with_parent() -> None:
    """A worker waits for work for ever; without the program there will be none."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for_process([parent.sentinel])
        os._exit(1)


def advance(count: int) -> None:
    """Called by a job: so much more of it is done.

    Raises:
        InterruptedError: if the program is stopping; the job cleans up and ends.
    """
    if _shared is not None:
        with _shared.done.get_lock():
            _shared.done.value += count
        if _shared.stopping.is_set():
            raise InterruptedError(errno.EINTR, "stopped")


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
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    shared = Shared(context.Value("q", 0), context.Event())
    with ProcessPoolExecutor(
        min(workers, len(jobs)), context, initializer=_start_worker, initargs=(shared,)
    ) as pool:
        # Ctrl-C reaches every process of the terminal: blocked here, so that the workers, which
        # inherit it, never see one, and the program alone answers it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with _an_empty_program():
            futures: dict[Future[Result], int] = {
                pool.submit(work, job): number for number, job in enumerate(jobs)
            }
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        try:
            waiting = set(futures)
            while waiting:
                ended, waiting = wait(waiting, timeout=0.1)
                for future in ended:
                    finished(futures[future], future.result())
                progress(shared.done.value)
        except BaseException:
            shared.stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
