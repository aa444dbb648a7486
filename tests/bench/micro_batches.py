"""Memory of a step in micro-batches against the same step at once, as PyTorch's allocator sees it.

    python tests/bench/micro_batches.py

Forward and backward pass of the recipe cifar10 on a CPU (ResNet-18 at 32 px, eight norm groups)
with 64 random pictures. Weights, queue and views are there before and do not count. Prints a JSON
line for each number of micro-batches: ``peak_mib`` with gradients, which alone are
``gradients_mib``, ``ratio`` of it to the whole batch's, and the loss, which must not change.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from eval.recipes import RECIPES
from model.key_queue import KeyQueue
from model.micro_batches import MicroBatches
from model.moco import MoCo
from model.step_memory import bytes_of
from tests.allocated import allocated_at_most

BATCH, PARTS, MIB = 64, (1, 2, 4), 2**20


def measure(parts: int) -> dict[str, float]:
    """Memory and loss of one step from a fresh start."""
    torch.manual_seed(0)
    config = RECIPES["cifar10"]
    moco = MoCo(config.encoder, config.moco, BATCH, 0, 32, BATCH // parts)
    queue = KeyQueue(config.moco.queue, config.encoder.dim, 0)
    passes = MicroBatches(moco, moco, queue, config.moco.temperature)
    views = torch.randn(2, BATCH, 3, 32, 32)
    losses = []
    peak = allocated_at_most(lambda: losses.append(passes.run(views, None, 0)[0].item()))
    return {
        "peak_mib": round(peak / MIB, 1),
        "gradients_mib": round(bytes_of(moco.trained_parameters()) / MIB, 1),
        "loss": round(losses[0], 5),
    }


def main() -> None:
    """One form after the other."""
    measure(PARTS[-1])  # kernels keep memory of their own from the first call on
    whole = None
    for parts in PARTS:
        found = measure(parts)
        whole = whole or found["peak_mib"]
        line = {"micro_batches": parts, **found, "ratio": round(found["peak_mib"] / whole, 3)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
