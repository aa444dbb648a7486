"""A run goes on with 1, then 4, then 2 processes: the same samples in the same global batches?

    python tests/bench/world_change.py

Each part but the last is killed by SIGKILL in the middle. Prints one JSON line: ``equal``, whether
the samples of each step, in the order of the ranks, are those of one process that was never
stopped.
"""

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.step_log import global_batches
from tests.forked_run import RUN_S, Life, write_set

WORLDS, STEPS, STEPS_OF_A_PART = (1, 4, 2), 24, 7  # three epochs of eight steps


def main() -> None:
    """Run both, compare; exit code 1 if a batch differs."""
    with tempfile.TemporaryDirectory() as name:
        shards = write_set(Path(name) / "shards")
        whole, changed = Path(name) / "whole", Path(name) / "changed"
        codes = Life(whole, shards, STEPS, 1).end(RUN_S)
        for world in WORLDS[:-1]:
            life = Life(changed, shards, STEPS, world)
            life.wait_for(lambda life=life: life.steps() >= STEPS_OF_A_PART)  # type: ignore[misc]
            life.kill(list(range(world)), 0.0)
            life.end(RUN_S)
        codes += Life(changed, shards, STEPS, WORLDS[-1]).end(RUN_S)
        first, second = global_batches(whole), global_batches(changed)
        logs = {path.stem for path in changed.glob("samples-*.jsonl")}
    line = {
        "worlds": WORLDS,
        "equal": first == second and list(first) == list(range(1, STEPS + 1)),
        "steps": STEPS,
        "processes_that_logged": len(logs),
        "exit_codes": codes,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.exit(0 if line["equal"] and not any(codes) else 1)


if __name__ == "__main__":
    main()
