"""SIGKILL a run of two processes at random moments, resume it, compare with one never killed.

    python tests/bench/kill_resume.py --cycles 50

Final weights, optimiser and queue, the logged losses and the log of sample ids must be equal bit
by bit. Kills are drawn by ``--seed``: while a run starts, between and in steps, while a checkpoint
is written; both processes at once, one shortly after the other, or one alone, which must end the
other. Prints a JSON line per cycle and a last one with ``cycles`` and ``equal``.

The processes are forks of this one, which has imported everything already; what they run is
``train.py``, whole, over gloo. So no thread may start in this process before the last fork.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

import numpy as np
import torch.utils.tensorboard  # noqa: F401 (what the children would import at run time)
from PIL import Image

import train
from eval.sample_log import LOG_NAMES, global_batches
from model.checkpoint import checkpoint_folders, file_sha256
from pipeline.program import run_program
from pipeline.shard_format import Sample, write_manifest, write_shard

WORLD, PICTURES, BATCH = 2, 64, 8
AIM_STEPS, STEPS_PER_CYCLE = 8, 20  # so that the run outlasts all cycles
PATIENCE_S, RUN_S = 120.0, 900.0
FLAGS = ["demo", "--encoder.backbone", "test_resnet", "--encoder.stem", "imagenet",
         "--encoder.dim", "16", "--moco.queue", "20", "--batch", str(BATCH), "--data.threads", "1",
         "--data.engine", "torchvision", "--data.image-px", "16", "--data.eval-resize-px", "16",
         "--log-every", "1", "--log-samples", "--save-every", "3"]  # fmt: skip


def write_set(folder: Path) -> Path:
    """Small JPEGs of noise in four shards."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    shards = []
    for number in range(4):
        samples = []
        for place in range(PICTURES // 4):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(buffer, "JPEG")
            samples.append(
                Sample(key=f"{number}-{place}", picture=buffer.getvalue(), width=24, height=24)
            )
        shards.append(write_shard(folder / f"shard-{number:06d}.tar", samples))
    write_manifest(folder, [shard for shard in shards if shard], (), {"program": "kill_resume"})
    return folder


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Life:
    """The processes of one start of a run; what they print goes to ``RUN.RANK.log``."""

    def __init__(self, run: Path, shards: Path, steps: int) -> None:
        self.run = run
        self._port = free_port()
        words = [*FLAGS, "--data.shards", str(shards), "--output", str(run), "--steps", str(steps)]
        if run.exists():
            words.append("--resume")
        self._pids = [self._start(rank, words) for rank in range(WORLD)]

    def _start(self, rank: int, words: list[str]) -> int:
        log = os.open(f"{self.run}.{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        pid = os.fork()
        if pid:
            os.close(log)
            return pid
        code: object = 1
        try:
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(WORLD),
                "LOCAL_WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
            }
            sys.argv = ["train.py", *words]
            run_program(train.main, (train.CheckpointError, train.EncoderError))
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:  # never back into the parent's code
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)

    def steps(self) -> int:
        """Steps that this life has reported."""
        return Path(f"{self.run}.0.log").read_text().count("\nstep ")

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(self.run.glob(".step-*.part"))

    def wait_for(self, happens: Callable[[], bool]) -> None:
        """Until something happens or a process ends."""
        deadline = time.monotonic() + PATIENCE_S
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while not happens() and not any(os.waitid(os.P_PID, pid, flags) for pid in self._pids):
            if time.monotonic() > deadline:
                raise SystemExit(f"nothing happens any more: see {self.run}.*.log")
            time.sleep(0.0005)

    def kill(self, ranks: list[int], apart_s: float) -> None:
        """SIGKILL these, one after the other; whoever is left must end by itself."""
        for rank in ranks:
            os.kill(self._pids[rank], signal.SIGKILL)
            time.sleep(apart_s)

    def end(self, patience_s: float) -> list[int]:
        """Exit codes by rank, minus the signal for those killed by one."""
        return [
            exit_code(pid, f"{self.run}.{rank}.log", patience_s)
            for rank, pid in enumerate(self._pids)
        ]


def exit_code(pid: int, log: str, patience_s: float) -> int:
    """How a process ended; it is given time to."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    raise SystemExit(f"a process did not end within {patience_s:.0f} s: see {log}")


def newest_step(run: Path) -> int:
    """Of the newest finished checkpoint, 0 without one."""
    return max((step for step, _ in checkpoint_folders(run)), default=0)


def kill_once(run: Path, shards: Path, steps: int, draw: random.Random) -> dict[str, object]:
    """A life and its violent end; what happened."""
    life = Life(run, shards, steps)
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
    ranks = draw.choice([[0, 1], [1, 0], [0], [1]])
    life.kill(ranks, draw.choice([0.0, 0.003]))
    codes = life.end(PATIENCE_S)
    if any(codes[rank] != -signal.SIGKILL for rank in ranks) or 0 in codes:
        raise SystemExit(f"the run ended by itself with {codes}: see {run}.*.log")
    return {"aim": aim, "killed": ranks, "exit_codes": codes, "half_written": life.is_saving(),
            "newest": newest_step(run)}  # fmt: skip


def contents(run: Path, steps: int) -> dict[str, object]:
    """What must be equal: the last checkpoint, file by file, the samples and the losses."""
    folder = run / f"step-{steps:09d}"
    state = json.loads((folder / "state.json").read_text())
    lines = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return {
        **{path.name: file_sha256(path) for path in folder.glob("*.safetensors")},
        "queue_place": state["queue_place"],
        "optimiser": state["optimiser"],
        "losses": [(line["step"], line["loss"]) for line in lines],
        **{path.name: path.read_text() for path in run.glob(LOG_NAMES)},
    }


def compare(folder: Path, cycles: int, seed: int) -> dict[str, object]:
    """Run once without and once with kills; the last line of this program."""
    shards, steps = write_set(folder / "shards"), cycles * STEPS_PER_CYCLE
    started = time.monotonic()
    whole, killed = folder / "whole", folder / "killed"
    if Life(whole, shards, steps).end(RUN_S) != [0] * WORLD:
        raise SystemExit(f"the run without kills failed: see {whole}.*.log")
    draw = random.Random(seed)
    seen: Counter[str] = Counter()
    for number in range(cycles):
        line = kill_once(killed, shards, steps, draw)
        seen.update({str(line["aim"]): 1, "half_written": int(bool(line["half_written"]))})
        sys.stdout.write(json.dumps({"cycle": number + 1, **line}) + "\n")
        sys.stdout.flush()
    if Life(killed, shards, steps).end(RUN_S) != [0] * WORLD:
        raise SystemExit(f"the last resume failed: see {killed}.*.log")
    first, second = contents(whole, steps), contents(killed, steps)
    batches = global_batches(killed)
    return {
        "cycles": cycles,
        "equal": first == second and list(batches) == list(range(1, steps + 1)),
        "differs": sorted(
            name for name in first.keys() | second.keys() if first.get(name) != second.get(name)
        ),
        "steps": steps,
        "aimed_at": {aim: seen[aim] for aim in ("start", "step", "save")},
        "left_half_written": seen["half_written"],
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    """Kill, resume, compare; exit code 1 if anything differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=50, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="new folder to keep; default: a temporary one")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="kill-resume-"))
    folder.mkdir(parents=True, exist_ok=True)
    line = compare(folder, given.cycles, given.seed)
    sys.stdout.write(json.dumps(line) + "\n")
    if line["equal"] and not given.folder:
        shutil.rmtree(folder)
    elif not line["equal"]:
        sys.stderr.write(f"both runs are left in {folder}\n")
    sys.exit(0 if line["equal"] else 1)


if __name__ == "__main__":
    main()
