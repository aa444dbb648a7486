"""Processes meet: whatever an earlier start has left behind, and within a time."""

import os
import subprocess
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from model.stopping import LOST_CODE
from tests.forked_run import free_port
from tests.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[1]
MEETS = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from model.collectives import rank
from model.meeting import meet
meet(60)
store = dist.distributed_c10d._get_default_store()
has_old_keys = store.check(["of an earlier start"])
dist.barrier()
store.set("of an earlier start", "")
print(rank(), has_old_keys, flush=True)
os._exit(75)
"""
ENDS = """
import sys
sys.path.insert(0, sys.argv[1])
from model.meeting import meet
from model.stopping import may_be_started_again
with may_be_started_again():
    meet(1)
"""


def started(rank, port, start):
    """A process as an agent of torch starts it, which keeps one store for all starts."""
    agent = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": str(start),
    }
    command = [*warm_python(), "-c", MEETS, str(ROOT)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **agent}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_that_are_started_again_have_a_store_without_the_addresses_of_the_first():
    patience = timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=patience)
    for start in range(3):
        both = [started(rank, store.port, start) for rank in range(2)]
        watchdog = threading.Timer(60, lambda both=both: [one.kill() for one in both])
        watchdog.start()
        try:
            assert [one.stdout.readline() for one in both] == ["0 False\n", "1 False\n"]
        finally:
            watchdog.cancel()
            for one in both:
                one.kill()
                one.communicate()


@pytest.mark.parametrize(
    ("comes", "says"),
    [
        (0, "of 3 processes rank 1, 2 did not come within 1 s"),
        (2, "rank 0 does not answer at 127.0.0.1:{port} within 1 s"),
    ],
)
def test_who_waits_in_vain_says_for_whom_and_asks_for_a_restart(comes, says):
    port = free_port()
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **where, "RANK": str(comes)}
    command = [*warm_python(), "-c", ENDS, str(ROOT)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == LOST_CODE
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"[rank {comes}] another process of this run is missing: ended")
    assert says.format(port=port) in last
