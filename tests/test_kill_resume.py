"""A run that is killed again and again, or has its processes changed, is the same run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.warm_python import warm_python

BENCH = Path(__file__).resolve().parent / "bench"


def last_line(program, *words):
    """What the program says in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*warm_python(), BENCH / program, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_three_times_ends_as_one_never_killed():
    line = last_line("kill_resume.py", "--cycles", "3")
    assert (line["cycles"], line["equal"]) == (3, True)
    assert line["left_half_written"] >= 1  # this seed's kills come while checkpoints are written


def test_with_four_processes_too_whose_gradients_may_be_added_up_in_many_orders():
    line = last_line("kill_resume.py", "--cycles", "1", "--processes", "4")
    assert (line["cycles"], line["processes"], line["equal"]) == (1, 4, True)


def test_two_machines_that_are_lost_twice_end_as_if_they_had_not_been():
    line = last_line("lost_machines.py", "--cycles", "2")
    assert (line["cycles"], line["equal"]) == (2, True)
    assert (line["outage"], line["slow"]) == (1, 1)  # this seed's kinds of cycles


@pytest.mark.slow
def test_a_run_killed_fifty_times_ends_as_one_never_killed():
    line = last_line("kill_resume.py", "--cycles", "50")
    assert (line["cycles"], line["equal"]) == (50, True)
    assert line["left_half_written"] >= 5


def test_one_then_four_then_two_processes_see_the_global_batches_of_one():
    line = last_line("world_change.py")
    assert line["equal"]
    assert line["processes_that_logged"] == 4
