"""The log of samples: cut at a resume, and the same global batches for any number of processes."""

import numpy as np
import pytest

from eval.run_folder import trim_logs
from eval.step_log import StepLog, cut, global_batches
from pipeline.order import Order


def write(run, rank, world, first_step, steps):
    """Steps ``first_step + 1`` to ``steps`` of one rank, as a run has them."""
    order = Order(np.array([9, 20, 11]), 8, 0, 4, 16)
    trim_logs(run, first_step, rank, world)
    with StepLog(run, "samples", rank) as log:
        for step in range(first_step, steps):
            log.write(step + 1, order.batch(step, rank, world).sample)


def test_a_resume_drops_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, 0, 1, 0, 7)
    whole = (tmp_path / "samples-0.jsonl").read_bytes()
    write(tmp_path, 0, 1, 4, 7)
    assert (tmp_path / "samples-0.jsonl").read_bytes() == whole
    assert list(global_batches(tmp_path)) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("rest", [b'{"step": 3, "samp', b'{"step": 3, "samples": [1]}', b"\0\0\n"])
def test_a_half_written_last_line_is_dropped(tmp_path, rest):
    write(tmp_path, 0, 1, 0, 2)
    whole = (tmp_path / "samples-0.jsonl").read_bytes()
    (tmp_path / "samples-0.jsonl").write_bytes(whole + rest)
    cut(tmp_path / "samples-0.jsonl", 5)
    assert (tmp_path / "samples-0.jsonl").read_bytes() == whole


def test_one_then_four_then_two_processes_log_the_batches_of_one(tmp_path):
    write(tmp_path, 0, 1, 0, 12)
    alone = global_batches(tmp_path)
    for first_step, steps, world in ((0, 6, 1), (4, 9, 4), (7, 12, 2)):  # each was killed later
        for rank in range(world):
            write(tmp_path, rank, world, first_step, steps)
    assert global_batches(tmp_path) == alone
    assert len(list(tmp_path.iterdir())) == 4  # ranks 2 and 3 did steps 5 to 7


def test_a_line_is_with_the_system_once_its_step_is_over(tmp_path):
    with StepLog(tmp_path, "samples", 0) as log:
        log.write(1, np.array([5, 3]))
        assert global_batches(tmp_path) == {1: [5, 3]}  # as after a kill at this moment


def test_a_log_of_which_no_line_is_written_is_no_file(tmp_path):
    write(tmp_path, 0, 1, 0, 0)
    assert not list(tmp_path.iterdir())
