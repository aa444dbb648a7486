"""Kill a run on two machines at random moments, lose their disks too, resume it from its mirror.

    python tests/bench/lost_machines.py --cycles 10

Each of the two processes stands for a machine: a folder of its own, nothing shared but an S3 server
on loopback. At each kill both folders are deleted; about half of the kills come while a checkpoint
is uploaded. Final weights, optimiser and queue and the logged losses must equal, bit by bit, those
of a run that was left alone. Prints a JSON line per cycle and a last one with ``cycles``,
``equal`` and how many kills ``left_half_uploaded`` checkpoints.

The processes are forks (``tests/forked_run.py``) and run ``train.py``, whole, over gloo.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.remote_checkpoints import complete_steps
from model.checkpoint import step_in
from tests.forked_run import (
    PATIENCE_S,
    RUN_S,
    Life,
    compare_lives,
    differing,
    end_of,
    free_port,
    write_set,
)
from tests.s3_server import Bucket, environment_of, running_s3

MIRROR, PREFIX = "s3://bucket/run", "run/"
STEPS_PER_CYCLE, AIM_STEPS = 14, 12
WAIT_S = 30.0


def serve(port: int) -> int:
    """An S3 server in a process of its own, because forks of this one may follow; its number."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs every request
    with running_s3(port):
        signal.pause()
    os._exit(0)


def steps_in(bucket: Bucket) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints that are uploaded, and of those that are half there."""
    sizes = dict.fromkeys((name.removeprefix(PREFIX) for name in bucket.names(PREFIX)), 0)
    whole = complete_steps(sizes)
    begun = {step_in(name.split("/")[0]) for name in sizes if "/" in name}
    return whole, sorted(step for step in begun if step is not None and step not in whole)


def kill_once(run: Path, shards: Path, steps: int, draw: random.Random, bucket: Bucket) -> Any:
    """A life of both machines and its end; what is left of it."""
    life = Life(run, shards, steps, mirror=MIRROR)
    goal = draw.randint(1, AIM_STEPS)
    life.wait_for(lambda: life.steps() >= goal)
    aim = draw.choice(["upload", "step"])
    if aim == "upload":
        life.wait_for(lambda: bool(steps_in(bucket)[1]))
    life.kill(draw.choice([[0, 1], [1, 0]]), 0.0)
    codes = life.end(PATIENCE_S)
    for rank in range(2):
        shutil.rmtree(life.folder(rank), ignore_errors=True)
    whole, half = steps_in(bucket)
    return {"aim": aim, "exit_codes": codes, "uploaded": whole, "half_uploaded": half}


def compare(folder: Path, cycles: int, seed: int) -> dict[str, object]:
    """Run once without and once with kills; the last line of this program."""
    port = free_port()
    server = serve(port)
    try:
        with environment_of(f"http://127.0.0.1:{port}"):
            return compare_with(folder, cycles, seed, port)
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def compare_with(folder: Path, cycles: int, seed: int, port: int) -> dict[str, object]:
    """Likewise, with the server at this port."""
    started = time.monotonic()
    shards, steps = write_set(folder / "shards"), cycles * STEPS_PER_CYCLE
    whole, killed = folder / "whole", folder / "killed"
    if Life(whole, shards, steps).end(RUN_S) != [0, 0]:
        raise SystemExit(f"the run without kills failed: see {whole}.*.log")
    bucket = reached(port)
    draw, half = random.Random(seed), 0
    for number in range(cycles):
        line = kill_once(killed, shards, steps, draw, bucket)
        half += bool(line["half_uploaded"])
        sys.stdout.write(json.dumps({"cycle": number + 1, **line}) + "\n")
        sys.stdout.flush()
    last = Life(killed, shards, steps, mirror=MIRROR)
    if last.end(RUN_S) != [0, 0]:
        raise SystemExit(f"the last resume failed: see {killed}.*.log")
    first, second = end_of(whole, steps), end_of(last.folder(0), steps)
    return {
        "cycles": cycles,
        "equal": first == second and steps in steps_in(bucket)[0],
        "differs": differing(first, second),
        "steps": steps,
        "left_half_uploaded": half,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def reached(port: int) -> Bucket:
    """The bucket of a server that may still be starting."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return Bucket(("127.0.0.1", port), "bucket")
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    compare_lives(compare, __doc__ or "", cycles=10)
