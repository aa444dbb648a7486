"""What a checkpoint at ResNet-50 size takes from training: time, and memory of the host.

    python tests/bench/save_pause.py

A MoCo v2 run state (ResNet-50 twice, momentum, 65,536 keys) and a training step of its query
encoder on pictures of 64 px.

Memory: peak resident memory of steps with saves above that of the same steps without. Prints a JSON
line for a first save, which has the disk to itself, and one for a save after every step on a disk
that takes longer than a step, with ``waited_s``, how long the loop waited for it, and how many
checkpoints stand whole in the end.

Time: in each of five interleaved rounds the same steps are timed without a save, with one in the
background and with one that the loop waits for. Prints a JSON line for each of the two:
``pause_s``, what the call itself took, and ``taken_s``, by how much the steps took longer in all,
on a machine whose cores train and write; both as median and range.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from model.checkpoint import checkpoint_folders, load_checkpoint
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.run_state import RunState
from model.saving import Saver

ROUNDS, STEPS, BATCH, SIDE_PX = 5, 12, 8, 64
# Of each of the eight files and folders of a checkpoint.
SLOW_FSYNC_S, SAVES, MIB = 0.1, 8, 2**20


def timed(train_step: Callable[[], None], save: Callable[[], None] | None) -> tuple[float, float]:
    """Seconds that a save before the second step took, and that all steps took with it."""
    pause_s = 0.0
    began = time.perf_counter()
    for step in range(STEPS):
        if step == 1 and save is not None:
            called = time.perf_counter()
            save()
            pause_s = time.perf_counter() - called
        train_step()
    return pause_s, time.perf_counter() - began


def peak_mib(work: Callable[[], None]) -> float:
    """Peak resident memory of this process while it does something."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    (line,) = [row for row in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in row]
    return int(line.split()[1]) / 1024


def measure_memory(train_step: Callable[[], None], saver: Saver, run: Path) -> None:
    """Of a first save, and of one after each step on a slow disk."""
    waited_s = 0.0

    def steps(every: int | None) -> None:
        nonlocal waited_s
        for step in range(1, SAVES + 1):
            train_step()
            called = time.perf_counter()
            if every and step % every == 0:
                saver.save(step, {})
            waited_s += time.perf_counter() - called
        saver.finish()

    steps(None)
    without = peak_mib(lambda: steps(None))
    above = {"one save": peak_mib(lambda: steps(SAVES)) - without}
    waited_s, fsync = 0.0, os.fsync
    os.fsync = lambda handle: (time.sleep(SLOW_FSYNC_S), fsync(handle))[1]
    above["a save after each step, slow disk"] = peak_mib(lambda: steps(1)) - without
    os.fsync = fsync
    folders = checkpoint_folders(run)
    whole = sum(load_checkpoint(folder).step == step for step, folder in folders)
    size = sum(path.stat().st_size for path in folders[0][1].iterdir())
    for what, mib in above.items():
        line = {"memory": what, "above_mib": round(mib, 1), "checkpoint_mib": round(size / MIB, 1)}
        if what != "one save":
            line |= {"waited_s": round(waited_s, 2), "saves": SAVES, "whole_checkpoints": whole}
        print(json.dumps(line), flush=True)


def spread(values: list[float]) -> dict[str, object]:
    """Median and range, in seconds."""
    return {
        "median": round(statistics.median(values), 3),
        "range": [round(min(values), 3), round(max(values), 3)],
    }


def main() -> None:
    """Time all in turns and print what came out."""
    torch.manual_seed(0)
    moco = MoCo(EncoderConfig(backbone="resnet50"), MoCoConfig(batch_norm_groups=1), BATCH, 0)
    queue = KeyQueue(65_536, 128, 0)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=1e-4, momentum=0.9)
    view_N3HW = torch.randn(BATCH, 3, SIDE_PX, SIDE_PX)

    def train_step() -> None:
        optimizer.zero_grad()
        moco.encoder_q(view_N3HW).square().sum().backward()
        optimizer.step()

    train_step()
    state = RunState(moco, queue, optimizer, None)
    taken: dict[str, list[tuple[float, float]]] = {"background": [], "foreground": []}
    with tempfile.TemporaryDirectory() as name:
        many = Saver(state, Path(name), keep=SAVES, minutes=0, failed=print)
        measure_memory(train_step, many, Path(name))
    with tempfile.TemporaryDirectory() as name:
        saver = Saver(state, Path(name), keep=2, minutes=0, failed=print)
        for number in range(ROUNDS + 1):
            _, without_s = timed(train_step, None)
            for kind, found in taken.items():

                def save(step: int = number, kind: str = kind) -> None:
                    saver.save(step, {})
                    if kind == "foreground":
                        saver.finish()

                pause_s, with_s = timed(train_step, save)
                saver.finish()
                if number:  # the first round allocates the copy
                    found.append((pause_s, with_s - without_s))
        size = sum(path.stat().st_size for path in Path(name).glob(f"step-*{ROUNDS}/*"))
    for kind, found in taken.items():
        pause, total = zip(*found, strict=True)
        line = {
            "save": kind,
            "pause_s": spread(pause),
            "taken_s": spread(total),
            "bytes": size,
            "step_s": round(without_s / STEPS, 3),
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
