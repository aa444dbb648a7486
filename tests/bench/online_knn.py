"""What a kNN score during a run takes from training: beside it, and with the loop waiting for it.

    python tests/bench/online_knn.py

Trains a ResNet-18 on pictures of 64 px that lie in memory and scores it on packed pictures, 1,000
that vote and 250 that are judged. In each of five interleaved rounds 30 steps are timed without a
score, with one that the loop waits for, and with one beside the training, for as many more steps as
it takes. Prints a JSON line for each way: ``pause_s``, what the call took, ``longest_s``, the
longest step with its pause, ``taken_s``, by how much as many steps without a score are faster, and
``score_s``, until the score was there; median and range. ``first`` is the first score of all, which
makes the copy and DALI's first pipelines. On a machine whose cores train and judge the work cannot
vanish: what can is the stop.
"""

import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.online_knn import OnlineKnn
from eval.recipes import RECIPES
from model.encoder import Encoder, EncoderConfig
from model.stopping import Agreement
from pipeline.shard_format import Sample, write_manifest, write_shard

ROUNDS, STEPS, BATCH, SIDE_PX, CLASSES = 5, 30, 32, 64, 10
TRAIN_PICTURES, TEST_PICTURES = 1000, 250


def write_set(folder: Path, count: int, seed: int) -> str:
    """Pack coloured noise whose mean tells the class."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    samples = []
    for number in range(count):
        label = number % CLASSES
        pixels = rng.integers(0, 128, (SIDE_PX, SIDE_PX, 3)) + 12 * label
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90)
        sample = Sample(
            key=f"{number:06d}", picture=file.getvalue(), width=SIDE_PX, height=SIDE_PX, label=label
        )
        samples.append(sample)
    names = tuple(f"class{label}" for label in range(CLASSES))
    write_manifest(folder, [write_shard(folder / "shard-000000.tar", samples)], names, {})
    return str(folder)


class ScoreClock:
    """Stands for the run's report: when the score came."""

    def __init__(self) -> None:
        self.came = 0.0
        self.top1 = 0.0

    def knn(self, _step: int, top1: float) -> None:
        """The score is there."""
        self.came, self.top1 = time.perf_counter(), top1

    def knn_failed(self, step: int, reason: str) -> None:
        """A score that fails is no measurement."""
        raise RuntimeError(f"step {step}: {reason}")


class Training:
    """A network, and the time of its steps with a score after the second one."""

    def __init__(self, train: str, test: str) -> None:
        torch.manual_seed(0)
        data = dataclasses.replace(
            RECIPES["cifar10"].data, image_px=SIDE_PX, eval_resize_px=SIDE_PX
        )
        self._config = dataclasses.replace(
            RECIPES["cifar10"], data=data, knn_train=train, knn_test=test, knn_every=2
        )
        self._encoder = Encoder(EncoderConfig(backbone="resnet18"), image_px=SIDE_PX)
        self._optimizer = torch.optim.SGD(self._encoder.parameters(), lr=1e-4, momentum=0.9)
        self._view_N3HW = torch.randn(BATCH, 3, SIDE_PX, SIDE_PX)
        self._clock = ScoreClock()
        self._judge = OnlineKnn(
            self._config,
            self._encoder.backbone,
            torch.device("cpu"),
            self._clock,  # type: ignore[arg-type]
            is_judge=True,
        )

    def _step(self) -> None:
        self._optimizer.zero_grad()
        self._encoder(self._view_N3HW).square().sum().backward()
        self._optimizer.step()

    def timed(self, way: str) -> dict[str, float]:
        """Seconds of the steps and of what the score took."""
        pause_s, asked, longest_s = 0.0, 0.0, 0.0
        self._clock.came = step = 0
        began = time.perf_counter()
        while step < STEPS or not (self._clock.came or way == "none"):
            before = time.perf_counter()
            self._step()
            called = time.perf_counter()
            if way == "waited for" and step == 2:
                self._judge.after(step, is_last=True)  # as the loop stood: all threads judge
                self._judge.finish(Agreement(2), lambda: 0)
            elif way == "beside" and step >= 2:
                self._judge.after(2 if step == 2 else 1, is_last=False)
            now = time.perf_counter()
            if step == 2:
                asked, pause_s = called, now - called
            longest_s = max(longest_s, now - before)
            step += 1
        return {
            "steps": step,
            "all_s": time.perf_counter() - began,
            "pause_s": pause_s,
            "longest_s": longest_s,
            "score_s": self._clock.came - asked,
        }


def spread(values: list[float]) -> dict[str, object]:
    """Median and range, in seconds."""
    return {
        "median": round(statistics.median(values), 4),
        "range": [round(min(values), 4), round(max(values), 4)],
    }


def main() -> None:
    """Time all in turns and print what came out."""
    found: dict[str, list[dict[str, float]]] = {"none": [], "beside": [], "waited for": []}
    first: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        train = write_set(Path(name) / "train", TRAIN_PICTURES, 0)
        training = Training(train, write_set(Path(name) / "test", TEST_PICTURES, 1))
        for number in range(ROUNDS + 1):
            for way, times in found.items():
                measured = training.timed(way)
                if number:  # the first round compiles kernels and allocates the copy
                    times.append(measured)
                elif way == "beside":
                    first = {name: round(measured[name], 4) for name in ("pause_s", "longest_s")}
    for way, times in found.items():
        plain = [row["all_s"] / STEPS for row in found["none"]]
        taken = [row["all_s"] - row["steps"] * base for row, base in zip(times, plain, strict=True)]
        line: dict[str, Any] = {
            "score": way,
            "step_s": spread([row["all_s"] / row["steps"] for row in times]),
        }
        line["longest_s"] = spread([row["longest_s"] for row in times])
        if way == "beside":
            line["first"] = first
        if way != "none":
            line |= {
                "pause_s": spread([row["pause_s"] for row in times]),
                "score_s": spread([row["score_s"] for row in times]),
                "taken_s": spread(taken),
            }
        line["cores"] = len(os.sched_getaffinity(0))
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
