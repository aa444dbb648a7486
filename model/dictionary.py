"""What queries are compared with: the interface of the queue, the memory bank and the batch.

Letters in names: N images on this rank, D embedding size.
"""

from typing import Any

import torch
from torch import Tensor, nn

Pairs = list[tuple[Tensor, Tensor]]


class Dictionary(nn.Module):
    """Keys that outlive a step, equal on all ranks; its buffers are in the checkpoint."""

    name: str
    """Of its tensors in a checkpoint."""

    def candidates(self, global_batch: int) -> int:
        """Keys that a query is compared with, its own among them."""
        raise NotImplementedError

    def contrast(
        self, pairs: Pairs, temperature: float, sample_N: Any, step: int
    ) -> tuple[Tensor, Tensor]:
        """Loss and pretext accuracy of a step; then its keys go in.

        Args:
            pairs: queries and keys, ``[N, D]`` each and unit-length.
            temperature: divides the similarities.
            sample_N: numbers of the pictures of this rank in the data set.
            step: from 0.

        Returns:
            The loss in nats, added up over the pairs; the accuracy, their mean, without gradient.
        """
        raise NotImplementedError

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


def over_pairs(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of the losses and the mean of the accuracies."""
    losses, accuracies = zip(*found, strict=True)
    return torch.stack(losses).sum(), torch.stack(accuracies).mean()
