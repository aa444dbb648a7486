"""Momentum Contrast: a query encoder, and a key encoder that follows it.

Source: He et al. 2019, https://arxiv.org/abs/1911.05722, section 3.2 and Algorithm 1; with a
predictor and both views as queries MoCo v3, Chen et al. 2021, https://arxiv.org/abs/2104.02057,
Algorithm 1.

Letters in names: N images on this rank, B images on all ranks, H W pixels, D embedding size.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.batch_norm import over_parts, split_batch_norms, sync_batch_norms
from model.batch_shuffle import make_local_shuffle, make_shuffle
from model.collectives import world_size
from model.encoder import Encoder, EncoderConfig, is_vit, unit_length
from model.heads import make_predictor

LEAST_PICTURES = 2  # that batch norm has statistics of


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """The method's own numbers."""

    mechanism: Literal["queue", "memory-bank", "end-to-end", "batch"] = "queue"
    """queue: MoCo v1, v2. memory-bank: an entry for each picture. end-to-end: keys of the batch,
    with gradient. batch: MoCo v3, keys of the batch from the key encoder."""
    queue: int = 65_536
    """Length of the queue (K); of a memory bank as many entries are drawn at each step."""
    queue_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the keys in the queue; bfloat16 halves its memory."""
    overlap_gather: bool = False
    """Keys of other processes go into the queue during the backward pass."""
    momentum: float = 0.999
    """Of the key encoder (m)."""
    momentum_schedule: Literal["constant", "cosine"] = "constant"
    """cosine: from --moco.momentum to 1 at the end; MoCo v3."""
    bank_momentum: float = 0.5
    """Of the entries of a memory bank; of the paper's comparison."""
    temperature: float = 0.2
    """Divides the similarities (T)."""
    symmetric: bool = False
    """Each view is the query of the other once; the two losses are added."""
    predictor: bool = False
    """An MLP on the side of the queries; MoCo v3."""
    loss_2t: bool = False
    """The loss times 2 T; MoCo v3."""
    batch_norm: Literal["shuffle", "split", "sync", "none"] = "shuffle"
    """shuffle: groups with keys among other pictures. split: the same within each process, nothing
    travels. sync: one group of all processes. none: each process's batch is one group."""
    batch_norm_groups: int = 8
    """Groups of the global batch; the paper's 8 GPUs. Kept for any number of processes up to it."""

    def __post_init__(self) -> None:
        checks = (
            ("queue", self.queue >= 1, "at least 1"),
            ("momentum", 0 <= self.momentum <= 1, "from 0 to 1"),
            ("bank-momentum", 0 <= self.bank_momentum < 1, "from 0 to below 1"),
            ("temperature", 0 < self.temperature < math.inf, "above 0"),
            ("batch-norm-groups", self.batch_norm_groups >= 1, "at least 1"),
        )
        for flag, fits, allowed in checks:
            if not fits:
                value = getattr(self, flag.replace("-", "_"))
                raise ValueError(f"--moco.{flag} {value}: give a number {allowed}")


def groups_per_process(config: MoCoConfig, global_batch: int, world: int) -> int:
    """Batch-norm groups of one process: those of the global batch, shared out, at least one.

    Raises:
        ValueError: if the groups cannot be shared out evenly.
    """
    groups = config.batch_norm_groups
    if config.batch_norm == "split" and world >= groups and groups > 1:
        raise ValueError(
            f"--moco.batch-norm split needs several groups in each process, {groups} groups over "
            f"{world} processes leave one: use shuffle, or more --moco.batch-norm-groups"
        )
    if config.batch_norm in ("sync", "none") or world >= groups:
        if global_batch // world < 2:
            raise ValueError(
                f"a global batch of {global_batch} over {world} processes leaves batch norm "
                "without statistics: use a --batch of at least 2 pictures for each process"
            )
        return 1
    if groups % world or global_batch % groups or global_batch // groups < 2:
        raise ValueError(
            f"{groups} batch-norm groups do not share out a global batch of {global_batch} over "
            f"{world} processes: use a multiple of {world} that divides the batch for "
            "--moco.batch-norm-groups, with at least 2 pictures a group"
        )
    return groups // world


def count_micro_batches(config: MoCoConfig, global_batch: int, world: int, most: int | None) -> int:
    """Into how many equal micro-batches each process cuts its share: as few as are small enough.

    Args:
        config: of the method.
        global_batch: pictures of a step, all processes together.
        world: number of processes, which divides them.
        most: pictures that may go through a process's network at once; None: its whole share.

    Raises:
        ValueError: if its share cannot be cut so; naming what can be.
    """
    share = global_batch // world
    if most is None or most >= share:
        return 1
    if config.mechanism == "end-to-end":
        raise ValueError(
            f"--micro-batch {most}: end-to-end learns through all keys of a step at once, the "
            f"{share} pictures of a process: leave --micro-batch, or choose another "
            "--moco.mechanism"
        )
    has_groups = config.batch_norm in ("shuffle", "split")
    pieces = groups_per_process(config, global_batch, world) if has_groups else share
    sizes = [share // count for count in range(1, pieces + 1) if pieces % count == 0]
    sizes = [size for size in sizes if size >= LEAST_PICTURES]  # for batch norm
    fitting = [size for size in sizes if size <= most]
    if not fitting:
        groups = f", whole batch-norm groups of {sizes[-1]}" if has_groups else ""
        more = ", or more --moco.batch-norm-groups" if has_groups else ""
        raise ValueError(
            f"--micro-batch {most}: the {share} pictures of a process are cut into equal parts"
            f"{groups}: give {one_of(sizes[::-1])}{more}"
        )
    return share // max(fitting)


def one_of(numbers: list[int]) -> str:
    """For messages: 2, 4 or 8."""
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


class QueryEncoder(nn.Module):
    """The query encoder and the order of a step; each mechanism says where its keys come from.

    What keys are compared with is not part of this module: data-parallel wrappers broadcast a
    module's buffers at every step, which would send the whole queue around.

    Args:
        encoder: the network.
        config: of the method.
        global_batch: images of all ranks (B), from which the batch-norm groups follow.
        seed: of the shuffle.
        image_px: side of the views, which a ViT must know.
        micro_batch: pictures that may go through an encoder at once; None: all of this rank.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        config: MoCoConfig,
        global_batch: int,
        seed: int,
        image_px: int = 224,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__()
        groups = groups_per_process(config, global_batch, world_size())
        count = count_micro_batches(config, global_batch, world_size(), micro_batch)
        groups = max(groups // count, 1)
        self.micro_batches = count
        self.encoder_q = Encoder(encoder, groups, image_px)
        self.predictor = None
        if config.predictor:
            on_vit = is_vit(self.encoder_q.backbone)
            self.predictor = make_predictor(encoder.dim, hidden=encoder.hidden, is_vit=on_vit)
            if groups > 1:
                split_batch_norms(self.predictor, groups)
        if config.batch_norm == "sync":
            sync_batch_norms(self)
        self._is_symmetric = config.symmetric
        self._batch_norm = config.batch_norm
        self._seed = seed

    def forward(
        self,
        query_view_N3HW: Tensor,
        key_view_N3HW: Tensor,
        step: int,
        keys: list[Tensor] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of one step, unit-length, ``[N, D]`` each.

        Args:
            query_view_N3HW: one view of each picture.
            key_view_N3HW: the other.
            step: from 0; the shuffle is a function of it.
            keys: those of these views, where they are made already.

        Returns:
            One pair; where the loss is symmetric a second one with the views exchanged.
        """
        if keys is None:  # before the queries, whose activations take the memory until the end
            keys = self.keys_ahead([query_view_N3HW, key_view_N3HW], step)
        queries = [self.query(query_view_N3HW)]
        if self._is_symmetric:
            queries.append(self.query(key_view_N3HW))
        if keys is None:
            keys = self.keys([key_view_N3HW, query_view_N3HW][: len(queries)], queries, step)
        return list(zip(queries, keys, strict=True))

    def keys_ahead(self, views: Sequence[Tensor], step: int) -> list[Tensor] | None:  # noqa: ARG002
        """Keys of a step before its queries; None where they are made of these.

        Args:
            views: query view and key view, ``[N, 3, H, W]``.
            step: from 0.
        """
        return None

    def query(self, view_N3HW: Tensor) -> Tensor:
        """Queries of a view; through the predictor, where there is one."""
        if self.predictor is None:
            query_ND: Tensor = self.encoder_q(view_N3HW)
            return query_ND
        return unit_length(self.predictor(self.encoder_q.projection(view_N3HW)))

    def keys(self, views: list[Tensor], queries: list[Tensor], step: int) -> list[Tensor]:
        """The key of each query, from the view at the same place, where none were made ahead.

        Args:
            views: ``[N, 3, H, W]`` each.
            queries: ``[N, D]`` each.
            step: from 0.
        """
        raise NotImplementedError

    def encode_shuffled(self, encoder: nn.Module, view_N3HW: Tensor, step: int, n: int) -> Tensor:
        """Embeddings whose batch norm sees other pictures together than their queries' does.

        Args:
            encoder: views to embeddings.
            view_N3HW: the n-th view of this step that is made a key.
            step: from 0.
            n: from 0.
        """
        if self._batch_norm not in ("shuffle", "split"):
            return self._encode(encoder, view_N3HW)
        make = make_shuffle if self._batch_norm == "shuffle" else make_local_shuffle
        shuffle = make(len(view_N3HW), self._seed, step, view_N3HW.device, view=n)
        return shuffle.undo(self._encode(encoder, shuffle.apply(view_N3HW)))

    def _encode(self, encoder: nn.Module, view_N3HW: Tensor) -> Tensor:
        if self.micro_batches == 1:
            whole_ND: Tensor = encoder(view_N3HW)
            return whole_ND
        parts = over_parts(encoder.buffers(), view_N3HW.chunk(self.micro_batches))
        return torch.cat([encoder(part_M3HW) for part_M3HW in parts])

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the optimiser moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


class MoCo(QueryEncoder):
    """Query encoder f_q, key encoder f_k, and the step that moves f_k towards f_q.

    ``momentum`` may be set before each step; the rest is as in ``QueryEncoder``.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        config: MoCoConfig,
        global_batch: int,
        seed: int,
        image_px: int = 224,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(encoder, config, global_batch, seed, image_px, micro_batch)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        self.momentum = config.momentum

    @torch.no_grad()
    def keys_ahead(self, views: Sequence[Tensor], step: int) -> list[Tensor]:
        """Keys without gradient from the key encoder, which moves first.

        So does the official code; in Algorithm 1 the move stands at the end of the step before.
        """
        self.move_key_encoder()
        query_view_N3HW, key_view_N3HW = views
        exchanged = [key_view_N3HW, query_view_N3HW] if self._is_symmetric else [key_view_N3HW]
        return [self.encode_shuffled(self.encoder_k, v, step, n) for n, v in enumerate(exchanged)]

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        """Equation 2, theta_k <- m theta_k + (1 - m) theta_q, for all parameters in one call.

        Buffers are not moved: the running statistics of f_k are its own, as in the official code.
        """
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()),
            list(self.encoder_q.parameters()),
            1.0 - self.momentum,
        )
