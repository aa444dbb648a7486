"""How much arithmetic a training step is: the numerator of model FLOP utilisation.

Counted, not measured, on tensors without data: matrix products, convolutions and attention, a
multiplication and an addition being two operations, as PyTorch's counter has it. What only moves
data or works element by element (batch norm, activations, augmentation, the optimiser, the move of
the key encoder) is left out, and so is what is computed twice to save memory.

Letters in names: N pictures, H W pixels.
"""

from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from model.collectives import world_size
from model.encoder import EncoderConfig
from model.mechanism import ENCODERS
from model.moco import MoCoConfig

# Batch norm over one picture without places, as in the heads of v3, has no statistics.
COUNTED_PICTURES = 2


@dataclass(frozen=True)
class StepFlops:
    """Floating-point operations of a training step for each picture."""

    forward: int
    """Of all encoders, predictor included."""
    backward: int
    """Of what is trained; pictures and frozen weights need no gradient."""
    loss: int
    """Similarities and the gradient for the queries."""

    @property
    def total(self) -> int:
        """Of all three."""
        return self.forward + self.backward + self.loss


def flops_of_step(encoder: EncoderConfig, moco: MoCoConfig, image_px: int, batch: int) -> StepFlops:
    """Operations of a step for each picture; times ``batch`` they are the whole step's.

    The same for any number of processes, any batch-norm groups and any precision. Takes about a
    second for a ResNet-50; needs no memory, and leaves torch's random state as it is.

    Args:
        encoder: the network.
        moco: the method; symmetric ones encode each view twice.
        image_px: side of the views.
        batch: pictures of a step, all processes together; where the batch is the dictionary the
            loss depends on it.

    Returns:
        For moco-v2 at 224 px 16.4e9 forward (two ResNet-50 of 8.2e9), 16.1e9 backward (twice the
        forward, less the gradient for the pictures) and 0.03e9 in the loss.
    """
    # Without groups, shuffle or statistics of other processes: none of them is counted.
    alone = replace(moco, batch_norm="none")
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = ENCODERS[moco.mechanism](
            replace(encoder, weights=None), alone, COUNTED_PICTURES * world_size(), 0, image_px
        )
        views = [torch.empty(COUNTED_PICTURES, 3, image_px, image_px) for _ in range(2)]
    with FlopCounterMode(display=False) as forward:
        pairs = network(*views, 0)
    results = [out_ND for pair in pairs for out_ND in pair if out_ND.requires_grad]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(results, [torch.ones_like(out_ND) for out_ND in results])
    candidates = moco.queue + 1 if moco.mechanism in ("queue", "memory-bank") else batch
    # Each query with each candidate, and the gradient for the queries; end-to-end for keys too.
    products = 3 if pairs[0][1].requires_grad else 2
    loss = len(pairs) * products * 2 * encoder.dim * candidates
    return StepFlops(
        forward.get_total_flops() // COUNTED_PICTURES,
        backward.get_total_flops() // COUNTED_PICTURES,
        loss,
    )
