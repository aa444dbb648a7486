"""Keys of the current batch as the dictionary: end-to-end, and MoCo v3.

End-to-end, one encoder makes queries and keys and learns through both (MoCo, figure 2 a); the
dictionary is as long as the global batch. MoCo v3 compares with the batch too, but its keys come
from the key encoder and have no gradient.

Letters in names: N images on this rank, M of them, B images on all ranks, D embedding size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import gather, gather_with_gradient, rank, world_size
from model.dictionary import Comparison, Dictionary, over_pairs
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

    def comparison(
        self,
        keys: Sequence[Tensor],
        temperature: float,
        sample_N: Any,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Comparison:
        """Queries are compared with the keys of all ranks, which are gathered here."""
        gathered = [gather_keys(key_ND) for key_ND in keys]

        def compare(queries: Sequence[Tensor], own: slice) -> tuple[Tensor, Tensor]:
            share = len(keys[0])
            own_M = torch.arange(share, device=keys[0].device)[own] + rank() * share
            return over_pairs(
                batch_nce(query_MD, key_BD, own_M, temperature)
                for query_MD, key_BD in zip(queries, gathered, strict=True)
            )

        return compare


def gather_keys(key_ND: Tensor) -> Tensor:
    """Keys of all ranks, ``[B, D]`` in at least float32; with their gradient, if they have one."""
    key_ND = key_ND.to(torch.promote_types(key_ND.dtype, torch.float32))
    if world_size() == 1:
        return key_ND
    return gather_with_gradient(key_ND) if key_ND.requires_grad else gather(key_ND)


def batch_nce(
    query_MD: Tensor, key_BD: Tensor, own_M: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of picking each query's own key among those of all ranks.

    Args:
        query_MD: unit-length queries.
        key_BD: unit-length keys; may have a gradient.
        own_M: place of each query's own key.
        temperature: divides the similarities.

    Returns:
        The loss in nats, log(B) for equal similarities, and without gradient the share of queries
        that are nearest to their own key.
    """
    with torch.autocast(query_MD.device.type, enabled=False):
        logits_MB = query_MD.to(key_BD.dtype) @ key_BD.T / temperature
        loss = F.cross_entropy(logits_MB, own_M)
        accuracy = (logits_MB.detach().argmax(dim=1) == own_M).to(key_BD.dtype).mean()
    return loss, accuracy
