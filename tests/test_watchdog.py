"""A process that hangs says where, and ends."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from model.stopping import LOST_CODE
from model.watchdog import Watchdog
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import ctypes, sys, threading, time
from pathlib import Path
from model.watchdog import Watchdog

def waits_for_ever(): time.sleep(60)
def holds_the_lock(): ctypes.PyDLL(None).sleep(60)
def beats(): [(time.sleep(0.1), dog.beat()) for _ in range(25)]
def pauses():
    with dog.paused(): time.sleep(2.5)

threading.Thread(target=waits_for_ever, daemon=True).start()
with Watchdog(Path(sys.argv[1]), float(sys.argv[3])) as dog:
    globals()[sys.argv[2]]()
print("went on")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(dump, what, seconds=0.5):
    return subprocess.run(
        [*warm_python(), "-c", PROGRAM, dump, what, str(seconds)],
        cwd=ROOT,
        env={**os.environ, "RANK": "3"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_hang_leaves_the_stacks_of_all_threads_and_a_code_that_asks_for_a_restart(tmp_path):
    done = run(tmp_path / "hang-3.txt", "waits_for_ever")
    assert (done.returncode, done.stdout) == (LOST_CODE, "")
    assert "[rank 3] no step for" in done.stderr and "hang-3.txt" in done.stderr
    dump = (tmp_path / "hang-3.txt").read_text()
    assert dump.startswith("rank 3, ")
    assert dump.count("in waits_for_ever") == 2  # the main thread and the other one
    assert "in <module>" in dump


def test_a_hang_that_holds_pythons_lock_is_ended_too(tmp_path):
    done = run(tmp_path / "hang-3.txt", "holds_the_lock")
    assert (done.returncode, done.stdout) == (1, "")
    assert "in holds_the_lock" in done.stderr


@pytest.mark.parametrize("what", ["beats", "pauses"])
def test_who_beats_or_has_said_that_it_pauses_goes_on(tmp_path, what):
    # Long for a beat that a busy machine holds up, and shorter than all of them or the pause.
    done = run(tmp_path / "hang-3.txt", what, seconds=2.0)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")
    assert not list(tmp_path.iterdir())


TWO_RANKS = """
import os, sys, threading, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
import torch.distributed as dist
from model.stopping import may_be_started_again
from model.watchdog import Watchdog

def sleeps_for_ever(): time.sleep(600)
def stands_by(): time.sleep(600)

@may_be_started_again()
def main():
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    threading.Thread(target=stands_by, daemon=True).start()
    with Watchdog(Path(f"hang-{{rank}}.txt"), 3.0) as dog:
        for step in range(100):
            if rank == 0 and step == 4:  # the one that waits was heard of last
                time.sleep(0.3)
                dog.beat()
            dist.all_reduce(torch.ones(1))
            dog.beat()
            if rank == 1 and step == 3:
                sleeps_for_ever()

main()
"""


def assert_both_left_their_stacks(folder):
    waits, sleeps = ((folder / f"hang-{rank}.txt").read_text() for rank in range(2))
    assert waits.startswith("rank 0, ") and "in all_reduce" in waits
    assert sleeps.startswith("rank 1, ") and "in sleeps_for_ever" in sleeps
    assert "in stands_by" in waits and "in stands_by" in sleeps


def test_ranks_that_hang_together_all_leave_their_stacks_and_ask_for_a_restart(tmp_path):
    (tmp_path / "hang.py").write_text(TWO_RANKS.format(root=str(ROOT)))
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [*warm_python(), "hang.py"],
            cwd=tmp_path,
            env={**os.environ, **where, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [LOST_CODE] * 2, errors
    assert all(f"[rank {rank}] no step for" in text for rank, text in enumerate(errors)), errors
    assert_both_left_their_stacks(tmp_path)


@pytest.mark.slow
def test_accelerate_launch_ends_when_all_ranks_hang(tmp_path):
    (tmp_path / "hang.py").write_text(TWO_RANKS.format(root=str(ROOT)))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
              "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", str(free_port()), "hang.py"]  # fmt: skip
    done = subprocess.run(
        launch,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1 and f"exitcode: {LOST_CODE}" in done.stderr.replace("  :", ":")
    assert_both_left_their_stacks(tmp_path)


def test_a_folder_that_is_gone_leaves_the_stacks_on_standard_error(tmp_path):
    done = run(tmp_path / "nowhere" / "hang-3.txt", "waits_for_ever")
    assert done.returncode == LOST_CODE
    assert "in waits_for_ever" in done.stderr


def test_zero_seconds_watch_nothing(tmp_path):
    with Watchdog(tmp_path / "hang-0.txt", 0):
        pass
    assert not list(tmp_path.iterdir())
