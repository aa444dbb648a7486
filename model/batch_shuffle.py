"""Shuffle batch norm: keys are encoded among other pictures than their queries.

The global batch is put in a random order before the key encoder and put back after it, so that a
key's batch-norm group holds other pictures than its query's. Every rank works out the same
permutation from (seed, step); only the samples that change their rank travel.

Letters in names: N images on this rank, B images on all ranks, W ranks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.collectives import exchange_with_gradient, rank, world_size
from model.transfer import send


@dataclass(frozen=True)
class Shuffle:
    """Where this rank's samples go to and come from, for one step."""

    order_N: Tensor  # own rows, sorted by the rank that they go to
    send_W: list[int]
    arrival_N: Tensor  # where each received row belongs
    receive_W: list[int]
    travels: bool = True  # False: between no ranks, so none has to be asked

    def apply(self, rows_N: Tensor) -> Tensor:
        """This rank's part of the shuffled global batch."""
        received_N = self._exchange(rows_N[self.order_N], self.send_W, self.receive_W)
        return torch.empty_like(received_N).index_copy(0, self.arrival_N, received_N)

    def undo(self, rows_N: Tensor) -> Tensor:
        """The inverse of ``apply``."""
        back_N = self._exchange(rows_N[self.arrival_N], self.receive_W, self.send_W)
        return torch.empty_like(back_N).index_copy(0, self.order_N, back_N)

    def _exchange(self, rows_N: Tensor, send_W: list[int], receive_W: list[int]) -> Tensor:
        return exchange_with_gradient(rows_N, send_W, receive_W) if self.travels else rows_N


def make_shuffle(
    batch: int, seed: int, step: int, device: torch.device, *, view: int = 0
) -> Shuffle:
    """The shuffle of one step over all ranks.

    Args:
        batch: images on this rank (N), as many on every rank.
        seed: of the run.
        step: from 0.
        device: where the rows lie.
        view: which of the keys of a step, where the loss is symmetric.
    """
    ranks, own = world_size(), rank()
    # Place p of the shuffled global batch holds row permutation[p] of the global batch.
    permutation_B = _permutation(batch * ranks, seed, step, view)
    place_of_row_B = torch.argsort(permutation_B)

    own_places_N = place_of_row_B[own * batch : (own + 1) * batch]
    # Sorted by place, so what goes to one rank arrives in the order of the places there.
    order_N = torch.argsort(own_places_N)
    send_W = torch.bincount(own_places_N // batch, minlength=ranks).tolist()

    own_rows_N = permutation_B[own * batch : (own + 1) * batch]
    arrival_N = torch.argsort(own_rows_N // batch, stable=True)
    receive_W = torch.bincount(own_rows_N // batch, minlength=ranks).tolist()
    return Shuffle(send(order_N, device), send_W, send(arrival_N, device), receive_W)


def make_local_shuffle(
    batch: int, seed: int, step: int, device: torch.device, *, view: int = 0
) -> Shuffle:
    """The same among the pictures of this rank alone: nothing travels.

    For batch norm in several groups on each device; ranks have orders of their own.
    """
    own_seed = seed * 8191 + rank()
    permutation_N = send(_permutation(batch, own_seed, step, view), device)
    return Shuffle(permutation_N, [], torch.arange(batch, device=device), [], travels=False)


def _permutation(length: int, seed: int, step: int, view: int) -> Tensor:
    # PyTorch's CPU generator takes 32 bits of it.
    number = seed * 1_000_003 + step + view * 0x5BD1_E995
    generator = torch.Generator().manual_seed(number % 2**32)
    return torch.randperm(length, generator=generator)
