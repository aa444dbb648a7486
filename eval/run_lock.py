"""One run in a folder at a time: two would mix their logs and replace each other's checkpoints."""

import errno
import fcntl
import os
from pathlib import Path

from model.stopping import RESTART_CODE
from pipeline.program import InputError

LOCK_NAME = ".lock"


def hold(output: Path, *, is_restart: bool) -> None:
    """Keep other runs out of a folder until this process ends.

    The lock lies on an empty file that stays: nothing is left to remove after a kill. A file system
    without locks is taken as it is.

    Args:
        output: folder of the run, which is there.
        is_restart: whether a launcher has started this run before. What is left of it may then
            need a moment to end, so that another start is asked for.

    Raises:
        InputError: if a run of another process holds it.
    """
    # Open for the life of the process, from which the system takes its locks however it ends.
    descriptor = os.open(output / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process, known to NFS
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        os.close(descriptor)
        raise InputError(
            f"another run is going on in {output}: wait for its end, or choose another --output",
            exit_code=RESTART_CODE if is_restart else None,
        ) from error
