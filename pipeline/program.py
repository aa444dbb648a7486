"""How every program of this project ends: one clear line for a wrong input, exit code 2."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

# What a person can do about an operating-system error, by its number.
WAYS_OUT = {
    errno.ENOSPC: "the disk is full: free some space or choose a folder on another disk",
    errno.EDQUOT: "the disk quota is used up: free some space or choose a folder on another disk",
    errno.EFBIG: "the file would be larger than is allowed here: choose another folder",
    errno.EACCES: "no permission: choose a folder that you may read and write",
    errno.EPERM: "no permission: choose a folder that you may read and write",
    errno.EROFS: "the disk is read-only: choose a folder on another disk",
    errno.EEXIST: "a file of that name is in the way: choose another name or remove it",
    errno.ENOENT: "no such file or folder: check the path",
    errno.ENOTDIR: "a part of the path is a file, not a folder: check the path",
    errno.EISDIR: "this is a folder where a file is needed: check the path",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter path",
}


class InputError(ValueError):
    """Something a person can put right: the message names it, its value and the way out.

    Args:
        message: one line.
        exit_code: that the program leaves with, where it is not that of the class.
    """

    exit_code = 2

    def __init__(self, message: object = "", *, exit_code: int | None = None) -> None:
        super().__init__(message)
        if exit_code is not None:
            self.exit_code = exit_code


class DataError(InputError):
    """An input error that one process of many may be alone with, so that each one reports it."""


def available_cores() -> int:
    """Cores that this process may use, which a container or a scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def error_console() -> "Console":
    """The place for errors: standard error, one unbroken line for each message."""
    # Here, because every worker imports this file, and rich takes it 0.03 s.
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def explain(error: OSError) -> str | None:
    """One line for the errors that a person can put right, else None."""
    if error.errno not in WAYS_OUT:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{WAYS_OUT[error.errno]}"


def first_line(error: Exception) -> str:
    """Of what an error says, or else its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_code_of(error: BaseException) -> int:
    """The code that a program leaves with at an error of a person's."""
    return error.exit_code if isinstance(error, InputError) else InputError.exit_code


def run_program(main: Callable[[], None], input_errors: tuple[type[Exception], ...] = ()) -> None:
    """Run ``main`` and leave with the code that a shell script can rely on.

    0 done, 2 wrong input (one line on standard error), 130 interrupted, 143 terminated. A defect
    of the program itself keeps its traceback; MOCOSTREAM_TRACEBACK=1 shows one for wrong input
    too. Of several processes, which meet the same wrong input, the first one speaks.

    Args:
        main: the program.
        input_errors: further exceptions that stand for a wrong input.
    """
    # A polite kill unwinds the program, so that it can clean up after itself.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    expected: tuple[type[Exception], ...] = (InputError, OSError, *input_errors)
    try:
        main()
    except KeyboardInterrupt:
        error_console().print("interrupted", style="yellow")
        sys.exit(128 + signal.SIGINT)
    except expected as error:
        line = explain(error) if isinstance(error, OSError) else str(error)
        if line is None or os.environ.get("MOCOSTREAM_TRACEBACK"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0 or isinstance(error, DataError):
            place = f"[rank {rank}] " if rank else ""
            text = f"{place}error: {line}"
            error_console().print(text, style="red", markup=False, emoji=False)
        sys.exit(exit_code_of(error))
