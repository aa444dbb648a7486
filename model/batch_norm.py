"""Batch norm in groups smaller than the batch of one device, as if each group had a GPU of its own.

With plain batch norm over the whole batch a query and its key share statistics, and the network
learns to read them ("cheating", MoCo section 3.3). The paper used groups of 32 on 8 GPUs and
shuffled the keys among them; here the groups are the same whatever the number of devices.

Letters in names: N images, C channels, H W pixels, G groups.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over each of G equal parts of the batch; one set of running statistics.

    The running statistics move towards the mean of the groups' statistics. A group count of 1 and
    evaluation mode are plain batch norm. State-dict names are those of ``nn.BatchNorm2d``.

    Args:
        channels: C.
        groups: G; must divide the batch in training mode.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels)
        self.groups = groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Normalised activations, ``[N, C, H, W]``."""
        if not self.training or self.groups == 1:
            return super().forward(x_NCHW)
        n, c, h, w = x_NCHW.shape
        if n % self.groups:
            raise ValueError(f"a batch of {n} cannot be split into {self.groups} equal groups")
        assert self.running_mean is not None and self.running_var is not None
        mean_GC = self.running_mean.repeat(self.groups)
        var_GC = self.running_var.repeat(self.groups)
        # Group g of channel c becomes channel g * C + c, so that one call does all groups.
        grouped = x_NCHW.reshape(self.groups, n // self.groups, c, h, w).transpose(0, 1)
        out = F.batch_norm(
            grouped.reshape(n // self.groups, self.groups * c, h, w),
            mean_GC,
            var_GC,
            self.weight.repeat(self.groups),
            self.bias.repeat(self.groups),
            training=True,
            momentum=self.momentum or 0.0,
            eps=self.eps,
        )
        with torch.no_grad():
            self.running_mean.copy_(mean_GC.view(self.groups, c).mean(dim=0))
            self.running_var.copy_(var_GC.view(self.groups, c).mean(dim=0))
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
        out = out.reshape(n // self.groups, self.groups, c, h, w).transpose(0, 1)
        return out.reshape(n, c, h, w)


def split_batch_norms(module: nn.Module, groups: int) -> None:
    """Replace every ``BatchNorm2d`` by a split one with the same weights, in place."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            split = SplitBatchNorm2d(child.num_features, groups)
            split.load_state_dict(child.state_dict())
            setattr(module, name, split)
        else:
            split_batch_norms(child, groups)
