"""The dictionary: the newest K keys, first in, first out.

Letters in names: N keys of this rank, B keys of all ranks, D embedding size, K queue length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import begin_gather, world_size
from model.dictionary import Comparison, Dictionary, finite, over_pairs
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
        dtype: of the rows; bfloat16 halves the memory and what the loss reads.
        overlaps: a push begins only, and ``settle`` ends it: the keys of other ranks travel during
            the backward pass, which does not read the queue.
    """

    name = "queue"
    rows_KD: Tensor

    def __init__(
        self,
        length: int,
        dim: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        *,
        overlaps: bool = False,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows_KD = F.normalize(torch.randn(length, dim, generator=generator), dim=1)
        self.register_buffer("rows_KD", rows_KD.to(dtype))
        self._overlaps = overlaps
        self._coming: list[tuple[Callable[[], Any], Tensor, Tensor, int]] = []
        self.place = 0
        """The row that the next key is written to."""

    def candidates(self, global_batch: int) -> int:  # noqa: ARG002
        """Keys that a query is compared with, its own among them."""
        return len(self.rows_KD) + 1

    def comparison(
        self,
        keys: Sequence[Tensor],
        temperature: float,
        sample_N: Any,  # noqa: ARG002
        step: int,  # noqa: ARG002
    ) -> Comparison:
        """All queries are compared with the keys of earlier steps: no positive is a negative."""
        self.settle()

        def compare(queries: Sequence[Tensor], own: slice) -> tuple[Tensor, Tensor]:
            return over_pairs(
                info_nce_with_accuracy(query_MD, key_ND[own], self.rows_KD, temperature)
                for query_MD, key_ND in zip(queries, keys, strict=True)
            )

        return compare

    def enqueue(self, keys: Sequence[Tensor], sample_N: Any) -> None:  # noqa: ARG002
        """Already before the backward pass: the loss keeps no reference to the queue."""
        for key_ND in keys:
            self.push(key_ND)

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
        keeps no reference to the queue. If it overlaps, rows may be read after ``settle`` only.
        """
        length = len(self.rows_KD)
        count = len(key_ND) * world_size()
        key_ND = finite(key_ND.detach().to(self.rows_KD.dtype)).contiguous()
        if sum(len(coming_BD) for _, _, coming_BD, _ in self._coming) + count > length:
            self.settle()  # else two writes of the same rows were on their way
        fits = self.place + count <= length
        rows_BD = self.rows_KD[self.place : self.place + count]
        out_BD = rows_BD if fits else key_ND.new_empty(count, key_ND.shape[1])
        self._coming.append((begin_gather(key_ND, out_BD), key_ND, out_BD, self.place))
        self.place = (self.place + count) % length
        if not self._overlaps:
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Wait until the keys of every push stand in their rows."""
        for wait, _, out_BD, place in self._coming:
            wait()
            if place + len(out_BD) > len(self.rows_KD):
                self._write_round(out_BD, place)
        self._coming.clear()

    def _write_round(self, key_BD: Tensor, place: int) -> None:
        """Write rows that reach the end, and go on at the beginning."""
        length = len(self.rows_KD)
        # Where a batch is longer than the queue only its last K keys survive.
        kept_BD = key_BD[-length:]
        first = (place + len(key_BD) - len(kept_BD)) % length
        before_end = min(length - first, len(kept_BD))
        self.rows_KD[first : first + before_end] = kept_BD[:before_end]
        self.rows_KD[: len(kept_BD) - before_end] = kept_BD[before_end:]
