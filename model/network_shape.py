"""Which network a backbone's tensors are, from their names and shapes alone.

Letters in names: L patches of a picture, E width of a ViT.
"""

import math
import re
from collections.abc import Mapping

from torch import Tensor

from model.encoder import STAGES, EncoderConfig
from model.wide_resnet import STEM_CHANNELS

# (has bottlenecks, groups of the 3x3 convolutions, their channels in the first stage): names by
# blocks per stage; the first one also stands for other numbers of blocks.
RESNETS: dict[tuple[bool, int, int], dict[tuple[int, ...], str]] = {
    (False, 1, 64): {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"},
    (True, 1, 64): {
        (3, 4, 6, 3): "resnet50",
        (3, 4, 23, 3): "resnet101",
        (3, 8, 36, 3): "resnet152",
    },
    (True, 32, 128): {(3, 4, 6, 3): "resnext50_32x4d", (3, 4, 23, 3): "resnext101_32x4d"},
    (True, 32, 256): {(3, 4, 6, 3): "resnext50_32x8d", (3, 4, 23, 3): "resnext101_32x8d"},
    (True, 64, 256): {(3, 4, 23, 3): "resnext101_64x4d"},
    (True, 1, 128): {(3, 4, 6, 3): "wide_resnet50_2", (3, 4, 23, 3): "wide_resnet101_2"},
}
VIT_NAMES = {
    (192, 12): "vit_tiny_patch{}_224",
    (384, 12): "vit_small_patch{}_224",
    (768, 12): "vit_base_patch{}_224",
    (1024, 24): "vit_large_patch{}_224",
}
RESNET_VIEW_PX = 224
BLOCK = re.compile(r"layer(\d)\.(\d+)\.")


class WeightsError(ValueError):
    """Weights that cannot be used: the message names the file, what is wrong, and the way out."""


def network_of(tensors: Mapping[str, Tensor], what: str) -> EncoderConfig:
    """The settings of the backbone that these tensors fill.

    A 3x3 stem is taken for one of stride 1 without pooling; a ViT's heads are left to its name.

    Args:
        tensors: by timm's names.
        what: whose tensors they are, for messages.

    Raises:
        WeightsError: if they are of no network that is known here.
    """
    if "cls_token" in tensors and "patch_embed.proj.weight" in tensors:
        return _vit(tensors, what)
    if "conv1.weight" in tensors and "layer1.0.conv2.weight" in tensors:
        return _resnet(tensors, what)
    raise _unknown(tensors, what)


def image_px_of(tensors: Mapping[str, Tensor]) -> int:
    """Side of the views that a ViT has positions for; 224 for a ResNet, which takes any."""
    if "pos_embed" not in tensors or "patch_embed.proj.weight" not in tensors:
        return RESNET_VIEW_PX
    patches = tensors["pos_embed"].shape[1] - 1
    return math.isqrt(patches) * tensors["patch_embed.proj.weight"].shape[-1]


def _unknown(tensors: Mapping[str, Tensor], what: str) -> WeightsError:
    shown = ", ".join(f"{n} {tuple(t.shape)}" for n, t in list(tensors.items())[:3]) or "none"
    return WeightsError(
        f"{what}: no ResNet or ViT known here has such tensors ({shown}): name the network with "
        "--network"
    )


def _resnet(tensors: Mapping[str, Tensor], what: str) -> EncoderConfig:
    blocks = {match[1] + "." + match[2] for name in tensors if (match := BLOCK.match(name))}
    layers = tuple(sum(b.startswith(f"{s}.") for b in blocks) for s in range(1, STAGES + 1))
    stem, inner = tensors["conv1.weight"], tensors["layer1.0.conv2.weight"]
    has_bottlenecks = "layer1.0.conv3.weight" in tensors
    width, rest = divmod(stem.shape[0], STEM_CHANNELS)
    if rest or not width or stem.shape[-1] not in (3, 7):
        raise _unknown(tensors, what)
    groups = inner.shape[0] // inner.shape[1] if has_bottlenecks else 1
    names = RESNETS.get((has_bottlenecks, groups, inner.shape[0] // width))
    if names is None or min(layers) < 1:
        raise _unknown(tensors, what)
    return EncoderConfig(
        backbone=names.get(layers, next(iter(names.values()))),
        layers=None if layers in names else layers,
        width=width,
        stem="imagenet" if stem.shape[-1] == 7 else "cifar",
    )


def _vit(tensors: Mapping[str, Tensor], what: str) -> EncoderConfig:
    depth = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    name = VIT_NAMES.get((tensors["cls_token"].shape[-1], depth))
    if name is None:
        raise _unknown(tensors, what)
    return EncoderConfig(backbone=name.format(tensors["patch_embed.proj.weight"].shape[-1]))
