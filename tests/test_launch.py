"""eval/launch.py leaves with a code that says what to do; two machines end together."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.launch import code_of
from model.checkpoint import load_checkpoint
from model.stopping import LOST_CODE, RESTART_CODE
from tests.forked_run import FLAGS, free_port
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
# A process as train.py is one to a launcher: told by its rank how it ends, or by a signal.
ENDS = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, _: (time.sleep(0.2), os._exit(75)))
code = int(sys.argv[1:][int(os.environ["RANK"])])
os.write(1, b"begun\\n")  # at once: print makes two writes where output is not buffered
if code < 0:
    os.kill(os.getpid(), -code)
if code != 99:
    sys.exit(code)
time.sleep(60)
"""


def agent(folder, script, *words, python=None, machine="", processes=2):
    """The launcher of a machine, started; ``machine`` are its flags where it is one of several."""
    flags = ["--nproc-per-node", str(processes), *machine.split()]
    return subprocess.Popen(
        [*(python or [sys.executable]), ROOT / "eval" / "launch.py", *flags, script, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([2, 2], 2),
        ([76, 2, 76], 2),
        ([1, 76], 1),
        ([130, 75], 130),
        ([75, 75], RESTART_CODE),
        ([75, 76], LOST_CODE),
        ([-9], LOST_CODE),
    ],
)
def test_what_must_not_be_started_again_decides(codes, expected):
    assert code_of(codes) == expected


@pytest.mark.parametrize(("codes", "expected"), [("0 0", 0), ("2 2", 2), ("99 -9", LOST_CODE)])
def test_the_launcher_leaves_with_the_code_of_its_processes(tmp_path, codes, expected):
    (tmp_path / "ends.py").write_text(ENDS)
    launcher = agent(tmp_path, "ends.py", *codes.split(), python=warm_python())
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == expected, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_launcher_reaches_its_processes_and_asks_for_a_restart(tmp_path, number):
    (tmp_path / "ends.py").write_text(ENDS)
    launcher = agent(tmp_path, "ends.py", "99", "99", python=warm_python())
    assert [launcher.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
    launcher.send_signal(number)
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == RESTART_CODE, err


def test_a_launcher_whose_first_machine_does_not_come_asks_for_a_restart(tmp_path):
    where = f"--nnodes 2 --node-rank 1 --master-addr 127.0.0.1 --master-port {free_port()}"
    machine = f"{where} --rdzv-conf timeout=1"
    launcher = agent(tmp_path, "ends.py", python=warm_python(), machine=machine)
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == LOST_CODE
    assert "the agents of the machines have not met" in err.splitlines()[-1]


def test_a_wrong_flag_of_the_launcher_is_one_line(tmp_path):
    launcher = agent(tmp_path, "ends.py", python=warm_python(), processes="many")
    _, err = launcher.communicate(timeout=100)
    assert launcher.returncode == 2
    assert "many" in err.splitlines()[-1] and "Traceback" not in err


def two_machines(folder, *words):
    """The launchers of two machines, of one process each, that train."""
    flags = f"--nnodes 2 --master-addr 127.0.0.1 --master-port {free_port()} --node-rank"
    return [
        agent(folder, ROOT / "train.py", *words, machine=f"{flags} {number}", processes=1)
        for number in range(2)
    ]


def end(machines, codes):
    """What the first machine's process has printed, once both have left with these codes."""
    said = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == codes, said
    return said[0][0]


def wait_for_step(machines, step):
    for line in machines[0].stdout:
        if line.startswith(f"step {step}/"):
            return
    raise AssertionError(machines[0].stderr.read())


@pytest.mark.slow
def test_two_machines_leave_together_and_go_on_to_the_same_end(shard_set, tmp_path):
    words = (*FLAGS, "--data.shards", shard_set, "--steps", "300", "--output")
    run = (*words, "run", "--resume", "auto")
    first = two_machines(tmp_path, *run)
    wait_for_step(first, 5)
    first[1].send_signal(signal.SIGTERM)  # to one of the two, as when its pod is evicted
    stopped = re.search(r"stopped by SIGTERM after step (\d+)", end(first, [RESTART_CODE] * 2))
    second = two_machines(tmp_path, *run)
    wait_for_step(second, int(stopped[1]) + 8)
    children = Path(f"/proc/{second[1].pid}/task/{second[1].pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)  # one process
    end(second, [LOST_CODE] * 2)
    assert "resumed after step" in end(two_machines(tmp_path, *run), [0, 0])
    end(two_machines(tmp_path, *words, "whole"), [0, 0])
    ends = [load_checkpoint(tmp_path / name / "step-000000300") for name in ("run", "whole")]
    assert [path.read_bytes() for path in sorted(ends[0].folder.glob("*.safetensors"))] == [
        path.read_bytes() for path in sorted(ends[1].folder.glob("*.safetensors"))
    ]
