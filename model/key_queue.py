"""The dictionary: the newest K keys, first in, first out.

Letters in names: N keys of this rank, B keys of all ranks, D embedding size, K queue length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import gather, world_size
from model.dictionary import Dictionary, Pairs, over_pairs
from model.info_nce import info_nce_with_accuracy


class KeyQueue(Dictionary):
    """K unit-length keys in rows, contiguous, overwritten in a circle; equal on all ranks.

    Rows and not columns (as in the official code), so that the keys of a step are one block of
    memory that all ranks' keys can be gathered into. Any K works: a write that reaches the end
    goes on at the beginning.

    Args:
        length: K.
        dim: D.
        seed: of the random unit vectors that it starts with.
    """

    name = "queue"
    rows_KD: Tensor

    def __init__(self, length: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows_KD = F.normalize(torch.randn(length, dim, generator=generator), dim=1)
        self.register_buffer("rows_KD", rows_KD)
        self.place = 0
        """The row that the next key is written to."""

    def candidates(self, global_batch: int) -> int:  # noqa: ARG002
        """Keys that a query is compared with, its own among them."""
        return len(self.rows_KD) + 1

    def contrast(
        self,
        pairs: Pairs,
        temperature: float,
        sample_N: Any,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Loss of a step, added up over its pairs, and pretext accuracy; then the keys go in.

        All queries are compared with the keys of earlier steps, so no positive is a negative.
        """
        found = [
            info_nce_with_accuracy(query_ND, key_ND, self.rows_KD, temperature)
            for query_ND, key_ND in pairs
        ]
        for _, key_ND in pairs:
            self.push(key_ND)  # already: the loss keeps no reference to the queue
        return over_pairs(found)

    def plain_state(self) -> dict[str, int]:
        """What a checkpoint holds beside the rows."""
        return {"queue_place": self.place}

    def load_plain_state(self, state: dict[str, Any]) -> None:
        """The inverse of ``plain_state``."""
        self.place = int(state["queue_place"])

    @torch.no_grad()
    def push(self, key_ND: Tensor) -> None:
        """Replace the oldest keys by those of all ranks, in the order of the ranks.

        May be called as soon as the loss is computed, also before the backward pass: the loss
        keeps no reference to the queue.
        """
        length = len(self.rows_KD)
        count = len(key_ND) * world_size()
        key_ND = key_ND.to(self.rows_KD.dtype)
        if self.place + count <= length:
            gather(key_ND, out_B=self.rows_KD[self.place : self.place + count])
        else:
            key_BD = gather(key_ND)
            # Where a batch is longer than the queue only its last K keys survive.
            kept_BD = key_BD[-length:]
            first = (self.place + count - len(kept_BD)) % length
            before_end = min(length - first, len(kept_BD))
            self.rows_KD[first : first + before_end] = kept_BD[:before_end]
            self.rows_KD[: len(kept_BD) - before_end] = kept_BD[before_end:]
        self.place = (self.place + count) % length
