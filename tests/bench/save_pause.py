"""What a checkpoint at ResNet-50 size takes from training: in the background, in the foreground.

    python tests/bench/save_pause.py

A MoCo v2 run state (ResNet-50 twice, momentum, 65,536 keys) and a training step of its query
encoder on pictures of 64 px. In each of five interleaved rounds the same steps are timed without a
save, with one in the background and with one that the loop waits for. Prints a JSON line for each
of the two: ``pause_s``, what the call itself took, and ``taken_s``, by how much the steps took
longer in all, on a machine whose cores train and write; both as median and range.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.run_state import RunState
from model.saving import Saver

ROUNDS, STEPS, BATCH, SIDE_PX = 5, 12, 8, 64


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
