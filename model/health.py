"""What queries, keys and encoders tell of a run: is the dictionary large, consistent and alive?

Pure functions, cheap enough for every few logged steps: at most ``MOST_ROWS`` keys are looked at,
nothing waits for the device. What the figures mean is said in plain words by ``eval/alarms.py``.

Letters in names: N queries, D embedding size, K queue length, M keys looked at, H bins.
"""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 1024  # 524,000 pairs; uniformity then has a standard error of about 1 %
BINS = 40
UNKNOWN_LABEL = -1


@dataclass(frozen=True)
class KeyAge:
    """How old the keys of a queue are, in steps, and which part of it has been filled."""

    mean_steps: float
    oldest_steps: float
    filled: float


def key_age(steps_done: int, keys_per_step: int, length: int) -> KeyAge:
    """The ages of the keys that the next step is compared with; the newest are one step old.

    Args:
        steps_done: since the start of the run.
        keys_per_step: of all processes.
        length: K.
    """
    keys = min(steps_done * keys_per_step, length)
    if keys == 0:
        return KeyAge(0.0, 0.0, 0.0)
    full, rest = divmod(keys, keys_per_step)
    total = keys_per_step * full * (full + 1) / 2 + rest * (full + 1)
    return KeyAge(total / keys, math.ceil(keys / keys_per_step), keys / length)


def effective_rank(rows_MD: Tensor) -> Tensor:
    """RankMe: exp of the entropy of the singular values, from 1 (a line) to min(M, D).

    Source: equation 2 of https://arxiv.org/abs/2210.02885.
    """
    # Of the smaller Gram matrix, in float64: its eigenvalues are the squares.
    rows_MD = rows_MD.double()
    gram = rows_MD.T @ rows_MD if rows_MD.shape[0] >= rows_MD.shape[1] else rows_MD @ rows_MD.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    rank: Tensor = torch.special.entr(share).sum().exp()
    return rank


def uniformity(rows_MD: Tensor) -> Tensor:
    """Log of the mean over pairs of exp(-2 distance^2): 0 if all are equal, lower is more even.

    Uniform on a sphere of many dimensions: about -4 + 8 / D.

    Source: section 4.1.2 of https://arxiv.org/abs/2005.10242, t = 2.
    """
    return F.pdist(rows_MD.float()).square().mul(-2).exp().mean().log()


def alignment(query_ND: Tensor, key_ND: Tensor) -> Tensor:
    """Mean squared distance of a query and its own key, from 0 to 4 on the unit sphere.

    Source: section 4.1.1 of https://arxiv.org/abs/2005.10242, alpha = 2.
    """
    return (query_ND.float() - key_ND.float()).square().sum(dim=1).mean()


def similarity_counts(similarity: Tensor) -> Tensor:
    """How many similarities lie in each of H bins of equal width from -1 to 1, ``[H]``."""
    return torch.histc(similarity.float().clamp(-1, 1), BINS, min=-1, max=1)


def encoder_distance(query: Iterable[Tensor], key: Iterable[Tensor]) -> Tensor:
    """Distance of the two encoders' weights, over the length of the query encoder's."""
    query = list(query)
    # Weight by weight: the difference of all at once is memory that has to be had first.
    apart = torch.stack([torch.dist(q, k) for q, k in zip(query, key, strict=True)])
    distance: Tensor = apart.norm() / torch.stack(torch._foreach_norm(query)).norm()
    return distance


class RecentLabels:
    """Labels of this process's pictures whose keys are in the queue.

    One process's part of the queue is a fair sample of it, so no process asks the others.

    Args:
        length: keys of this process in a full queue.
    """

    def __init__(self, length: int) -> None:
        self._labels: deque[int] = deque(maxlen=max(length, 1))

    def push(self, labels: Iterable[int]) -> None:
        """Those of a step, after it."""
        self._labels.extend(np.asarray(labels).tolist())

    def false_negative_share(self, labels: Iterable[int]) -> float | None:
        """Mean share of the queue that is of a query's own class; None where that is not known."""
        keys = torch.tensor([label for label in self._labels if label != UNKNOWN_LABEL])
        queries = torch.tensor([int(label) for label in labels])
        queries = queries[queries != UNKNOWN_LABEL]
        if not len(keys) or not len(queries):
            return None
        counts = torch.bincount(keys, minlength=int(queries.max()) + 1)
        return float(counts[queries].double().mean() / len(keys))


def measure(
    query_ND: Tensor, key_ND: Tensor, negative_MD: Tensor | None
) -> dict[str, Tensor | float]:
    """The figures of one step, on the device.

    Args:
        query_ND: unit-length.
        key_ND: unit-length, of the same pictures.
        negative_MD: unit-length keys that these queries are compared with; None: the keys of the
            other pictures of the batch.
    """
    query_ND, key_ND = query_ND.detach().float(), key_ND.detach().float()
    others_MD = key_ND if negative_MD is None else negative_MD.detach().float()
    positive_N = (query_ND * key_ND).sum(dim=1)
    negative_NM = query_ND[:MOST_ROWS] @ others_MD.T
    if negative_MD is None:
        negative_NM = negative_NM[
            ~torch.eye(*negative_NM.shape, dtype=torch.bool).to(key_ND.device)
        ]
    return {
        "positive_similarity": positive_N.mean(),
        "negative_similarity": negative_NM.mean(),
        "effective_rank": effective_rank(others_MD),
        "highest_rank": min(others_MD.shape),
        "uniformity": uniformity(others_MD),
        "alignment": alignment(query_ND, key_ND),
        "positive_counts": similarity_counts(positive_N),
        "negative_counts": similarity_counts(negative_NM),
    }


def some_rows(rows_KD: Tensor, filled: float) -> Tensor:
    """At most ``MOST_ROWS`` keys, evenly from the filled part of a queue, ``[M, D]``."""
    count = max(round(len(rows_KD) * filled), 1)
    return rows_KD[:count][:: math.ceil(count / MOST_ROWS)]
