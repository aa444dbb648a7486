"""Keys of the current batch as the dictionary: end-to-end, and MoCo v3.

End-to-end, one encoder makes queries and keys and learns through both (MoCo, figure 2 a); the
dictionary is as long as the global batch. MoCo v3 compares with the batch too, but its keys come
from the key encoder and have no gradient.

Letters in names: N images on this rank, B images on all ranks, D embedding size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import gather, gather_with_gradient, rank, world_size
from model.dictionary import Dictionary, Pairs, over_pairs
from model.moco import QueryEncoder


class EndToEnd(QueryEncoder):
    """One encoder of queries and keys, with gradient through both.

    Its keys are shuffled among the batch-norm groups as those of MoCo are (appendix A.9).
    """

    def keys(self, views: list[Tensor], queries: list[Tensor], step: int) -> list[Tensor]:  # noqa: ARG002
        """Keys with gradient."""
        return [self.encode_shuffled(self.encoder_q, v, step, n) for n, v in enumerate(views)]


class BatchKeys(Dictionary):
    """The dictionary of the batch itself; nothing of it outlives a step."""

    name = "batch"

    def candidates(self, global_batch: int) -> int:
        """Keys that a query is compared with, its own among them."""
        return global_batch

    def contrast(
        self,
        pairs: Pairs,
        temperature: float,
        sample_N: Any,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Loss of a step, added up over its pairs, and pretext accuracy."""
        found = [batch_nce(query_ND, key_ND, temperature) for query_ND, key_ND in pairs]
        return over_pairs(found)


def batch_nce(query_ND: Tensor, key_ND: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of picking each query's own key among those of all ranks, ``[B, D]``.

    Args:
        query_ND: unit-length queries.
        key_ND: unit-length keys of the same pictures; may have a gradient.
        temperature: divides the similarities.

    Returns:
        The loss in nats, log(B) for equal similarities, and without gradient the share of queries
        that are nearest to their own key.
    """
    with torch.autocast(query_ND.device.type, enabled=False):
        dtype = torch.promote_types(query_ND.dtype, torch.float32)
        gathered = gather_with_gradient if key_ND.requires_grad else gather
        key_BD = gathered(key_ND.to(dtype)) if world_size() > 1 else key_ND.to(dtype)
        logits_NB = query_ND.to(dtype) @ key_BD.T / temperature
        own_N = torch.arange(len(query_ND), device=query_ND.device) + rank() * len(query_ND)
        loss = F.cross_entropy(logits_NB, own_N)
        accuracy = (logits_NB.detach().argmax(dim=1) == own_N).to(dtype).mean()
    return loss, accuracy
