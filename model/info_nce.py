"""The contrastive loss of MoCo: one positive key and K negative keys for each query.

Stateless: the queue that supplies the negatives is in ``model/key_queue.py``.

The gradient for the queries is worked out in the forward pass, over chunks of the queue: the
softmax-weighted mean of the keys is what it needs, and that can be summed up on the way as fused
attention does. So no ``[N, K]`` logits are kept for the backward pass, and the queue may be
overwritten as soon as the loss is computed. The plain form, the truth for this one, is in
``tests/test_info_nce.py``.

Letters in names: N images on this GPU, D embedding size, K queue length, C = K + 1 candidates.
"""

from typing import Any

import torch
from torch import Tensor

# Rows of the queue at a time: 256 queries x 8192 x 4 bytes = 8 MiB of logits, which a CPU's
# last-level cache holds.
CHUNK_ROWS = 8192


def info_nce(query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of picking each query's own key among the C candidates.

    Args:
        query_ND: unit-length queries; the gradient flows into these only.
        key_ND: unit-length keys of the same images, in the same order.
        queue_KD: unit-length keys of earlier steps.
        temperature: divides the cosine similarities, which lie in [-1, 1]; MoCo v2 uses 0.2.

    Returns:
        A float32 scalar, in nats. Equal similarities give exactly ``log(C)``, so a loss that
        stays at that value (11.09 for K = 65536) means the encoder has learnt nothing.

    Raises:
        ValueError: if the three shapes do not fit together.

    Source: equation 1 of MoCo, https://arxiv.org/abs/1911.05722.
    """
    if query_ND.shape != key_ND.shape or query_ND.shape[1] != queue_KD.shape[1]:
        raise ValueError(
            f"queries {tuple(query_ND.shape)}, keys {tuple(key_ND.shape)} and queue "
            f"{tuple(queue_KD.shape)} must be (N, D), (N, D) and (K, D)"
        )
    loss: Tensor = _InfoNCE.apply(query_ND, key_ND, queue_KD, temperature)
    return loss


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float
    ) -> Tensor:
        # Not under autocast: bfloat16 cosines near 1 are 1/256 apart, which a temperature of 0.07
        # stretches to 0.06 nats, enough to swap near neighbours.
        with torch.autocast(query_ND.device.type, enabled=False):
            scaled_ND = query_ND.float() / temperature
            key_ND = key_ND.float()
            positive_N1 = (scaled_ND * key_ND).sum(dim=1, keepdim=True)
            # Sums over candidates of exp(logit) and exp(logit) * key, both over exp(highest).
            highest_N1 = positive_N1.clone()
            total_N1 = torch.ones_like(positive_N1)
            weighted_ND = key_ND.clone()
            for rows_MD in queue_KD.split(CHUNK_ROWS):
                logits_NM = scaled_ND @ rows_MD.float().T
                new_highest_N1 = torch.maximum(highest_N1, logits_NM.amax(dim=1, keepdim=True))
                weights_NM = logits_NM.sub_(new_highest_N1).exp_()
                rescale_N1 = (highest_N1 - new_highest_N1).exp_()
                total_N1.mul_(rescale_N1).add_(weights_NM.sum(dim=1, keepdim=True))
                weighted_ND.mul_(rescale_N1).addmm_(weights_NM, rows_MD.float())
                highest_N1 = new_highest_N1
            loss_N1 = highest_N1 + total_N1.log() - positive_N1
            mean_key_ND = weighted_ND / total_N1
            grad_ND = (mean_key_ND - key_ND) / (temperature * len(query_ND))
        ctx.save_for_backward(grad_ND.to(query_ND.dtype))
        return loss_N1.mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_outputs[0] * grad_ND, None, None, None


@torch.no_grad()
def pretext_accuracy(query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor) -> Tensor:
    """Share of queries that are nearer to their own key than to every key of the queue, in [0, 1].

    Call it with the queue that the loss has seen. Chance is 1 / (K + 1).
    """
    with torch.autocast(query_ND.device.type, enabled=False):
        query_ND = query_ND.float()
        positive_N = (query_ND * key_ND.float()).sum(dim=1)
        best_N = torch.full_like(positive_N, -torch.inf)
        for rows_MD in queue_KD.split(CHUNK_ROWS):
            best_N = torch.maximum(best_N, (query_ND @ rows_MD.float().T).amax(dim=1))
        return (positive_N > best_N).float().mean()
