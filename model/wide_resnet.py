"""ResNets with every width multiplied: the R50w2x (94 M) and R50w4x (375 M) of the MoCo paper.

Not torchvision's and timm's ``wide_resnet50_2``, where only the 3x3 convolutions are wider.

Source: https://arxiv.org/abs/1911.05722, appendix A.8; https://arxiv.org/abs/1901.09005.
"""

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from torch import nn

STEM_CHANNELS = 64
STAGE_CHANNELS = (64, 128, 256, 512)


def width_options(width: int) -> dict[str, Any]:
    """What timm must be told to build stages that are ``width`` times as wide."""
    return {} if width == 1 else {"channels": tuple(width * c for c in STAGE_CHANNELS)}


def can_widen(resnet: nn.Module) -> bool:
    """Whether the stem is the plain one: a convolution, batch norm and max pooling."""
    return isinstance(resnet.conv1, nn.Conv2d) and isinstance(resnet.maxpool, nn.MaxPool2d)


def widen_stem(resnet: ResNet, width: int) -> None:
    """Make the stem and the inputs of the first block ``width`` times as wide, in place.

    timm takes the channels of the stages as an argument, but a plain stem has 64 always.

    Args:
        resnet: built with ``width_options(width)`` and ``can_widen``.
        width: 1 leaves it as it is.
    """
    if width == 1:
        return
    channels = width * STEM_CHANNELS
    resnet.conv1 = _like(resnet.conv1, resnet.conv1.in_channels, channels)
    resnet.bn1 = type(resnet.bn1)(channels)
    first = resnet.layer1[0]
    first.conv1 = _like(first.conv1, channels, first.conv1.out_channels)
    if isinstance(first, BasicBlock):
        first.downsample = None  # the stem is as wide as the stage again: the input is added as is
        return
    for name, layer in first.downsample.named_children():
        if isinstance(layer, nn.Conv2d):
            setattr(first.downsample, name, _like(layer, channels, layer.out_channels))


def _like(old: nn.Conv2d, inputs: int, outputs: int) -> nn.Conv2d:
    new = nn.Conv2d(inputs, outputs, old.kernel_size, old.stride, old.padding, bias=False)  # type: ignore[arg-type]
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as in timm
    return new
