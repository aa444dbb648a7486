"""SIGKILL a run of several processes at random moments, resume it, compare with one never killed.

    python tests/bench/kill_resume.py --cycles 50

Final weights, optimiser and queue, the logged losses and the log of sample ids must be equal bit
by bit. Kills are drawn by ``--seed``: while a run starts, between and in steps, while a checkpoint
is written; all processes at once, one shortly after the other, or, once they have met, one alone,
after which the others must end by themselves with the exit code that asks for a restart. Prints a
JSON line per cycle and a last one with ``cycles`` and ``equal``.

The processes are forks (``tests/forked_run.py``) and run ``train.py``, whole, over gloo.
"""

import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.step_log import global_batches, logs_of
from model.checkpoint import checkpoint_folders
from model.stopping import LOST_CODE
from tests.forked_run import PATIENCE_S, RUN_S, Life, compare_lives, differing, end_of, write_set

AIM_STEPS, STEPS_PER_CYCLE = 8, 20  # so that the run outlasts all cycles


def newest_step(run: Path) -> int:
    """Of the newest finished checkpoint, 0 without one."""
    return max((step for step, _ in checkpoint_folders(run)), default=0)


def kill_once(
    run: Path, shards: Path, steps: int, world: int, draw: random.Random
) -> dict[str, object]:
    """A life and its violent end; what happened."""
    life, every = Life(run, shards, steps, world), list(range(world))
    aim = draw.choices(["start", "step", "save"], [1, 4, 5])[0]
    if aim == "start":
        life.wait_for(run.exists)  # else there would be nothing to resume
        time.sleep(draw.uniform(0, 0.5))
    else:
        goal = draw.randint(1, AIM_STEPS)
        life.wait_for(lambda: life.steps() >= goal)
        if aim == "save":
            life.wait_for(life.is_saving)
        time.sleep(draw.uniform(0, 0.008))
    ranks = draw.choice([every, every[::-1], every[:1], every[-1:]])
    if aim == "start":  # before they have met none can know that another is gone: launchers do
        ranks = every
    life.kill(ranks, draw.choice([0.0, 0.003]))
    codes = life.end(PATIENCE_S)
    if [
        c for rank, c in enumerate(codes) if c != (-signal.SIGKILL if rank in ranks else LOST_CODE)
    ]:
        raise SystemExit(f"after a kill of {ranks} the run ended with {codes}: see {run}.*.log")
    return {"aim": aim, "killed": ranks, "exit_codes": codes, "half_written": life.is_saving(),
            "newest": newest_step(run)}  # fmt: skip


def samples_of(run: Path) -> dict[str, object]:
    """The samples that each process has logged."""
    return {path.name: path.read_text() for path in logs_of(run, "samples")}


def compare(folder: Path, cycles: int, seed: int, world: int) -> dict[str, object]:
    """Run once without and once with kills; the last line of this program."""
    shards, steps = write_set(folder / "shards"), cycles * STEPS_PER_CYCLE
    started = time.monotonic()
    whole, killed = folder / "whole", folder / "killed"
    if any(Life(whole, shards, steps, world).end(RUN_S)):
        raise SystemExit(f"the run without kills failed: see {whole}.*.log")
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(cycles):
        line = kill_once(killed, shards, steps, world, draw)
        seen.update({str(line["aim"]): 1, "half_written": int(bool(line["half_written"]))})
        sys.stdout.write(json.dumps({"cycle": number + 1, **line}) + "\n")
        sys.stdout.flush()
    if any(Life(killed, shards, steps, world).end(RUN_S)):
        raise SystemExit(f"the last resume failed: see {killed}.*.log")
    first, second = (end_of(run, steps) | samples_of(run) for run in (whole, killed))
    batches = global_batches(killed)
    return {
        "cycles": cycles,
        "processes": world,
        "equal": first == second and list(batches) == list(range(1, steps + 1)),
        "differs": differing(first, second),
        "steps": steps,
        "aimed_at": {aim: seen[aim] for aim in ("start", "step", "save")},
        "left_half_written": seen["half_written"],
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }


if __name__ == "__main__":
    compare_lives(compare, __doc__ or "", cycles=50, processes=2)
