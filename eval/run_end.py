"""How the processes of a run end: none before all have done their last work."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from model.collectives import is_distributed
from model.stopping import Agreement
from pipeline.program import InputError, exit_code_of

POLL_S = 0.05


def finish_together(agreement: Agreement, work: Callable[[], None]) -> None:
    """Do the last work of this process, and wait for that of the others.

    Launchers take a process that has left for one that failed or is done, and end the others soon:
    accelerate and torchrun 30 s after a run was stopped, in the midst of a large checkpoint or of
    its copy. All wait in short collectives, so that none of them meets a time limit.

    Args:
        agreement: on two wishes, with which nothing else is agreed any more.
        work: of this process; runs in a thread.

    Raises:
        InputError: if that of another process failed, which says why itself.
        Exception: what ``work`` raises.
    """
    if not is_distributed():
        work()
        return
    with ThreadPoolExecutor(1, "finish") as executor:
        future = executor.submit(work)
        agreement.on(1, 0)  # its answer is that to the call before
        while True:
            is_done = future.done()
            error = future.exception() if is_done else None
            code = exit_code_of(error) if error else 0
            goes_on, worst = agreement.on(not is_done, code)
            if not goes_on:
                break
            time.sleep(POLL_S)
    future.result()
    if worst:
        raise InputError(
            "the last work of another process of this run failed; its line says why",
            exit_code=worst,
        )
