"""A process that hangs says where, and ends."""

import os
import subprocess
from pathlib import Path

import pytest

from model.stopping import RESTART_CODE
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
    assert (done.returncode, done.stdout) == (RESTART_CODE, "")
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


def test_a_folder_that_is_gone_leaves_the_stacks_on_standard_error(tmp_path):
    done = run(tmp_path / "nowhere" / "hang-3.txt", "waits_for_ever")
    assert done.returncode == RESTART_CODE
    assert "in waits_for_ever" in done.stderr


def test_zero_seconds_watch_nothing(tmp_path):
    with Watchdog(tmp_path / "hang-0.txt", 0):
        pass
    assert not list(tmp_path.iterdir())
