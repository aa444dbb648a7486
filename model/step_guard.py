"""A step whose gradient is not finite is left out, on all ranks, and leaves nothing behind.

The data-parallel wrapper has summed the gradients over the ranks, so a NaN of one rank stands in
those of all and each rank decides alike without asking. The decision stays on the device: the
optimiser's kernel reads it, the running statistics are put back by it, and dictionaries take no
key that is not finite by themselves. The host hears of it while the next step is on its way, so
that a GPU does not stand still between two steps.

Letters in names: N images on this rank, S running statistics of all batch norms.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.transfer import fetch


@dataclass(frozen=True)
class LeftOut:
    """A step that was left out."""

    step: int
    """Steps done with it, from 1."""
    sample_N: Any
    """Numbers of its pictures."""
    skipped: int
    """Steps left out since the run's first one, with it."""
    in_a_row: int
    """Steps left out since the last good one, with it."""


class StepGuard:
    """Decides over each step; one for each run.

    Args:
        network: the encoders, whose running statistics a bad step must not change. They come to
            lie in one piece of memory, so a later ``network.to`` to elsewhere is not seen.
        scaler: of the loss under float16. A step that it finds too large is left out and counts.
        skipped: steps that earlier parts of the run left out.
    """

    def __init__(
        self, network: nn.Module, scaler: torch.amp.GradScaler | None, skipped: int = 0
    ) -> None:
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        buffers = [b for b in network.buffers() if b.is_floating_point()]
        self._statistics_S = in_one_piece(buffers or [self._parameters[0].new_empty(0)])
        self._kept_S = self._statistics_S.clone()
        self._scaler = scaler
        self._pending: deque[tuple[int, Any, Callable[[], bool]]] = deque()
        self._found: list[LeftOut] = []
        self._skipped = skipped
        self._in_a_row = 0

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step's forward pass: keep the running statistics."""
        self._kept_S.copy_(self._statistics_S)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, step: int, sample_N: Any) -> None:
        """After the backward pass: step the optimiser, or undo what the step has changed.

        Args:
            optimizer: by ``make_optimiser``; it does nothing where its ``found_inf`` is 1.
            step: steps done with this one.
            sample_N: numbers of its pictures.
        """
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        is_bad = summary(gradients) * 0 != 0
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        if self._scaler is not None:
            self._scaler.update()  # it has noted at unscale_ what it found
        torch.where(is_bad, self._kept_S, self._statistics_S, out=self._statistics_S)
        self._pending.append((step, sample_N, fetch(is_bad)))

    def left_out(self, *, wait: bool) -> list[LeftOut]:
        """Steps that were left out and not told of before; the same on all ranks.

        Args:
            wait: for the newest step too; else the next call tells of it, by when it is known.
        """
        self._hear(pending=0 if wait else 1)
        found, self._found = self._found, []
        return found

    @property
    def skipped(self) -> int:
        """Steps left out since the run's first one; waits for the newest."""
        self._hear(pending=0)
        return self._skipped

    @property
    def in_a_row(self) -> int:
        """Steps left out since the last good one; waits for the newest."""
        self._hear(pending=0)
        return self._in_a_row

    def _hear(self, pending: int) -> None:
        while len(self._pending) > pending:
            step, sample_N, is_bad = self._pending.popleft()
            if is_bad():
                self._skipped += 1
                self._in_a_row += 1
                self._found.append(LeftOut(step, sample_N, self._skipped, self._in_a_row))
            else:
                self._in_a_row = 0


def summary(gradients: list[Tensor]) -> Tensor:
    """One number that is finite only where all these are.

    It may overflow where each of them is finite; no good step is made of such gradients either.
    """
    if gradients[0].is_cuda:  # a few kernels for all of them
        norms = list(torch._foreach_norm(gradients))
        return torch.stack(norms).sum()
    # Here the foreach form is a loop too, and a norm takes twice as long as a sum.
    return torch.stack([gradient.sum() for gradient in gradients]).sum()


def in_one_piece(tensors: Sequence[Tensor]) -> Tensor:
    """Make tensors of one type views of one piece of memory, and return that, ``[S]``."""
    flat_S = torch.cat([tensor.detach().flatten() for tensor in tensors])
    parts = flat_S.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part.view(tensor.shape)
    return flat_S
