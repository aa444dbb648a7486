"""What queries are compared with: the interface of the queue, the memory bank and the batch.

Letters in names: N images on this rank, M images of a part of them, D embedding size.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]
# Queries [M, D] of one or both views, and which pictures of this rank they are of; the mean loss in
# nats, added up over the views, and the mean pretext accuracy, without gradient.
Comparison = Callable[[Sequence[Tensor], slice], tuple[Tensor, Tensor]]


class Dictionary(nn.Module):
    """Keys that outlive a step, equal on all ranks; its buffers are in the checkpoint."""

    name: str
    """Of its tensors in a checkpoint."""

    def candidates(self, global_batch: int) -> int:
        """Keys that a query is compared with, its own among them."""
        raise NotImplementedError

    def comparison(
        self, keys: Sequence[Tensor], temperature: float, sample_N: Any, step: int
    ) -> Comparison:
        """What compares queries of a step, all at once or in parts, with the same keys.

        Args:
            keys: ``[N, D]`` and unit-length, of the queries of one or both views.
            temperature: divides the similarities.
            sample_N: numbers of the pictures of this rank in the data set.
            step: from 0.
        """
        raise NotImplementedError

    def enqueue(self, keys: Sequence[Tensor], sample_N: Any) -> None:
        """After a step's last comparison, its backward pass need not be over: its keys go in."""

    def contrast(
        self, pairs: Pairs, temperature: float, sample_N: Any, step: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and pretext accuracy of all queries of a step at once; then its keys go in.

        Args:
            pairs: queries and keys, ``[N, D]`` each and unit-length.
            temperature: divides the similarities.
            sample_N: numbers of the pictures of this rank in the data set.
            step: from 0.

        Returns:
            The loss in nats, added up over the pairs; the accuracy, their mean, without gradient.
        """
        queries, keys = zip(*pairs, strict=True)
        found = self.comparison(keys, temperature, sample_N, step)(queries, slice(None))
        self.enqueue(keys, sample_N)
        return found

    def settle(self) -> None:
        """Wait for keys that are still on their way; after the backward pass of each step."""

    def plain_state(self) -> dict[str, int]:
        """What a checkpoint holds beside its buffers."""
        return {}

    def load_plain_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``plain_state``; other entries are ignored."""


def finite(key_ND: Tensor) -> Tensor:
    """Keys as a dictionary takes them: one that is not finite is zeros, and so like nothing."""
    is_finite_N1 = key_ND.isfinite().all(dim=1, keepdim=True)
    return torch.where(is_finite_N1, key_ND, torch.zeros_like(key_ND))


def over_pairs(found: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of the losses and the mean of the accuracies."""
    losses, accuracies = zip(*found, strict=True)
    return torch.stack(losses).sum(), torch.stack(accuracies).mean()
