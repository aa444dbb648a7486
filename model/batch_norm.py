"""Batch norm over other groups than the batch of one device: smaller ones, or all devices'.

With plain batch norm over the whole batch a query and its key share statistics, and the network
learns to read them ("cheating", MoCo section 3.3). The paper used groups of 32 on 8 GPUs and
shuffled the keys among them; here the groups are the same whatever the number of devices. MoCo v3
takes the statistics of all devices together instead.

Letters in names: N images, C channels, L places of a picture (H times W), G groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from model.collectives import is_distributed, sum_with_gradient, talks_over_gloo, world_size

T = TypeVar("T")


class SplitBatchNorm(_BatchNorm):
    """Batch norm over each of G equal parts of the batch; one set of running statistics.

    The running statistics move towards the mean of the groups' statistics. A group count of 1 and
    evaluation mode are plain batch norm. State-dict names are those of ``nn.BatchNorm2d``.

    Args:
        channels: C.
        groups: G; must divide the batch in training mode.
        affine: whether it has scale and shift.
    """

    def __init__(self, channels: int, groups: int, *, affine: bool = True) -> None:
        super().__init__(channels, affine=affine)
        self.groups = groups

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions after ``[N, C]``."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """Normalised activations, ``[N, C, ...]``."""
        if not self.training or self.groups == 1:
            return super().forward(x_NC)
        n, c = x_NC.shape[:2]
        if n % self.groups:
            raise ValueError(f"a batch of {n} cannot be split into {self.groups} equal groups")
        assert self.running_mean is not None and self.running_var is not None
        mean_GC = self.running_mean.repeat(self.groups)
        var_GC = self.running_var.repeat(self.groups)
        rest = x_NC.shape[2:]
        # Group g of channel c becomes channel g * C + c, so that one call does all groups.
        grouped = x_NC.reshape(self.groups, n // self.groups, c, *rest).transpose(0, 1)
        out = F.batch_norm(
            grouped.reshape(n // self.groups, self.groups * c, *rest),
            mean_GC,
            var_GC,
            self.weight.repeat(self.groups) if self.affine else None,
            self.bias.repeat(self.groups) if self.affine else None,
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )
        with torch.no_grad():
            self.running_mean.copy_(mean_GC.view(self.groups, c).mean(dim=0))
            self.running_var.copy_(var_GC.view(self.groups, c).mean(dim=0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        out = out.reshape(n // self.groups, self.groups, c, *rest).transpose(0, 1)
        return out.reshape(n, c, *rest)


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over all ranks together, on CPUs: PyTorch's own, ``SyncBatchNorm``, refuses them.

    In one process and in evaluation mode it is plain batch norm.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions after ``[N, C]``."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """Normalised activations, ``[N, C, ...]``."""
        if not self.training or not is_distributed():
            return super().forward(x_NC)
        n, c = x_NC.shape[:2]
        # Sums of half precision would lose digits; double stays double.
        x_NCL = x_NC.reshape(n, c, -1).to(torch.promote_types(x_NC.dtype, torch.float32))
        count = n * x_NCL.shape[2] * world_size()
        mean_C = sum_with_gradient(x_NCL.sum(dim=(0, 2))) / count
        centred_NCL = x_NCL - mean_C[:, None]
        var_C = sum_with_gradient(centred_NCL.square().sum(dim=(0, 2))) / count
        self._follow(mean_C.detach(), var_C.detach() * count / (count - 1))
        out_NCL = centred_NCL * (var_C + self.eps).rsqrt()[:, None]
        if self.affine:
            out_NCL = out_NCL * self.weight[:, None] + self.bias[:, None]
        return out_NCL.reshape(x_NC.shape).to(x_NC.dtype)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean_C, self.momentum or 0.0)
        self.running_var.lerp_(unbiased_var_C, self.momentum or 0.0)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)


def split_batch_norms(module: nn.Module, groups: int) -> None:
    """Replace every plain batch norm by a split one with the same weights, in place."""
    _replace(module, SplitBatchNorm, groups=groups)


def sync_batch_norms(module: nn.Module) -> None:
    """Replace every plain batch norm by one over all ranks with the same weights, in place."""
    _replace(module, CpuSyncBatchNorm if talks_over_gloo() else nn.SyncBatchNorm)


def _replace(module: nn.Module, kind: type[_BatchNorm], **options: Any) -> None:
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm) and type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            norm = kind(child.num_features, affine=child.affine, **options)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            _replace(child, kind, **options)


def over_parts(buffers: Iterable[Tensor], parts: Sequence[T]) -> Iterator[T]:
    """Parts of a batch one after the other, with the running statistics of all of them at once.

    Each part starts from the same ones, and after the last the mean of what the parts left stays.
    That is what the whole batch leaves, since running statistics move in proportion to the mean
    over the groups, whatever the number of passes; counts of batches are those of one part.

    Args:
        buffers: of the networks that the parts pass through.
        parts: equal ones; what is done with one, a backward pass included, ends before the next.
    """
    if len(parts) == 1:
        yield parts[0]
        return
    buffers = list(buffers)
    start = [buffer.clone() for buffer in buffers]
    statistics = [buffer for buffer in buffers if buffer.is_floating_point()]
    sums = [torch.zeros_like(buffer) for buffer in statistics]
    for number, part in enumerate(parts):
        if number:
            _copy(start, buffers)
        yield part
        _add(statistics, sums)
    _copy([total / len(parts) for total in sums], statistics)


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


@torch.no_grad()
def _add(tensors: list[Tensor], totals: list[Tensor]) -> None:
    if totals:
        torch._foreach_add_(totals, tensors)
