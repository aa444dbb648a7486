"""Memory and speed of a step in micro-batches against the same step at once, on a CPU.

    python tests/bench/micro_batches.py

Memory: forward and backward pass of the recipe cifar10 (ResNet-18 at 32 px, eight norm groups) with
64 random pictures, as PyTorch's allocator sees it. Weights, queue and views are there before and do
not count. Prints a JSON line for each number of micro-batches: ``peak_mib`` with gradients, which
alone are ``gradients_mib``, ``ratio`` of it to the whole batch's, and the loss, which must not
change.

Speed: steps of cifar10, optimiser included, and of the smaller network of the recipe demo, whole
and in micro-batches in turns, and each as a bare loop that adds up gradients and keeps none of the
rules. Prints for each ``images_per_s``, ``ratio`` to the whole batch in the same round, which says
what smaller batches cost, and ``of_bare``, to the bare loop, which says what the rules cost; median
and quartiles.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.recipes import RECIPES
from model.info_nce import info_nce
from model.key_queue import KeyQueue
from model.micro_batches import MicroBatches
from model.moco import MoCo
from model.optimiser import make_optimiser
from model.step_memory import bytes_of
from tests.allocated import allocated_at_most

BATCH, PARTS, MIB, SIDE_PX = 64, (1, 2, 4), 2**20, 32
ROUNDS, TURN_S = 9, 1.0


class Steps:
    """Steps of a recipe, each in so many micro-batches."""

    def __init__(self, recipe: str, parts: int) -> None:
        torch.manual_seed(0)
        config = RECIPES[recipe]
        self.moco = MoCo(config.encoder, config.moco, BATCH, 0, SIDE_PX, BATCH // parts)
        self._parts, self._temperature = parts, config.moco.temperature
        self._queue = KeyQueue(config.moco.queue, config.encoder.dim, 0)
        self._passes = MicroBatches(self.moco, self.moco, self._queue, self._temperature)
        self._optimizer = make_optimiser(config.optimiser, self.moco.parameters())
        self._views = torch.randn(2, BATCH, 3, SIDE_PX, SIDE_PX)

    def pass_both_ways(self) -> float:
        """Leave the gradients of a step; its loss."""
        return self._passes.run(self._views, None, 0)[0].item()

    def add_up(self) -> None:
        """Leave about the same gradients, by a bare loop."""
        queries, keys = (view.chunk(self._parts) for view in self._views)
        made: list[Tensor] = []
        with torch.no_grad():
            self.moco.move_key_encoder()
            made += [self.moco.encoder_k(key_M3HW) for key_M3HW in keys]
        for query_M3HW, key_MD in zip(queries, made, strict=True):
            query_MD = self.moco.encoder_q(query_M3HW)
            loss = info_nce(query_MD, key_MD, self._queue.rows_KD, self._temperature)
            (loss / self._parts).backward()
        self._queue.push(torch.cat(made))

    def images_per_s(self, *, bare: bool) -> float:
        """Speed of as many whole steps as fit into a turn, at least one."""
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < TURN_S:
            (self.add_up if bare else self.pass_both_ways)()
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
    """Whole and cut, ours and bare, in turns; in another order in each round."""
    steps = {parts: Steps(recipe, parts) for parts in PARTS}
    ways = [(parts, bare) for parts in PARTS for bare in (False, True)]
    found: dict[tuple[int, bool], list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for place in range(len(ways)):
            parts, bare = ways[(number + place) % len(ways)]
            speed = steps[parts].images_per_s(bare=bare)
            if number:  # the first round warms up
                found[parts, bare].append(speed)
    for parts in PARTS:
        line: dict[str, object] = {"recipe": recipe, "micro_batches": parts}
        line["images_per_s"] = spread(found[parts, False], 1)
        for name, other in (("ratio", (1, False)), ("of_bare", (parts, True))):
            pairs = zip(found[parts, False], found[other], strict=True)
            line[name] = spread([mine / its for mine, its in pairs], 3)
        print(json.dumps(line), flush=True)


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
