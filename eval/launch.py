"""Start train.py on every GPU of this machine, for schedulers, and leave with its exit code.

    python eval/launch.py --nproc-per-node gpu train.py RECIPE --data.shards SHARDS --output RUN

Flags before ``train.py`` are torchrun's, whose agent this is. torchrun and `accelerate launch`
leave with 1 whatever happened, which does not tell a scheduler a wrong input, which stays wrong,
from a run that was evicted. They die of SIGUSR1, too, and give the processes 30 s to save.
"""

import os
import signal
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path

from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import get_args_parser, run

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.stopping import LOST_CODE, RESTART_CODE, exit_code
from pipeline.program import InputError, first_line, run_program

# For saving and copying, after a signal: the scheduler's own limit comes before it.
SAVE_S = 3600


def main() -> None:
    """One start of the processes of this machine."""
    # Of torch 2.15; older ones give 30 s.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVE_S))
    parser = get_args_parser()
    parser.description = __doc__
    parser.formatter_class = RawDescriptionHelpFormatter
    given = parser.parse_args()
    # The agent stops its processes when it ends; once it has any it handles SIGTERM itself.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: sys.exit(RESTART_CODE))
    try:
        run(given)
    except ChildFailedError as error:
        sys.exit(code_of(failure.exitcode for failure in error.failures.values()))
    except SignalException as error:
        sys.exit(exit_code(error.sigval))
    except (RendezvousError, DistNetworkError, DistStoreError) as error:
        sys.stderr.write(f"the agents of the machines have not met: {first_line(error)}\n")
        sys.exit(LOST_CODE)
    except ValueError as error:
        raise InputError(f"torchrun: {error}") from error


def code_of(codes: Iterable[int]) -> int:
    """The exit code for those of processes that have failed; below 0 it is a signal's number.

    What must not be started again comes first: the others fail too when one leaves.
    """
    found = set(codes)
    for code in (InputError.exit_code, 1, 128 + signal.SIGINT):
        if code in found:
            return code
    return RESTART_CODE if found == {RESTART_CODE} else LOST_CODE


if __name__ == "__main__":
    run_program(main)
