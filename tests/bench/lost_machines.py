"""Kill a run on two machines at random moments, lose their disks too, resume it from its mirror.

    python tests/bench/lost_machines.py --cycles 10

Each of the two processes stands for a machine: a folder of its own, nothing shared but an S3 server
on loopback. At each kill both folders are deleted. In four kinds of cycles, in random order, the
kill comes while a checkpoint is uploaded; between any two steps; after the store went away, in half
of them before it was back, so that a start without folder and store must fail with code 75; and
while a slow store is checkpoints behind. Final weights, optimiser and queue, logged losses and
samples must equal, bit by bit, those of a run that was left alone. Prints a JSON line per cycle and
a last one with ``cycles``, ``equal``, how many kills ``left_half_uploaded`` checkpoints and how
many cycles had an outage or a slow store.

The processes are forks (``tests/forked_run.py``) and run ``train.py``, whole, over gloo.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.remote_checkpoints import complete_steps
from eval.step_log import global_batches
from model.checkpoint import step_in
from model.stopping import RESTART_CODE
from tests.fault_proxy import proxy_to
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
KINDS = ("upload", "outage", "step", "slow")
STEPS_PER_CYCLE, AIM_STEPS = 20, 12
STEPS_AWAY = 7  # without the store: two saves
SLOW_BYTES_PER_S = 1_000_000  # a checkpoint takes seconds, a save comes several times a second
WAIT_S = 30.0


@dataclass(frozen=True)
class Store:
    """A server of its own, whose clients pass a proxy that a file's content disturbs."""

    port: int
    behaviour: Path
    bucket: Bucket

    def be(self, how: str) -> None:
        """``away``, ``slow`` or, with "", as it should."""
        part = self.behaviour.with_suffix(".part")
        part.write_text(how)
        part.replace(self.behaviour)


def serve(ports: tuple[int, int], behaviour: Path) -> int:
    """An S3 server and the proxy before it, in a process of their own; its number.

    Forks of this process follow, so it must not have their threads.
    """
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs every request
    faults = {"": None, "away": ("drop",), "slow": None}
    slow = {**faults, "slow": ("throttle", SLOW_BYTES_PER_S)}
    with running_s3(ports[0]) as address, proxy_to(*address, ports[1]) as proxy:
        proxy.fault = lambda *_: faults[behaviour.read_text()]
        proxy.write_fault = lambda *_: slow[behaviour.read_text()]
        signal.pause()
    os._exit(0)


def steps_in(bucket: Bucket) -> tuple[list[int], list[int]]:
    """Steps of the checkpoints that are uploaded, and of those that are half there."""
    sizes = dict.fromkeys((name.removeprefix(PREFIX) for name in bucket.names(PREFIX)), 0)
    whole = complete_steps(sizes)
    begun = {step_in(name.split("/")[0]) for name in sizes if "/" in name}
    return whole, sorted(step for step in begun if step is not None and step not in whole)


def kill_once(life: Life, kind: str, draw: random.Random, store: Store) -> dict[str, Any]:
    """Bring a life of both machines to its end and lose them; what is left."""
    goal, is_back = draw.randint(1, AIM_STEPS), False
    before = steps_in(store.bucket)[0]
    if kind == "slow":
        store.be("slow")
    life.wait_for(lambda: life.steps() >= goal)
    if kind == "upload":
        life.wait_for(lambda: bool(steps_in(store.bucket)[1]))
    elif kind == "slow":
        life.wait_for(lambda: life.steps() >= goal + STEPS_AWAY)
        life.wait_for(lambda: steps_in(store.bucket)[0] != before)
    elif kind == "outage":
        store.be("away")
        life.wait_for(lambda: life.steps() >= goal + STEPS_AWAY)
        if is_back := draw.random() < 0.5:
            before = steps_in(store.bucket)[0]
            store.be("")
            life.wait_for(lambda: steps_in(store.bucket)[0] != before)
    life.kill(draw.choice([[0, 1], [1, 0]]), 0.0)
    codes = life.end(PATIENCE_S)
    lose(life)
    whole, half = steps_in(store.bucket)
    left = {"exit_codes": codes, "uploaded": whole, "half_uploaded": half}
    return {"kind": kind, "store_was_back": is_back, **left}


def lose(life: Life) -> None:
    """Both disks."""
    for rank in range(2):
        shutil.rmtree(life.folder(rank), ignore_errors=True)


def compare(folder: Path, cycles: int, seed: int) -> dict[str, object]:
    """Run once without and once with kills; the last line of this program."""
    ports, behaviour = (free_port(), free_port()), folder / "store"
    behaviour.write_text("")
    server = serve(ports, behaviour)
    try:
        with environment_of(f"http://127.0.0.1:{ports[1]}"):
            return compare_with(folder, cycles, seed, Store(ports[0], behaviour, reached(ports[0])))
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)


def compare_with(folder: Path, cycles: int, seed: int, store: Store) -> dict[str, object]:
    """Likewise, with this store."""
    started = time.monotonic()
    shards, steps = write_set(folder / "shards"), cycles * STEPS_PER_CYCLE
    whole, killed = folder / "whole", folder / "killed"
    if Life(whole, shards, steps).end(RUN_S) != [0, 0]:
        raise SystemExit(f"the run without kills failed: see {whole}.*.log")
    draw, half = random.Random(seed), 0
    kinds = [kind for _ in range(cycles) for kind in draw.sample(KINDS, len(KINDS))][:cycles]
    for number, kind in enumerate(kinds):
        life = Life(killed, shards, steps, mirror=MIRROR)
        line = kill_once(life, kind, draw, store)
        if kind == "outage" and not line["store_was_back"]:
            line["without_folder_and_store"] = refused_start(killed, shards, steps)
        store.be("")
        half += bool(line["half_uploaded"])
        sys.stdout.write(json.dumps({"cycle": number + 1, **line}) + "\n")
        sys.stdout.flush()
    last = Life(killed, shards, steps, mirror=MIRROR)
    if last.end(RUN_S) != [0, 0]:
        raise SystemExit(f"the last resume failed: see {killed}.*.log")
    first = {**end_of(whole, steps), "samples": samples_of(whole)}
    second = {**end_of(last.folder(0), steps), "samples": samples_of(*map(last.folder, range(2)))}
    return {
        "cycles": cycles,
        "equal": first == second and steps in steps_in(store.bucket)[0],
        "differs": differing(first, second),
        "steps": steps,
        "left_half_uploaded": half,
        **{name: kinds.count(name) for name in ("outage", "slow")},
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def refused_start(run: Path, shards: Path, steps: int) -> list[int]:
    """Exit codes of a start without folder and store, which must not train nor leave anything."""
    life = Life(run, shards, steps, mirror=MIRROR)
    codes = life.end(PATIENCE_S)
    left = [str(life.folder(rank)) for rank in range(2) if life.folder(rank).exists()]
    if codes != [RESTART_CODE, RESTART_CODE] or left:
        raise SystemExit(f"codes {codes}, left {left}: see {run}.*.log")
    return codes


def samples_of(*folders: Path) -> dict[int, list[int]]:
    """The samples of each step, from the logs of all processes, wherever they lie."""
    parts = [global_batches(folder) for folder in folders]
    steps = sorted({step for part in parts for step in part})
    return {step: [n for part in parts for n in part.get(step, [])] for step in steps}


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
