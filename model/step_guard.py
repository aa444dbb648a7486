"""A step whose gradient is not finite is left out, on all ranks, and leaves nothing behind.

The data-parallel wrapper has summed the gradients over the ranks, so a NaN of one rank stands in
those of all and each rank decides alike without asking. The optimiser does not step, the running
statistics are put back, and dictionaries take no key that is not finite by themselves.

The decision costs the one wait of a step for its device: after the backward pass.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StepGuard:
    """Counts the steps left out; one for each run.

    Args:
        network: the encoders, whose running statistics a bad step must not change.
        scaler: of the loss under float16. It leaves steps out by itself, to find its scale; they
            count too.
    """

    def __init__(self, network: nn.Module, scaler: torch.amp.GradScaler | None) -> None:
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._buffers = [b for b in network.buffers() if b.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._buffers]
        self._scaler = scaler
        self.skipped = 0
        """Steps left out since the run's first one."""
        self.in_a_row = 0
        """Steps left out since the last good one."""

    @torch.no_grad()
    def begin(self) -> None:
        """Before a step's forward pass: keep the running statistics."""
        copy_all(self._buffers, self._kept)

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """After the backward pass: step the optimiser, or undo what the step has changed.

        Returns:
            Whether the step was taken; the same on all ranks.
        """
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        # Of a norm that overflows every single gradient may be finite: that step is none either.
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        is_good = math.isfinite(norm.item())
        if self._scaler is not None:  # which lowers its scale after a bad one
            self._scaler.step(optimizer)
            self._scaler.update()
        elif is_good:
            optimizer.step()
        if not is_good:
            copy_all(self._kept, self._buffers)
        self.skipped += not is_good
        self.in_a_row = 0 if is_good else self.in_a_row + 1
        return is_good


def copy_all(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy each tensor into its counterpart, in a few launches for all."""
    if sources:
        torch._foreach_copy_(list(targets), list(sources))
