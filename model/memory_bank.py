"""The memory bank: a dictionary with one entry for each picture of the data set.

An entry is a slow mean of what the encoder made of its picture each time it was met; the bank has
the whole data set in view, but its entries are as old as an epoch.

Source: Wu et al. 2018, https://arxiv.org/abs/1805.01978; as the second mechanism in figure 2 of
MoCo, which compares it under the same loss.

Letters in names: N images on this rank, B images on all ranks, S pictures of the data set,
D embedding size, K entries drawn.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.collectives import gather
from model.dictionary import Comparison, Dictionary, finite, over_pairs
from model.info_nce import info_nce_with_accuracy
from model.moco import QueryEncoder
from model.transfer import send


class BankEncoder(QueryEncoder):
    """One encoder; what it makes of a view is the query, and goes into the bank."""

    def keys(self, views: list[Tensor], queries: list[Tensor], step: int) -> list[Tensor]:  # noqa: ARG002
        """The queries themselves, without gradient."""
        return [query_ND.detach() for query_ND in queries]


class MemoryBank(Dictionary):
    """S unit-length entries in rows, equal on all ranks.

    Args:
        samples: S.
        dim: D.
        drawn: K, the negatives of a step; the same ones for all queries, drawn with replacement
            among the entries of pictures that are not in the batch.
        momentum: of an entry.
        seed: of the random unit vectors that it starts with, and of the draw.

    Raises:
        ValueError: if the bank is not longer than a batch can be.
    """

    name = "memory_bank"
    rows_SD: Tensor

    def __init__(
        self, samples: int, dim: int, *, drawn: int, momentum: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows_SD = F.normalize(torch.randn(samples, dim, generator=generator), dim=1)
        self.register_buffer("rows_SD", rows_SD)
        self._drawn = drawn
        self._momentum = momentum
        self._seed = seed

    def candidates(self, global_batch: int) -> int:  # noqa: ARG002
        """Keys that a query is compared with, its own among them."""
        return self._drawn + 1

    def comparison(
        self,
        keys: Sequence[Tensor],  # noqa: ARG002
        temperature: float,
        sample_N: Any,
        step: int,
    ) -> Comparison:
        """Queries are compared with their pictures' entries and with those drawn for the step.

        Args:
            keys: not read.
            temperature: divides the similarities.
            sample_N: numbers of the pictures of this rank, from 0 to S - 1.
            step: from 0; the draw is a function of it.
        """
        own_N = self._numbers(sample_N)
        drawn_K = draw_negatives(len(self.rows_SD), gather(own_N), self._drawn, self._seed, step)
        negative_KD, positive_ND = self.rows_SD[drawn_K], self.rows_SD[own_N]

        def compare(queries: Sequence[Tensor], own: slice) -> tuple[Tensor, Tensor]:
            return over_pairs(
                info_nce_with_accuracy(query_MD, positive_ND[own], negative_KD, temperature)
                for query_MD in queries
            )

        return compare

    def enqueue(self, keys: Sequence[Tensor], sample_N: Any) -> None:
        """The entries of the step's pictures move towards what moves them."""
        own_B = gather(self._numbers(sample_N))
        for key_ND in keys:
            self.move(own_B, gather(finite(key_ND.to(self.rows_SD.dtype))))

    def _numbers(self, sample_N: Any) -> Tensor:
        return send(torch.as_tensor(sample_N, dtype=torch.int64), self.rows_SD.device)

    @torch.no_grad()
    def move(self, own_B: Tensor, key_BD: Tensor) -> None:
        """Move entries towards new embeddings: v <- normalised(momentum v + (1 - momentum) key).

        Of a picture that stands twice in a batch (a stand-in for a bad one) the first row counts.
        """
        sorted_B, order_B = torch.sort(own_B, stable=True)
        is_first_B = torch.ones_like(sorted_B, dtype=torch.bool)
        is_first_B[1:] = sorted_B[1:] != sorted_B[:-1]
        places_B = torch.arange(len(sorted_B), device=sorted_B.device)
        # Equal pictures write equal rows, so it does not matter which write is the last.
        key_BD = key_BD[order_B[torch.cummax(places_B * is_first_B, dim=0).values]]
        moved_BD = torch.lerp(key_BD, self.rows_SD[sorted_B], self._momentum)
        self.rows_SD.index_copy_(0, sorted_B, F.normalize(moved_BD, dim=1))


def draw_negatives(samples: int, own_B: Tensor, count: int, seed: int, step: int) -> Tensor:
    """Numbers of K pictures that are not among ``own_B``; a pure function of seed and step.

    Args:
        samples: S, more than there are in a batch.
        own_B: pictures of the batch.
        count: K.
        seed: of the run.
        step: from 0.
    """
    counter_K = torch.arange(count, device=own_B.device) + count * step
    free_K = hashed(counter_K, seed) % (samples - len(own_B))
    # The n-th smallest picture outside the batch: n plus the batch's pictures up to there. Repeats
    # go to the end, where they count for nothing.
    sorted_B = torch.sort(own_B).values
    repeats_B = torch.zeros_like(sorted_B, dtype=torch.bool)
    repeats_B[1:] = sorted_B[1:] == sorted_B[:-1]
    sorted_B = torch.sort(sorted_B + 2 * samples * repeats_B).values
    gaps_B = sorted_B - torch.arange(len(sorted_B), device=sorted_B.device)
    negative_K: Tensor = free_K + torch.searchsorted(gaps_B, free_K, right=True)
    return negative_K


def hashed(number_K: Tensor, seed: int) -> Tensor:
    """Integers from 0 to 2^62 - 1 that look random, the same in every version of PyTorch.

    The finalizer of SplitMix64 (Steele et al. 2014); products wrap round in 64 bits.
    """
    mixed_K = number_K * _signed(0x9E3779B97F4A7C15) + _signed(seed * 0xD1342543DE82EF95 + 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed_K = (mixed_K ^ _shifted(mixed_K, shift)) * _signed(factor)
    return _shifted(mixed_K ^ _shifted(mixed_K, 31), 2)


def _signed(number: int) -> int:
    number %= 2**64
    return number - 2**64 if number >= 2**63 else number


def _shifted(number_K: Tensor, places: int) -> Tensor:
    """To the right with zeros, as for unsigned numbers."""
    shifted_K: Tensor = (number_K >> places) & (2 ** (64 - places) - 1)
    return shifted_K
