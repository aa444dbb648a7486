"""The contrastive loss of MoCo: one positive key and K negative keys for each query.

Stateless: the queue that supplies the negatives is in ``model/key_queue.py``.

The gradient for the queries is worked out in the forward pass: the softmax-weighted mean of the
keys is what it needs, and that can be summed up on the way through the queue as fused attention
does. So no ``[N, K]`` logits exist at any time, and the queue may be overwritten as soon as the
loss is computed. On CUDA one Triton kernel reads the queue (``model/info_nce_triton.py``), on a CPU
each thread reads a part of it (``model/info_nce_threads.py``), elsewhere PyTorch does it in chunks.
The plain form, the truth for all, is in ``tests/test_info_nce.py``.

Letters in names: N images on this GPU, D embedding size, K queue length, M rows of a chunk,
C = K + 1 candidates.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits of a chunk where all of the device works on it together: 4 MiB of float32.
CHUNK_LOGITS = 2**20
MIN_CHUNK_ROWS = 256


class SoftmaxSums(NamedTuple):
    """What a pass over the queue leaves, with 2^(logit - highest) as the weight of a row."""

    highest_N1: Tensor
    total_N1: Tensor
    weighted_ND: Tensor


def info_nce(query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of picking each query's own key among the C candidates.

    Args:
        query_ND: queries, unit-length in MoCo (any length works); the gradient flows into these
            only.
        key_ND: keys of the same images, in the same order.
        queue_KD: keys of earlier steps; float32 or bfloat16.
        temperature: divides the similarities, which lie in [-1, 1]; MoCo v2 uses 0.2.

    Returns:
        A float32 scalar, in nats (float64 for float64 queries). Equal similarities give exactly
        ``log(C)``, so a loss that stays at that value (11.09 for K = 65536) means the encoder has
        learnt nothing.

    Raises:
        ValueError: if the three shapes do not fit together.

    Source: equation 1 of MoCo, https://arxiv.org/abs/1911.05722.
    """
    return info_nce_with_accuracy(query_ND, key_ND, queue_KD, temperature)[0]


def info_nce_with_accuracy(
    query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``info_nce``, and the pretext accuracy from the same pass over the queue.

    Returns:
        The loss, and without gradient the share of queries that are nearer to their own key than
        to every key of the queue, in [0, 1]; chance is 1 / C.
    """
    if query_ND.shape != key_ND.shape or query_ND.shape[1] != queue_KD.shape[1]:
        raise ValueError(
            f"queries {tuple(query_ND.shape)}, keys {tuple(key_ND.shape)} and queue "
            f"{tuple(queue_KD.shape)} must be (N, D), (N, D) and (K, D)"
        )
    loss, accuracy = _InfoNCE.apply(query_ND, key_ND, queue_KD, temperature)
    return loss, accuracy


def pretext_accuracy(query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor) -> Tensor:
    """The accuracy of ``info_nce_with_accuracy`` alone; a pass over the queue of its own."""
    return info_nce_with_accuracy(query_ND.detach(), key_ND, queue_KD, 1.0)[1]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, key_ND: Tensor, queue_KD: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        # Not under autocast: bfloat16 cosines near 1 are 1/256 apart, which a temperature of 0.07
        # stretches to 0.06 nats, enough to swap near neighbours.
        with torch.autocast(query_ND.device.type, enabled=False):
            dtype = torch.promote_types(query_ND.dtype, torch.float32)
            # In units of log 2: PyTorch's exp2 takes a quarter of its exp's time on a CPU.
            scaled_ND = query_ND.to(dtype) / (temperature * math.log(2))
            key_ND = key_ND.to(dtype)
            positive_N1 = (scaled_ND * key_ND).sum(dim=1, keepdim=True)
            negatives = _form_for(query_ND.device, query_ND.shape[1])(scaled_ND, queue_KD)
            highest_N1 = torch.maximum(negatives.highest_N1, positive_N1)
            rescale_N1 = (negatives.highest_N1 - highest_N1).exp2_()
            own_N1 = (positive_N1 - highest_N1).exp2_()
            total_N1 = negatives.total_N1 * rescale_N1 + own_N1
            mean_key_ND = (negatives.weighted_ND * rescale_N1 + own_N1 * key_ND) / total_N1
            loss_N1 = (highest_N1 - positive_N1 + total_N1.log2()) * math.log(2)
            grad_ND = (mean_key_ND - key_ND) / (temperature * len(query_ND))
            accuracy = (positive_N1 > negatives.highest_N1).to(dtype).mean()
        ctx.save_for_backward(grad_ND.to(query_ND.dtype))
        ctx.mark_non_differentiable(accuracy)
        return loss_N1.mean(), accuracy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_outputs[0] * grad_ND, None, None, None


def chunked_sums(
    scaled_ND: Tensor, queue_KD: Tensor, chunk_logits: int = CHUNK_LOGITS
) -> SoftmaxSums:
    """The sums with a running maximum over chunks, so that no temperature over- or underflows.

    Args:
        scaled_ND: queries over temperature, in units of log 2; float32 or float64.
        queue_KD: of any floating-point type.
        chunk_logits: how many of the N times K logits exist at a time.
    """
    highest_N1 = scaled_ND.new_full((len(scaled_ND), 1), -torch.inf)
    total_N1 = torch.zeros_like(highest_N1)
    weighted_ND = torch.zeros_like(scaled_ND)
    for rows_MD in queue_KD.split(max(MIN_CHUNK_ROWS, chunk_logits // len(scaled_ND))):
        rows_MD = rows_MD.to(scaled_ND.dtype)
        logits_NM = _product(scaled_ND, rows_MD)
        new_highest_N1 = torch.maximum(highest_N1, logits_NM.amax(dim=1, keepdim=True))
        weights_NM = logits_NM.sub_(new_highest_N1).exp2_()
        rescale_N1 = (highest_N1 - new_highest_N1).exp2_()
        total_N1.mul_(rescale_N1).add_(weights_NM.sum(dim=1, keepdim=True))
        weighted_ND.mul_(rescale_N1).add_(_product(weights_NM, rows_MD.T))
        highest_N1 = new_highest_N1
    return SoftmaxSums(highest_N1, total_N1, weighted_ND)


def _product(a_NX: Tensor, b_MX: Tensor) -> Tensor:
    """``a @ b.T``."""
    if a_NX.device.type != "cpu" or a_NX.dtype != torch.float32:
        return a_NX @ b_MX.T
    # As a 1x1 convolution, which runs in oneDNN and not in MKL: on AMD processors that one leaves
    # half of AVX-512's speed unused (200 against 400 Gflop/s on two cores of an EPYC).
    (n, x), m = a_NX.shape, len(b_MX)
    pixels = a_NX.view(1, n, 1, x).permute(0, 3, 1, 2)
    return F.conv2d(pixels, b_MX.view(m, x, 1, 1)).permute(0, 2, 3, 1).reshape(n, m)


@cache
def _form_for(device: torch.device, dim: int) -> Callable[[Tensor, Tensor], SoftmaxSums]:
    """How the queue is read on a device; found out once for each embedding size."""
    if device.type == "cpu":
        from model.info_nce_threads import threaded_sums

        return threaded_sums
    if device.type != "cuda":
        return chunked_sums
    try:
        from model.info_nce_triton import MAX_DIM, triton_sums

        if dim > MAX_DIM:
            return chunked_sums
        triton_sums(torch.ones(1, dim, device=device), torch.ones(1, dim, device=device))
    except Exception as error:  # no Triton, no C compiler, a GPU that it does not know
        warnings.warn(
            f"the loss runs in PyTorch's own operations, since Triton does not work here: {error}",
            stacklevel=2,
        )
        return chunked_sums
    return triton_sums
