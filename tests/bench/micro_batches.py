"""Memory and time of a step in micro-batches against the same step at once.

    python tests/bench/micro_batches.py

A MoCo v2 step of a ResNet-50 (queue 65,536, eight batch-norm groups) on random views of 224 px:
256 pictures on a GPU, 16 on a CPU. Each form is a process of its own, in interleaved rounds. Prints
a JSON line for each: ``step_gib``, the highest memory during steps over what weights, optimiser,
queue and views hold (on a CPU of the process's resident memory), and ``images_per_s``; median and
range over the rounds.
"""

import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.micro_batches import MicroBatches
from model.moco import MoCo, MoCoConfig

ROUNDS, STEPS, GROUPS = 3, 1, 8
PARTS = (1, 4)


def measure(parts: int) -> dict[str, float]:
    """One process: memory of steps, and their speed without the first."""
    is_gpu = torch.cuda.is_available()
    device, batch = torch.device("cuda" if is_gpu else "cpu"), 256 if is_gpu else 16
    torch.manual_seed(0)
    config = MoCoConfig(batch_norm_groups=GROUPS)
    moco = MoCo(EncoderConfig(backbone="resnet50"), config, batch, 0, 224, batch // parts)
    moco, queue = moco.to(device), KeyQueue(65_536, 128, 0).to(device)
    passes = MicroBatches(moco, moco, queue, config.temperature)
    optimizer = torch.optim.SGD(moco.trained_parameters(), lr=1e-3, momentum=0.9)
    views = torch.randn(2, batch, 3, 224, 224, device=device)
    for parameter in moco.trained_parameters():  # so that gradients and momentum exist already
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held_gib = peak_gib(device)
    spent_s = []
    for step in range(1 + STEPS):
        began = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        passes.run(views, None, step)
        optimizer.step()
        if is_gpu:
            torch.cuda.synchronize()
        spent_s.append(time.perf_counter() - began)
    return {
        "step_gib": peak_gib(device) - held_gib,
        "images_per_s": STEPS * batch / sum(spent_s[1:]),
        "batch": batch,
    }


def peak_gib(device: torch.device) -> float:
    """The most memory so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def spread(values: list[float]) -> dict[str, object]:
    """Median and range."""
    return {
        "median": round(statistics.median(values), 2),
        "range": [round(min(values), 2), round(max(values), 2)],
    }


def main() -> None:
    """Measure all in turns and print what came out."""
    found: dict[int, list[dict[str, float]]] = {parts: [] for parts in PARTS}
    context = multiprocessing.get_context("spawn")
    for _ in range(ROUNDS):
        for parts, results in found.items():
            with context.Pool(1) as pool:
                results.append(pool.apply(measure, (parts,)))
    for parts, results in found.items():
        line = {
            "micro_batches": parts,
            "pictures": int(results[0]["batch"]) // parts,
            **{name: spread([r[name] for r in results]) for name in ("step_gib", "images_per_s")},
        }
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
