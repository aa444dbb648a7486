"""A step whose activations are those of a part of the batch: gradient accumulation for MoCo.

MoCo's keys have no gradient. So all keys of a step are made first, and nothing of their passes is
kept; then the queries follow in micro-batches, each with a backward pass of its own. The gradients
add up. For the optimiser's step to be that of the whole batch, up to rounding, it needs more:

- the key encoder moves once, and all queries meet the same keys: a queue takes those of the step
  after the last query, and a dictionary of the batch holds the whole batch of all ranks;
- micro-batches are whole batch-norm groups, which are the global batch's, and keys are shuffled
  among all of them;
- running statistics move once (``over_parts``).

Batch norm over all ranks (sync) or over what a process has (none) has no groups that could stay
whole: its statistics are then those of a micro-batch. End-to-end learns through the keys too and
cannot be cut (``count_micro_batches``).

Letters in names: N images on this rank, M images of a micro-batch, H W pixels, D embedding size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.batch_norm import over_parts
from model.dictionary import Comparison, Dictionary, Pairs
from model.moco import QueryEncoder


@dataclass(frozen=True)
class MicroBatches:
    """Forward and backward passes of a step.

    Args:
        wrapped: the encoders as they are called, in their data-parallel wrapper, if there is one.
        encoders: the same without it; say into how many micro-batches a step is cut.
        dictionary: that queries are compared with.
        temperature: divides the similarities.
        loss_scale: what the loss is multiplied with.
        backward: begins a backward pass; scales for float16.
        autocast: of the encoders' arithmetic, where ``wrapped`` does not bring it.
    """

    wrapped: Callable[..., Pairs]
    encoders: QueryEncoder
    dictionary: Dictionary
    temperature: float
    loss_scale: float = 1.0
    backward: Callable[[Tensor], Any] = torch.autograd.backward
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def run(
        self,
        views: Sequence[Tensor],
        sample_N: Any,
        step: int,
        look: Callable[[Pairs], None] = lambda _: None,
    ) -> tuple[Tensor, Tensor]:
        """Add up the gradients of a step; after it the keys are in the dictionary or on their way.

        Args:
            views: a query view and a key view of each picture of this rank, ``[N, 3, H, W]``.
            sample_N: numbers of the pictures in the data set.
            step: from 0.
            look: is shown all queries and keys before these go in; not to keep.

        Returns:
            Loss and pretext accuracy of this rank's pictures, on the device, without gradient.
        """
        count = self.encoders.micro_batches
        keys = self._keys_ahead(views, step) if count > 1 else None
        compare: Comparison | None = None
        made: list[Pairs] = []
        found: list[tuple[Tensor, Tensor]] = []
        for own in over_parts(self._moved_buffers(), parts(len(views[0]), count)):
            is_last = len(made) == count - 1
            with nullcontext() if is_last else self._gradients_stay_here():
                own_keys = None if keys is None else [key_ND[own] for key_ND in keys]
                pairs = self.wrapped(*(view[own] for view in views), step, own_keys)
                queries, made_keys = zip(*pairs, strict=True)
                compare = compare or self.dictionary.comparison(
                    keys or made_keys, self.temperature, sample_N, step
                )
                loss, accuracy = compare(queries, own)
                loss = loss * (self.loss_scale / count)
                made.append(pairs)
                found.append((loss.detach(), accuracy))
                if is_last:
                    whole = joined(made)
                    look(whole)
                    self.dictionary.enqueue([key_ND for _, key_ND in whole], sample_N)
                self.backward(loss)
        losses, accuracies = zip(*found, strict=True)
        return torch.stack(losses).sum(), torch.stack(accuracies).mean()

    def _keys_ahead(self, views: Sequence[Tensor], step: int) -> list[Tensor] | None:
        with self.autocast():
            return self.encoders.keys_ahead(views, step)

    def _moved_buffers(self) -> Iterator[Tensor]:
        """Of the networks that queries pass through."""
        for name, buffer in self.encoders.named_buffers():
            if not name.startswith("encoder_k."):
                yield buffer

    def _gradients_stay_here(self) -> AbstractContextManager[Any]:
        no_sync: Callable[[], AbstractContextManager[Any]]
        no_sync = getattr(self.wrapped, "no_sync", nullcontext)
        return no_sync()


def parts(length: int, count: int) -> list[slice]:
    """Equal parts of so many rows, in their order."""
    size = length // count
    return [slice(start, start + size) for start in range(0, size * count, size)]


def joined(made: Sequence[Pairs]) -> Pairs:
    """The queries and keys of all micro-batches, one after the other, without gradient."""
    with torch.no_grad():
        return [
            (
                torch.cat([query_MD for query_MD, _ in view]),
                torch.cat([key_MD for _, key_MD in view]),
            )
            for view in zip(*made, strict=True)
        ]
