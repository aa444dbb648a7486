"""The few things that ranks tell each other; each is the identity in a single process.

Nothing else in ``model/`` knows about ranks.

Letters in names: N images on this rank, B images on all ranks.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_distributed() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def talks_over_gloo() -> bool:
    """Whether there is a process group of CPUs."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "gloo"


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def gather(rows_N: Tensor, out_B: Tensor | None = None) -> Tensor:
    """The rows of all ranks in the order of the ranks, ``[B, ...]``; no gradient.

    Args:
        rows_N: as many on every rank.
        out_B: contiguous place to write them to, for example rows of the queue.
    """
    rows_N = rows_N.detach().contiguous()
    if out_B is None:
        out_B = rows_N.new_empty(len(rows_N) * world_size(), *rows_N.shape[1:])
    if is_distributed():
        dist.all_gather_into_tensor(out_B, rows_N)
    else:
        out_B.copy_(rows_N)
    return out_B


def begin_gather(rows_N: Tensor, out_B: Tensor) -> Callable[[], Any]:
    """``gather`` that goes on while other things are done.

    Args:
        rows_N: as many on every rank; contiguous, to be kept until the end.
        out_B: contiguous place to write them to, not to be read before the end.

    Returns:
        What waits for the end.
    """
    if not is_distributed():
        out_B.copy_(rows_N)
        return lambda: None
    work = dist.all_gather_into_tensor(out_B, rows_N, async_op=True)
    assert work is not None
    wait: Callable[[], Any] = work.wait
    return wait


def exchange(rows_N: Tensor, send_counts: list[int], receive_counts: list[int]) -> Tensor:
    """Send the first ``send_counts[0]`` rows to rank 0, and so on; what came, by sender."""
    received = rows_N.new_empty(sum(receive_counts), *rows_N.shape[1:])
    if not is_distributed():
        return received.copy_(rows_N)
    dist.all_to_all_single(received, rows_N.contiguous(), receive_counts, send_counts)
    return received


def exchange_with_gradient(
    rows_N: Tensor, send_counts: list[int], receive_counts: list[int]
) -> Tensor:
    """``exchange`` whose gradients go the way back."""
    exchanged: Tensor = _Exchange.apply(rows_N, send_counts, receive_counts)
    return exchanged


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_N: Tensor, send_counts: list[int], receive_counts: list[int]
    ) -> Tensor:
        ctx.counts = send_counts, receive_counts
        return exchange(rows_N, send_counts, receive_counts)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        send_counts, receive_counts = ctx.counts
        return exchange(grad_outputs[0], receive_counts, send_counts), None, None


def gather_with_gradient(rows_N: Tensor) -> Tensor:
    """``gather`` through which each rank gets the gradients that all ranks have for its rows."""
    gathered: Tensor = _Gather.apply(rows_N)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_N: Tensor) -> Tensor:
        ctx.count = len(rows_N)
        return gather(rows_N)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        grad_B = grad_outputs[0].contiguous()
        if is_distributed():
            grad_B = grad_B.clone()
            dist.all_reduce(grad_B)
        return grad_B[rank() * ctx.count : (rank() + 1) * ctx.count]


def sum_with_gradient(tensor: Tensor) -> Tensor:
    """The sum over all ranks, of which every rank is given the gradients that all ranks have."""
    summed: Tensor = _Sum.apply(tensor)
    return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:  # noqa: ARG004
        return _summed(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # noqa: ARG004
        return _summed(grad_outputs[0])


def _summed(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().clone()
    if is_distributed():
        dist.all_reduce(tensor)
    return tensor


def from_first(text: str, device: torch.device) -> str:
    """What the first rank says, on every rank.

    Args:
        text: of the first rank; that of the others does not matter.
        device: that the ranks talk over.
    """
    if not is_distributed():
        return text
    said = text.encode()
    size = torch.tensor([len(said)], device=device)
    dist.broadcast(size, 0)
    letters = torch.zeros(int(size), dtype=torch.uint8, device=device)
    if rank() == 0:
        letters.copy_(torch.tensor(list(said), dtype=torch.uint8))
    dist.broadcast(letters, 0)
    return bytes(letters.tolist()).decode()


def average(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its mean over the ranks, in place."""
    if is_distributed():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world_size())


def all_equal(tensors: Iterable[Tensor]) -> bool:
    """Whether every tensor is equal, bit by bit, on all ranks."""
    if not is_distributed():
        return True
    digests = torch.stack([_digest(tensor) for tensor in tensors])
    lowest, highest = digests.clone(), digests.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return bool((lowest == highest).all())


def _digest(tensor: Tensor) -> Tensor:
    """A 64-bit sum of the tensor's bits, each element's weighted by its place."""
    as_bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().view(-1)
    bits = flat.view(as_bits[flat.element_size()]).to(torch.int64)
    weights = (
        torch.arange(len(bits), device=bits.device) * (2 * 0x9E3779B1) + 1
    )  # odd: no bit is lost
    return (bits * weights).sum()
