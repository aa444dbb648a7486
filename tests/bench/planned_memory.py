"""The memory that --plan promises for a step, against what PyTorch's allocator hands out in one.

    python tests/bench/planned_memory.py

Forward and backward pass of both encoders on a CPU, gradients included; weights, optimiser, queue
and views are there before and count on neither side. Prints a JSON line for each network and
precision: planned and allocated MiB at the peak, ``ratio`` of the second to the first, and the
seconds that planning took.
"""

import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.recipes import RECIPES
from model.mechanism import ENCODERS
from model.step_memory import AUTOCAST, network_of_process, peak_of_step
from tests.allocated import allocated_at_most

CASES = (("demo", 64), ("cifar10", 64), ("moco-v2", 16), ("moco-v3-vit-s", 8))


def compare(recipe: str, pictures: int, precision: str) -> dict[str, object]:
    """Plan a step and run it."""
    config = RECIPES[recipe]
    encoder, moco, image_px = config.encoder, config.moco, config.data.image_px
    began = time.perf_counter()
    planned = peak_of_step(
        network_of_process(encoder, moco, pictures, 1, image_px), pictures, image_px, precision
    )
    spent_s = time.perf_counter() - began
    torch.manual_seed(0)
    network = ENCODERS[moco.mechanism](encoder, moco, pictures, 0, image_px)
    views = [torch.randn(pictures, 3, image_px, image_px) for _ in range(2)]
    dtype = AUTOCAST.get(precision)

    def step() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            pairs = network(*views, 0)
        queries = [query_ND for query_ND, _ in pairs]
        torch.autograd.backward(queries, [torch.ones_like(query_ND) for query_ND in queries])

    step()  # kernels keep memory of their own from the first call on
    network.zero_grad()
    allocated = allocated_at_most(step)
    return {
        "recipe": recipe,
        "pictures": pictures,
        "precision": precision,
        "planned_mib": round(planned / 2**20, 1),
        "allocated_mib": round(allocated / 2**20, 1),
        "ratio": round(allocated / planned, 4),
        "planning_s": round(spent_s, 2),
    }


def main() -> None:
    """All cases, one after the other."""
    for recipe, pictures in CASES:
        for precision in ("no", "bf16"):
            print(json.dumps(compare(recipe, pictures, precision)), flush=True)


if __name__ == "__main__":
    main()
