"""A timm ResNet or ViT with the head of MoCo: pictures in, unit vectors out.

Backbone parameters keep timm's names, which for ResNets are torchvision's and the official
checkpoints'.

Letters in names: N images, H W pixels, F features of the backbone, D embedding size.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from model.batch_norm import split_batch_norms
from model.heads import Head, make_head
from model.vit_v3 import has_plain_tokens, prepare_vit
from model.wide_resnet import can_widen, widen_stem, width_options

STAGES = 4
# ResNeXts of the paper that timm has no name for: the nearest name and what differs.
MORE_RESNETS: dict[str, tuple[str, dict[str, Any]]] = {
    "resnext50_32x8d": ("resnext50_32x4d", {"base_width": 8}),
}


class EncoderError(ValueError):
    """An encoder that cannot be built as asked: the message names the setting and the way out."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The network of both encoders."""

    backbone: str = "resnet50"
    """Name in timm, of a ResNet, ResNeXt or ViT; also resnext50_32x8d."""
    width: int = 1
    """Multiplies all widths of a ResNet; 2 and 4: R50w2x and R50w4x of the paper."""
    layers: tuple[int, ...] | None = None
    """Blocks in each of the four stages of a ResNet, instead of the backbone's own."""
    stem: Literal["imagenet", "cifar", "small"] = "imagenet"
    """imagenet: as in timm. cifar: 3x3 without pooling. small: 3x3 of stride 2 without pooling."""
    zero_init_residual: bool = False
    """Each block of a ResNet starts as the identity; MoCo v3."""
    heads: int | None = None
    """Attention heads of a ViT, instead of its own; the ViT-S of MoCo v3 has 12, timm's has 6."""
    frozen_patches: bool = True
    """The patch projection of a ViT stays as it starts; MoCo v3."""
    head: Head = "mlp"
    """linear: MoCo v1. mlp: MoCo v2, one hidden layer as wide as the features. v3: projector."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor; v3 only."""
    dim: int = 128
    """Size of queries and keys."""
    weights: Path | None = None
    """Start from this backbone instead of a random one: a checkpoint of any project, or a run."""

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "width"):
            if getattr(self, name) < 1:
                value = getattr(self, name)
                raise EncoderError(f"--encoder.{name} {value}: give a number of at least 1")


class Encoder(nn.Module):
    """Backbone, head and L2 normalisation.

    Args:
        config: what to build; weights are random, from torch's global generator.
        batch_norm_groups: parts of a batch with statistics of their own.
        image_px: side of the views, which a ViT must know.

    Raises:
        EncoderError: if timm does not know the backbone or it cannot be built as asked.
    """

    def __init__(
        self, config: EncoderConfig, batch_norm_groups: int = 1, image_px: int = 224
    ) -> None:
        super().__init__()
        self.backbone = make_backbone(config, image_px)
        self.head = make_head(
            config.head,
            int(self.backbone.num_features),  # type: ignore[arg-type]
            config.dim,
            hidden=config.hidden,
            is_vit=is_vit(self.backbone),
        )
        if batch_norm_groups > 1:
            split_batch_norms(self, batch_norm_groups)

    def features(self, view_N3HW: Tensor) -> Tensor:
        """What other tasks use: the backbone's pooled output, ``[N, F]``, not normalised."""
        pooled: Tensor = self.backbone(view_N3HW)
        return pooled

    def projection(self, view_N3HW: Tensor) -> Tensor:
        """The head's output before normalisation, ``[N, D]``: what the predictor of v3 reads."""
        projected: Tensor = self.head(self.features(view_N3HW))
        return projected

    def forward(self, view_N3HW: Tensor) -> Tensor:
        """Unit-length embeddings, ``[N, D]`` float32 (float64 from a float64 encoder)."""
        return unit_length(self.projection(view_N3HW))


def unit_length(rows_ND: Tensor) -> Tensor:
    """Rows over their lengths, in float32, or in float64 where they are that."""
    at_least_float32 = torch.promote_types(rows_ND.dtype, torch.float32)
    return F.normalize(rows_ND.to(at_least_float32), dim=1)


def is_vit(backbone: nn.Module) -> bool:
    """Whether a backbone is a ViT, which has other heads in MoCo v3."""
    return isinstance(backbone, VisionTransformer)


def make_backbone(config: EncoderConfig, image_px: int = 224) -> nn.Module:
    """The timm network without classifier and with random weights.

    Args:
        config: which one.
        image_px: side of the views; a ResNet takes any.

    Raises:
        EncoderError: naming what cannot be built, and the way out.
    """
    name, options = MORE_RESNETS.get(config.backbone, (config.backbone, {}))
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*timm.list_models(), *MORE_RESNETS], 3)
        hint = f"; near names: {', '.join(near)}" if near else ""
        raise EncoderError(f"timm has no backbone {name!r}: choose one of timm.list_models(){hint}")
    if name in timm.list_models(module="vision_transformer"):
        return _make_vit(config, image_px)
    # timm's other families of such names fuse batch norm with its activation, so that it could not
    # be split, or have other stems.
    if name not in timm.list_models(module="resnet"):
        raise EncoderError(
            f"{name!r} is neither a ResNet nor a plain ViT: only ResNets, ResNeXts and ViTs can be "
            "trained so far"
        )
    return _make_resnet(config, name, options)


def _make_resnet(config: EncoderConfig, name: str, options: dict[str, Any]) -> nn.Module:
    if config.heads is not None:
        raise EncoderError(
            f"--encoder.heads is for ViTs, {config.backbone!r} is a ResNet: leave it"
        )
    if config.layers and (len(config.layers) != STAGES or min(config.layers) < 1):
        raise EncoderError(
            f"--encoder.layers {' '.join(map(str, config.layers))}: give {STAGES} numbers of at "
            "least 1, the blocks of each stage"
        )
    options = options | width_options(config.width)
    if config.layers:
        options["layers"] = config.layers
    # zero_init_last: timm zeroes the last scale of each block, the official v1 and v2 do not.
    backbone: nn.Module = timm.create_model(
        name,
        pretrained=False,
        num_classes=0,
        zero_init_last=config.zero_init_residual,
        **options,
    )
    if config.width > 1:
        if not can_widen(backbone):
            raise EncoderError(
                f"{config.backbone!r} has a stem of several layers, which --encoder.width "
                f"{config.width} cannot widen: use a plain one, for example resnet50"
            )
        widen_stem(backbone, config.width)
    if config.stem != "imagenet":
        _replace_stem(backbone, config)
    return backbone


def _replace_stem(backbone: nn.Module, config: EncoderConfig) -> None:
    if not isinstance(backbone.conv1, nn.Conv2d):
        raise EncoderError(
            f"{config.backbone!r} has a stem of several layers, which cannot become a "
            f"{config.stem!r} stem: use a plain one, for example resnet18"
        )
    stride = 1 if config.stem == "cifar" else 2
    backbone.conv1 = nn.Conv2d(3, backbone.conv1.out_channels, 3, stride, 1, bias=False)
    nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")
    backbone.maxpool = nn.Identity()


def _make_vit(config: EncoderConfig, image_px: int) -> nn.Module:
    plain = EncoderConfig(backbone=config.backbone)
    for field in ("width", "layers", "stem", "zero_init_residual"):
        if getattr(config, field) != getattr(plain, field):
            flag = "--encoder." + field.replace("_", "-")
            raise EncoderError(f"{flag} is for ResNets, {config.backbone!r} is a ViT: leave it")
    options = {} if config.heads is None else {"num_heads": config.heads}
    try:
        backbone: nn.Module = timm.create_model(
            config.backbone,
            pretrained=False,
            num_classes=0,
            img_size=image_px,
            weight_init="moco",
            **options,
        )
    except (AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it does not fit"
        raise EncoderError(
            f"{config.backbone!r} cannot be built for views of {image_px} px with "
            f"--encoder.heads {config.heads} ({reason}): change one of them"
        ) from error
    if not has_plain_tokens(backbone):
        raise EncoderError(
            f"{config.backbone!r} has other tokens than a class token and patches, each with a "
            "position: use a plain ViT, for example vit_small_patch16_224"
        )
    side_px = backbone.patch_embed.patch_size[0]  # type: ignore[union-attr,index]
    if image_px % side_px:
        raise EncoderError(
            f"views of {image_px} px do not divide into the {side_px} px patches of "
            f"{config.backbone!r}: give a multiple of {side_px} for --data.image-px"
        )
    prepare_vit(backbone, frozen_patches=config.frozen_patches)
    return backbone
