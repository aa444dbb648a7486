"""No process leaves a run before all have done their last work."""

import time

import pytest

from eval.run_end import finish_together
from model.collectives import rank
from model.stopping import Agreement
from pipeline.program import InputError
from tests.run_in_processes import run_in_processes


def finish(seconds, error):
    """How a process ends, and when, whose first rank's last work takes so long."""

    def work():
        if rank() == 0:
            time.sleep(seconds)
            if error:
                raise OSError(error)

    agreement = Agreement(2)
    agreement.on(0, 1)  # of the loop before
    try:
        finish_together(agreement, work)
    except (InputError, OSError) as problem:
        return str(problem), time.time()
    return "", time.time()


def test_all_wait_for_the_one_that_still_saves():
    began = time.time()
    ends = run_in_processes(2, finish, 1.0, "")
    assert [said for said, _ in ends] == ["", ""]
    assert min(when for _, when in ends) >= began + 1.0


def test_an_error_of_one_ends_all():
    first, second = run_in_processes(2, finish, 0.0, "disk full")
    assert first[0] == "disk full"
    assert "the last work of another process" in second[0]


def test_alone_it_is_a_call():
    assert finish(0.0, "")[0] == ""
    with pytest.raises(OSError, match="full"):
        finish_together(Agreement(2), lambda: (_ for _ in ()).throw(OSError("full")))
