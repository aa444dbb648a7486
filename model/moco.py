"""Momentum Contrast: a query encoder, and a key encoder that follows it.

Source: He et al. 2019, https://arxiv.org/abs/1911.05722, section 3.2 and Algorithm 1.

Letters in names: N images on this rank, B images on all ranks, H W pixels, D embedding size.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from model.batch_shuffle import make_shuffle
from model.collectives import world_size
from model.encoder import Encoder, EncoderConfig


@dataclass(frozen=True, kw_only=True)
class MoCoConfig:
    """The method's own numbers."""

    queue: int = 65_536
    """Length of the queue (K)."""
    momentum: float = 0.999
    """Of the key encoder (m)."""
    temperature: float = 0.2
    """Divides the similarities (T)."""
    batch_norm: Literal["shuffle", "none"] = "shuffle"
    """shuffle: groups with keys among other pictures. none: each process's batch is one group."""
    batch_norm_groups: int = 8
    """Groups of the global batch; the paper's 8 GPUs. Kept for any number of processes up to it."""

    def __post_init__(self) -> None:
        checks = (
            ("queue", self.queue >= 1, "at least 1"),
            ("momentum", 0 <= self.momentum <= 1, "from 0 to 1"),
            ("temperature", self.temperature > 0, "above 0"),
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
    if config.batch_norm == "none" or world >= config.batch_norm_groups:
        if global_batch // world < 2:
            raise ValueError(
                f"a global batch of {global_batch} over {world} processes leaves batch norm "
                "without statistics: use a --batch of at least 2 pictures for each process"
            )
        return 1
    groups = config.batch_norm_groups
    if groups % world or global_batch % groups or global_batch // groups < 2:
        raise ValueError(
            f"{groups} batch-norm groups do not share out a global batch of {global_batch} over "
            f"{world} processes: use a multiple of {world} that divides the batch for "
            "--moco.batch-norm-groups, with at least 2 pictures a group"
        )
    return groups // world


class MoCo(nn.Module):
    """Query encoder f_q, key encoder f_k, and the step that moves f_k towards f_q.

    The queue is not part of this module: data-parallel wrappers broadcast a module's buffers at
    every step, which would send the whole queue around.

    Args:
        encoder: the network of both.
        config: momentum and batch norm.
        global_batch: images of all ranks (B), from which the batch-norm groups follow.
        seed: of the shuffle.
    """

    def __init__(
        self, encoder: EncoderConfig, config: MoCoConfig, global_batch: int, seed: int
    ) -> None:
        super().__init__()
        groups = groups_per_process(config, global_batch, world_size())
        self.encoder_q = Encoder(encoder, groups)
        self.encoder_k = copy.deepcopy(self.encoder_q)
        self.encoder_k.requires_grad_(False)
        self._momentum = config.momentum
        self._shuffles = config.batch_norm == "shuffle"
        self._seed = seed

    def forward(
        self, query_view_N3HW: Tensor, key_view_N3HW: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys of one step, unit-length, ``[N, D]`` each; the keys have no gradient.

        Moves the key encoder first, as the official code does: in Algorithm 1 the update stands
        at the end of the step before.

        Args:
            query_view_N3HW: one view of each picture.
            key_view_N3HW: the other.
            step: from 0; the shuffle is a function of it.
        """
        query_ND = self.encoder_q(query_view_N3HW)
        with torch.no_grad():
            self.move_key_encoder()
            key_ND = self._keys(key_view_N3HW, step)
        return query_ND, key_ND

    @torch.no_grad()
    def move_key_encoder(self) -> None:
        """Equation 2, theta_k <- m theta_k + (1 - m) theta_q, for all parameters in one call.

        Buffers are not moved: the running statistics of f_k are its own, as in the official code.
        """
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()),
            list(self.encoder_q.parameters()),
            1.0 - self._momentum,
        )

    def _keys(self, key_view_N3HW: Tensor, step: int) -> Tensor:
        if not self._shuffles:
            keys: Tensor = self.encoder_k(key_view_N3HW)
            return keys
        shuffle = make_shuffle(len(key_view_N3HW), self._seed, step, key_view_N3HW.device)
        return shuffle.undo(self.encoder_k(shuffle.apply(key_view_N3HW)))
