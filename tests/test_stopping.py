"""A signal stops the loop after a whole step, on all ranks after the same one."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from model.collectives import rank
from model.stopping import RESTART_CODE, STOPPING, Agreement, StopRequest, exit_code
from tests.run_in_processes import run_in_processes
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]


def loop(steps, signals):
    """The step that a loop stopped after, and for which signal.

    ``signals`` are (rank, step, number): what a process gets in the middle of which step.
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    stop, agreement, step = StopRequest(), Agreement(1), 0
    stopped_by = 0
    try:
        while step < steps:
            step += 1
            for who, when, number in signals:
                if (who, when) == (rank(), step):
                    os.kill(os.getpid(), number)
            time.sleep(0.005)
            (stopped_by,) = agreement.on(stop.signal)
            if stopped_by:
                break
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return step, int(stopped_by)


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_the_loop_after_the_step_that_it_came_in(number):
    assert loop(10, [(0, 4, number)]) == (4, number)


def test_without_a_signal_the_loop_goes_to_its_end():
    assert loop(5, []) == (5, 0)


def test_a_signal_to_one_rank_stops_both_one_step_later():
    signals = [(1, 4, int(signal.SIGTERM))]
    assert run_in_processes(2, loop, 10, signals) == [(5, signal.SIGTERM)] * 2


def test_two_ranks_without_a_signal_go_to_the_end():
    assert run_in_processes(2, loop, 5, []) == [(5, 0)] * 2


def wishes(own):
    """The answers to what a rank wishes, step by step."""
    agreement = Agreement(2)
    return [agreement.on(*wish) for wish in own[rank()]]


def test_each_wish_is_agreed_on_by_itself_one_step_later():
    own = [[(0, 0), (3, 0), (0, 0), (0, 0)], [(0, 1), (2, 0), (0, 0), (0, 0)]]
    answers = [[0, 0], [0, 1], [3, 0], [0, 0]]
    assert run_in_processes(2, wishes, own) == [answers, answers]


def test_a_closed_terminal_stops_a_run_unless_it_is_to_be_ignored():
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == 0
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        stop = StopRequest()
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.signal == signal.SIGHUP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_only_ctrl_c_asks_for_no_restart():
    assert [exit_code(number) for number in STOPPING] == [130, 75, 75, 75]


def test_a_scheduler_may_repeat_its_signals_while_the_run_saves():
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        stop = StopRequest()
        for number in (signal.SIGTERM, signal.SIGUSR1) * 3:
            os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_schedulers_signal_while_a_run_starts_asks_for_a_restart(number):
    program = (
        "import os\n"
        "from model.stopping import may_be_started_again\n"
        "with may_be_started_again():\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run(
        [*warm_python(), "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (RESTART_CODE, "", "")


def test_a_second_signal_is_the_launchers_echo_and_a_third_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from model.stopping import StopRequest\n"
        "stop = StopRequest()\n"
        "for count in range(1, 4):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(count, bool(stop.signal), flush=True)\n"
    )
    done = subprocess.run(
        [*warm_python(), "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "1 True\n2 True\n"
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "stopping at once\n")
