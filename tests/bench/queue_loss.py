"""The loss against a queue: this project's fused form against the plain one, time and memory.

    python tests/bench/queue_loss.py

Loss and gradient for 256 queries of 128 dimensions in float32, on CUDA if there is a device, else
on all cores of the CPU. The plain form is the official code's: a copy of the queue, logits in one
row, cross-entropy, backward pass. Rounds are interleaved; a ratio is the median of the rounds'
ratios. Memory is what the process (or the device) needs at most beyond queries, keys and queue,
in a process of its own for each figure on a CPU. Prints a JSON line for each length of the queue.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)

from model.info_nce import info_nce

QUERIES, DIM, TEMPERATURE = 256, 128, 0.2
ROUNDS = {65_536: 15, 1_048_576: 5}
MIB = 2**20
CORES = len(os.sched_getaffinity(0))

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def plain(query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """Equation 1 with all logits; the queue is copied, as it is overwritten before backward."""
    positive_N1 = (query_ND * key_ND).sum(dim=1, keepdim=True)
    logits_NC = torch.cat([positive_N1, query_ND @ queue_KD.clone().T], dim=1) / temperature
    return F.cross_entropy(logits_NC, logits_NC.new_zeros(len(query_ND), dtype=torch.long))


SIDES: dict[str, Loss] = {"plain": plain, "fused": info_nce}


def inputs(length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-length queries, keys near them, and a queue."""
    generator = torch.Generator().manual_seed(0)
    query_ND = F.normalize(torch.randn(QUERIES, DIM, generator=generator))
    key_ND = F.normalize(query_ND + 0.1 * torch.randn(QUERIES, DIM, generator=generator))
    queue_KD = torch.randn(length, DIM, generator=generator)
    # In place: a temporary copy would hide memory that a loss takes later.
    queue_KD.div_(torch.linalg.vector_norm(queue_KD, dim=1, keepdim=True))
    query_ND, key_ND, queue_KD = (tensor.to(device) for tensor in (query_ND, key_ND, queue_KD))
    return query_ND.requires_grad_(), key_ND, queue_KD


def step(side: str, tensors: tuple[Tensor, Tensor, Tensor]) -> float:
    """Seconds of a loss with its gradient."""
    query_ND = tensors[0]
    query_ND.grad = None
    started = time.perf_counter()
    SIDES[side](*tensors, TEMPERATURE).backward()
    if query_ND.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes() -> int:
    """The most memory that this process has had at one time."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's ru_maxrss begins with that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def extra_bytes(side: str, length: int, device: torch.device) -> int:
    """Memory that a loss takes at its peak, beyond its inputs.

    A short queue goes first: what libraries set up at their first call does not count.
    """
    step(side, inputs(1024, device))
    tensors = inputs(length, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(side, tensors)
        return torch.cuda.max_memory_allocated() - before
    before = peak_bytes()
    step(side, tensors)
    return peak_bytes() - before


def measured_extra_bytes(side: str, length: int, device: torch.device) -> int:
    """``extra_bytes``, on a CPU in a new process, whose peak nothing else has raised."""
    if device.type == "cuda":
        return extra_bytes(side, length, device)
    command = [sys.executable, __file__, side, str(length)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def compare(length: int, device: torch.device) -> dict[str, object]:
    """All figures of one queue."""
    tensors = inputs(length, device)
    for side in SIDES:  # warm up
        step(side, tensors)
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(ROUNDS[length]):
        for side, found in seconds.items():
            found.append(step(side, tensors))
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["fused"], strict=True)]
    del tensors
    extra = {side: measured_extra_bytes(side, length, device) for side in SIDES}
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {CORES} cores"
    return {
        "queue": length,
        "queries": QUERIES,
        "dim": DIM,
        "device": where,
        "torch": torch.__version__,
        "time_ratio": round(statistics.median(ratios), 2),
        "time_ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "rounds": len(ratios),
        **{f"{side}_ms": round(1e3 * statistics.median(s), 2) for side, s in seconds.items()},
        "memory_ratio": round(extra["plain"] / max(extra["fused"], 1), 1),
        **{f"{side}_extra_mib": round(extra[side] / MIB, 1) for side in SIDES},
    }


def main() -> None:
    """Print a line for each queue; with a side and a length, only that memory in bytes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(CORES)
    if len(sys.argv) == 3:
        sys.stdout.write(f"{extra_bytes(sys.argv[1], int(sys.argv[2]), device)}\n")
        return
    for length in ROUNDS:
        sys.stdout.write(json.dumps(compare(length, device)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
