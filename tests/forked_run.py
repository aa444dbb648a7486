"""Start ``train.py`` as forks of a process that has imported everything: half a second, not six.

No thread may start in the forking process before its last fork, and that rules out pytest: the
programs in ``tests/bench/`` use this, and tests run those.
"""

import argparse
import io
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.utils.tensorboard  # noqa: F401 (what the children would import at run time)
from PIL import Image

import train
from model.checkpoint import file_sha256
from pipeline.program import run_program
from pipeline.shard_format import Sample, write_manifest, write_shard

PICTURES, BATCH = 64, 8
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
    write_manifest(folder, [shard for shard in shards if shard], (), {"program": "tests"})
    return folder


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Life:
    """The processes of one start of a run; what they print goes to ``RUN.RANK.log``.

    Args:
        run: its folder.
        shards: what it trains on.
        steps: length of the run.
        world: number of processes.
        mirror: URL for copies of the checkpoints; each process is then a machine of its own, with
            the folder ``RUN.RANK``.
    """

    def __init__(
        self, run: Path, shards: Path, steps: int, world: int = 2, mirror: str = ""
    ) -> None:
        self.run = run
        self._world = world
        self._port = free_port()
        words = [*FLAGS, "--data.shards", str(shards), "--steps", str(steps)]
        if mirror:
            words += ["--mirror", mirror, "--resume", "auto"]
        elif run.exists():
            words.append("--resume")
        self._machines = world if mirror else 1
        self._pids = [self._start(rank, words) for rank in range(world)]

    def folder(self, rank: int) -> Path:
        """The folder of a process."""
        return self.run if self._machines == 1 else self.run.with_name(f"{self.run.name}.{rank}")

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
                "LOCAL_RANK": str(rank // self._machines),
                "WORLD_SIZE": str(self._world),
                "LOCAL_WORLD_SIZE": str(self._world // self._machines),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self._port),
            }
            sys.argv = ["train.py", *words, "--output", str(self.folder(rank))]
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


def end_of(run: Path, steps: int) -> dict[str, object]:
    """What two runs must have alike: the last checkpoint, file by file, and the losses."""
    folder = run / f"step-{steps:09d}"
    state = json.loads((folder / "state.json").read_text())
    lines = [json.loads(line) for line in (run / "run.jsonl").read_text().splitlines()]
    return {
        **{path.name: file_sha256(path) for path in folder.glob("*.safetensors")},
        "queue_place": state["queue_place"],
        "optimiser": state["optimiser"],
        "losses": [(line["step"], line["loss"]) for line in lines if "loss" in line],
    }


def differing(first: dict[str, object], second: dict[str, object]) -> list[str]:
    """Names of what is not alike, or only on one side."""
    names = first.keys() | second.keys()
    return sorted(name for name in names if first.get(name) != second.get(name))


def compare_lives(
    compare: Callable[..., dict[str, object]], about: str, cycles: int, processes: int = 0
) -> None:
    """The program that compares a run with one that was killed; exit code 1 if anything differs.

    Args:
        compare: from a folder, the number of kills and a seed the last line, with ``equal``; also
            from the number of processes, where that can be given.
        about: what it does, in its first line.
        cycles: kills, unless told otherwise.
        processes: of the run, unless told otherwise; 0 where that cannot be given.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=cycles, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="new folder to keep; default: a temporary one")
    if processes:
        parser.add_argument("--processes", type=int, default=processes, help="of the run")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix=f"{Path(sys.argv[0]).stem}-"))
    folder.mkdir(parents=True, exist_ok=True)
    more = (given.processes,) if processes else ()
    line = compare(folder, given.cycles, given.seed, *more)
    sys.stdout.write(json.dumps(line) + "\n")
    if line["equal"] and not given.folder:
        shutil.rmtree(folder)
    elif not line["equal"]:
        sys.stderr.write(f"what is left of both runs is in {folder}\n")
    sys.exit(0 if line["equal"] else 1)
