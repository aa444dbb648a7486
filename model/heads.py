"""What stands between a backbone's features and the loss, as each version of MoCo has it.

The parts are numbered as in the official checkpoints, where the same sequence is called ``fc``
(ResNets), ``head`` (ViTs) or ``predictor``.

Letters in names: F features of the backbone, D embedding size.
"""

from itertools import pairwise
from typing import Literal

from torch import nn

Head = Literal["linear", "mlp", "v3"]


def make_head(kind: Head, features: int, dim: int, *, hidden: int, is_vit: bool) -> nn.Module:
    """The head of both encoders, ``[N, F] -> [N, D]``, not normalised.

    Args:
        kind: linear: MoCo v1. mlp: MoCo v2, hidden layer of F. v3: the projector of MoCo v3.
        features: F.
        dim: D.
        hidden: width of the v3 projector's hidden layers.
        is_vit: the v3 projector has three layers on a ViT, two on a ResNet.

    Source: https://arxiv.org/abs/1911.05722 section 3.3, https://arxiv.org/abs/2003.04297,
    https://arxiv.org/abs/2104.02057 section 3.
    """
    if kind == "linear":
        return nn.Linear(features, dim)
    if kind == "mlp":
        # No batch norm between the layers, as in the official code.
        return nn.Sequential(
            nn.Linear(features, features), nn.ReLU(inplace=True), nn.Linear(features, dim)
        )
    widths = [features, *[hidden] * (2 if is_vit else 1), dim]
    return batch_norm_mlp(widths, norm_last=True)


def make_predictor(dim: int, *, hidden: int, is_vit: bool) -> nn.Sequential:
    """The predictor of MoCo v3, ``[N, D] -> [N, D]``, on the query side only.

    It ends with batch norm on a ViT; on a ResNet it does not, as in the official code's last
    version, while the projector does on both.
    """
    return batch_norm_mlp([dim, hidden, dim], norm_last=is_vit)


def batch_norm_mlp(widths: list[int], *, norm_last: bool) -> nn.Sequential:
    """Linear layers without bias, batch norm and ReLU after each but the last.

    Args:
        widths: of the input and of each layer's output.
        norm_last: batch norm without scale and shift after the last layer too.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [
            nn.Linear(inputs, outputs, bias=False),
            nn.BatchNorm1d(outputs),
            nn.ReLU(inplace=True),
        ]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=False))
    if norm_last:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)
