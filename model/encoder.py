"""A timm ResNet with the head of MoCo: pictures in, unit vectors out.

Backbone parameters keep timm's names, which for ResNets are torchvision's and the official
checkpoints'.

Letters in names: N images, H W pixels, F features of the backbone, D embedding size.
"""

import difflib
from dataclasses import dataclass
from typing import Literal

import timm
import torch.nn.functional as F
from torch import Tensor, nn

from model.batch_norm import split_batch_norms

STAGES = 4


class EncoderError(ValueError):
    """An encoder that cannot be built as asked: the message names the setting and the way out."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network of both encoders."""

    backbone: str = "resnet50"
    """Name in timm."""
    layers: tuple[int, ...] | None = None
    """Blocks in each of the four stages, instead of the backbone's own."""
    stem: Literal["imagenet", "cifar", "small"] = "imagenet"
    """imagenet: as in timm. cifar: 3x3 without pooling. small: 3x3 of stride 2 without pooling."""
    head: Literal["linear", "mlp"] = "mlp"
    """linear: MoCo v1. mlp: MoCo v2, one hidden layer as wide as the features."""
    dim: int = 128
    """Size of queries and keys."""

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise EncoderError(f"--encoder.dim {self.dim}: give a number of at least 1")


class Encoder(nn.Module):
    """Backbone, head and L2 normalisation.

    Args:
        config: what to build; weights are random, from torch's global generator.
        batch_norm_groups: parts of a batch with statistics of their own.

    Raises:
        EncoderError: if timm does not know the backbone or it cannot be built as asked.
    """

    def __init__(self, config: EncoderConfig, batch_norm_groups: int = 1) -> None:
        super().__init__()
        self.backbone = make_backbone(config)
        features = int(self.backbone.num_features)  # type: ignore[arg-type]
        if config.head == "linear":
            self.head: nn.Module = nn.Linear(features, config.dim)
        else:
            # No batch norm between the layers, as in the official code.
            self.head = nn.Sequential(
                nn.Linear(features, features),
                nn.ReLU(inplace=True),
                nn.Linear(features, config.dim),
            )
        if batch_norm_groups > 1:
            split_batch_norms(self, batch_norm_groups)

    def features(self, view_N3HW: Tensor) -> Tensor:
        """What other tasks use: the backbone's pooled output, ``[N, F]``, not normalised."""
        pooled: Tensor = self.backbone(view_N3HW)
        return pooled

    def forward(self, view_N3HW: Tensor) -> Tensor:
        """Unit-length embeddings, ``[N, D]`` float32."""
        return F.normalize(self.head(self.features(view_N3HW)).float(), dim=1)


def make_backbone(config: EncoderConfig) -> nn.Module:
    """The timm network without classifier and with random weights."""
    if config.layers and (len(config.layers) != STAGES or min(config.layers) < 1):
        raise EncoderError(
            f"--encoder.layers {' '.join(map(str, config.layers))}: give {STAGES} numbers of at "
            "least 1, the blocks of each stage"
        )
    options = {"layers": config.layers} if config.layers else {}
    if not timm.is_model(config.backbone):
        near = difflib.get_close_matches(config.backbone, timm.list_models(), 3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise EncoderError(
            f"timm has no backbone {config.backbone!r}: choose one of timm.list_models(){hint}"
        )
    # timm's other families of such names fuse batch norm with its activation, so that it could not
    # be split, or have other stems.
    if config.backbone not in timm.list_models(module="resnet"):
        raise EncoderError(
            f"{config.backbone!r} is not a ResNet: only ResNets and ResNeXts can be trained so far"
        )
    # zero_init_last: timm zeroes the last scale of each block, the official code does not.
    backbone: nn.Module = timm.create_model(
        config.backbone, pretrained=False, num_classes=0, zero_init_last=False, **options
    )
    if config.stem != "imagenet":
        if not isinstance(backbone.conv1, nn.Conv2d):
            raise EncoderError(
                f"{config.backbone!r} has a stem of several layers, which cannot become a "
                f"{config.stem!r} stem: use a plain one, for example resnet18"
            )
        stride = 1 if config.stem == "cifar" else 2
        backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, stride, 1, bias=False)
        nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
        backbone.maxpool = nn.Identity()
    return backbone
