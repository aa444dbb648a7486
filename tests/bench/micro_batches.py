"""Memory and speed of a step in micro-batches against the same step at once, on a CPU.

    python tests/bench/micro_batches.py

Memory: forward and backward pass of the recipe cifar10 (ResNet-18 at 32 px, eight norm groups) with
64 random pictures, as PyTorch's allocator sees it. Weights, queue and views are there before and do
not count. Prints a JSON line for each number of micro-batches: ``peak_mib`` with gradients, which
alone are ``gradients_mib``, ``ratio`` of it to the whole batch's, and the loss, which must not
change.

Speed: steps of cifar10, optimiser included, and of the smaller network of the recipe demo, whole
and in micro-batches in turns. Prints for each ``images_per_s``, and ``ratio`` to the whole batch in
the same round; median and quartiles.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.recipes import RECIPES
from model.key_queue import KeyQueue
from model.micro_batches import MicroBatches
from model.moco import MoCo
from model.optimiser import make_optimiser
from model.step_memory import bytes_of
from tests.allocated import allocated_at_most

BATCH, PARTS, MIB, SIDE_PX = 64, (1, 2, 4), 2**20, 32
ROUNDS, TURN_S = 15, 1.0


class Steps:
    """Steps of a recipe, each in so many micro-batches."""

    def __init__(self, recipe: str, parts: int) -> None:
        torch.manual_seed(0)
        config = RECIPES[recipe]
        self.moco = MoCo(config.encoder, config.moco, BATCH, 0, SIDE_PX, BATCH // parts)
        queue = KeyQueue(config.moco.queue, config.encoder.dim, 0)
        self._passes = MicroBatches(self.moco, self.moco, queue, config.moco.temperature)
        self._optimizer = make_optimiser(config.optimiser, self.moco.parameters())
        self._views = torch.randn(2, BATCH, 3, SIDE_PX, SIDE_PX)

    def pass_both_ways(self) -> float:
        """Leave the gradients of a step; its loss."""
        return self._passes.run(self._views, None, 0)[0].item()

    def images_per_s(self) -> float:
        """Speed of as many whole steps as fit into a turn, at least one."""
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < TURN_S:
            self.pass_both_ways()
            self._optimizer.step()
            self._optimizer.zero_grad()
            count += 1
        return count * BATCH / (time.perf_counter() - began)


def measure_memory(parts: int) -> dict[str, float]:
    """Memory and loss of one step from a fresh start."""
    steps, losses = Steps("cifar10", parts), []
    peak = allocated_at_most(lambda: losses.append(steps.pass_both_ways()))
    return {
        "peak_mib": round(peak / MIB, 1),
        "gradients_mib": round(bytes_of(steps.moco.trained_parameters()) / MIB, 1),
        "loss": round(losses[0], 5),
    }


def spread(values: list[float], digits: int) -> dict[str, object]:
    """Median and quartiles."""
    low, median, high = (round(value, digits) for value in statistics.quantiles(values, n=4))
    return {"median": median, "quartiles": [low, high]}


def measure_speed(recipe: str) -> None:
    """Whole and cut in turns, in another order in each round."""
    ways = {parts: Steps(recipe, parts) for parts in PARTS}
    found: dict[int, list[float]] = {parts: [] for parts in PARTS}
    for number in range(ROUNDS + 1):
        for place in range(len(PARTS)):
            parts = PARTS[(number + place) % len(PARTS)]
            speed = ways[parts].images_per_s()
            if number:  # the first round warms up
                found[parts].append(speed)
    for parts, speeds in found.items():
        ratios = [cut / whole for cut, whole in zip(speeds, found[1], strict=True)]
        line = {"recipe": recipe, "micro_batches": parts, "images_per_s": spread(speeds, 1)}
        print(json.dumps({**line, "ratio": spread(ratios, 3)}), flush=True)


def main() -> None:
    """One form after the other."""
    measure_memory(PARTS[-1])  # kernels keep memory of their own from the first call on
    whole = None
    for parts in PARTS:
        found = measure_memory(parts)
        whole = whole or found["peak_mib"]
        line = {"micro_batches": parts, **found, "ratio": round(found["peak_mib"] / whole, 3)}
        print(json.dumps(line), flush=True)
    for recipe in ("cifar10", "demo"):
        measure_speed(recipe)


if __name__ == "__main__":
    main()
