"""Backbones from other projects' checkpoints, under timm's names.

A format is known by the names of its tensors, never by the name of its file. A backbone is taken
whole or not at all: what is missing, too much or of another shape is named.

Names of each project's checkpoints: https://github.com/facebookresearch/moco and moco-v3,
open-mmlab/mmselfsup, vturrisi/solo-learn, facebookresearch/vissl, lightly-ai/lightly.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.checkpoint_file import model_tensors, read_file
from model.encoder import EncoderConfig, make_backbone
from model.network_shape import WeightsError, image_px_of, network_of

Which = Literal["query", "key"]
Origin = Literal["moco", "moco-v3", "mmselfsup", "solo-learn", "vissl", "lightly", "ours", "plain"]
SHOWN = 4  # names in a message
CLASSIFIERS = ("fc.", "head.", "classifier.")
# Heads of MoCo v3's ViT-S, which all of these projects took over; timm's has 6.
V3_HEADS = {384: 12}
V3_ORIGINS = ("moco-v3", "mmselfsup", "solo-learn")


@dataclass(frozen=True)
class Format:
    """How a project names the tensors of its encoders.

    Attributes:
        title: the project, for people.
        query: what stands before the backbone's names in the query encoder; the first that occurs.
        key: the same of the key encoder.
        marks: beginnings of names of which this format has one; any name will do without marks.
    """

    title: str
    query: tuple[str, ...]
    key: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()


# In the order of detection: the particular before the general.
FORMATS: dict[Origin, Format] = {
    "vissl": Format(
        "VISSL",
        ("base_model.model.trunk._feature_blocks.", "trunk._feature_blocks.", "_feature_blocks."),
        (
            "loss.moco_encoder.trunk._feature_blocks.",
            "moco_encoder.trunk._feature_blocks.",
        ),
    ),
    "mmselfsup": Format(
        "mmselfsup",
        ("encoder_q.0.", "base_encoder.0.", "backbone."),
        (
            *("encoder_k.module.0.", "momentum_encoder.module.0."),  # from version 1.0
            *("encoder_k.0.", "momentum_encoder.0."),
        ),
        ("neck.", "encoder_q.0.", "base_encoder.0."),
    ),
    "solo-learn": Format(
        "solo-learn",
        ("backbone.", "encoder."),
        ("momentum_backbone.", "momentum_encoder."),
        ("projector.", "momentum_projector.", "momentum_backbone."),
    ),
    "lightly": Format(
        "lightly",
        ("backbone.",),
        ("key_backbone.", "backbone_momentum."),
        ("projection_head.", "key_backbone.", "backbone_momentum."),
    ),
    "moco": Format("official MoCo v1 or v2", ("encoder_q.",), ("encoder_k.",)),
    "moco-v3": Format("official MoCo v3", ("base_encoder.",), ("momentum_encoder.",)),
    "ours": Format("mocostream or a backbone alone", ("backbone.",)),
    "plain": Format(
        "torchvision or timm",
        ("",),
        marks=("conv1.", "layer1.", "patch_embed.", "cls_token", "pos_embed"),
    ),
}


@dataclass(frozen=True)
class Weights:
    """A whole backbone.

    Attributes:
        tensors: by timm's names, float32 but for counters; nothing of a head.
        network: what they fit; its head is the default, whatever the checkpoint had.
        image_px: side of its views, 224 for a ResNet whose file does not say it.
        about: one line: whose it is and which encoder.
        facts: what else the checkpoint says of itself, as plain values.
        notes: lines that a person should read.
    """

    tensors: dict[str, Tensor]
    network: EncoderConfig
    image_px: int
    about: str
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()


def read_weights(
    path: Path,
    *,
    encoder: Which = "query",
    origin: Origin | None = None,
    network: EncoderConfig | None = None,
    heads: int | None = None,
) -> Weights:
    """The backbone in a checkpoint file of any known project.

    Args:
        path: of torch.save or safetensors.
        encoder: which of the two.
        origin: whose checkpoint it is; found out from its names if not given.
        network: what it must fit; found out from the shapes if not given.
        heads: attention heads of a ViT, which no shape tells; those of ``network`` if not given.

    Raises:
        WeightsError: if it cannot be read, is of no known project, or is not a whole backbone.
        EncoderError: if ``network`` is none that can be built.
    """
    content = read_file(path)
    tensors = model_tensors(content)
    origin = origin or detect(tensors, path)
    found = FORMATS[origin]
    prefix = _prefix(tensors, found, encoder, path)
    backbone = timm_names(
        {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    )
    config = network or network_of(backbone, str(path))
    heads = heads or config.heads
    notes = []
    width = backbone["cls_token"].shape[-1] if "cls_token" in backbone else 0
    if heads is None and network is None and origin in V3_ORIGINS and width in V3_HEADS:
        heads = V3_HEADS[width]
        notes.append(f"note: {heads} attention heads, as MoCo v3 has at this width; else --heads")
    if origin == "solo-learn" and config.stem == "cifar":
        notes.append(
            "note: solo-learn pads its 3x3 stem by 2 pixels and this network by 1, so that "
            "features differ a little from solo-learn's"
        )
    config = replace(config, heads=heads)
    image_px = image_px_of(backbone)
    label = f"{found.title}, {encoder if found.key else 'only'} encoder, {named(config)}"
    return Weights(
        fit(backbone, config, image_px, f"{path} ({label})"),
        config,
        image_px,
        label,
        {k: content[k] for k in ("epoch", "arch") if isinstance(content.get(k), int | str)},
        tuple(notes),
    )


def detect(tensors: Mapping[str, Tensor], path: Path) -> Origin:
    """Whose checkpoint it is.

    Raises:
        WeightsError: if nobody's; some of its names are shown.
    """
    for origin, known in FORMATS.items():
        if known.marks and not _begins(tensors, known.marks):
            continue
        if _begins(tensors, (*known.query, *known.key)):
            return origin
    raise WeightsError(
        f"{path} is of no known project, its {len(tensors)} tensors are named "
        f"{_some(tensors)}: known are {', '.join(FORMATS)}"
    )


def _begins(names: Mapping[str, Tensor], beginnings: tuple[str, ...]) -> bool:
    return any(name.startswith(beginnings) for name in names)


def _prefix(tensors: Mapping[str, Tensor], known: Format, encoder: Which, path: Path) -> str:
    prefixes = known.query if encoder == "query" else known.key
    for prefix in prefixes:
        if _begins(tensors, (prefix,)):
            return prefix
    wanted = " or ".join(prefixes) or "of its own"
    raise WeightsError(
        f"{path} has no {encoder} encoder as {known.title} names it ({wanted}), its tensors are "
        f"named {_some(tensors)}: choose the other --encoder, or another --from"
    )


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "") or "not at all"


def timm_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A backbone's tensors by timm's names, as float32 and without classifier or head."""
    stages = _numbered_stages(tensors)
    result = {}
    for name, tensor in tensors.items():
        new = name
        if stages:
            number, _, rest = name.partition(".")
            new = f"{stages.get(number, number)}.{rest}".replace(".shortcut.", ".downsample.")
        elif "patch_embed.projection.weight" in tensors:
            new = _from_mm_vit(name)
        if not new.startswith(CLASSIFIERS):
            result[new] = tensor.float() if tensor.is_floating_point() else tensor
    return result


def _numbered_stages(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the numbers stand for in a ResNet that was made into an ``nn.Sequential``."""
    if "0.weight" not in tensors:
        return {}
    # torchvision's has ReLU and pooling at 2 and 3, lightly's own ResNet has not.
    first = 2 if any(name.startswith("2.") for name in tensors) else 4
    return {"0": "conv1", "1": "bn1", **{str(first + n): f"layer{n + 1}" for n in range(4)}}


MM_VIT = (
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^layers\.", "blocks."),
    (r"\.ln([12])\.", r".norm\1."),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
)


def _from_mm_vit(name: str) -> str:
    for pattern, new in MM_VIT:
        name = re.sub(pattern, new, name)
    return name


def fit(
    tensors: Mapping[str, Tensor], config: EncoderConfig, image_px: int, what: str
) -> dict[str, Tensor]:
    """The tensors, once it is clear that they are the whole backbone of ``config``.

    Counters of batches, which old checkpoints lack and nothing reads, are set to 0.

    Args:
        tensors: by timm's names.
        config: the network.
        image_px: side of its views.
        what: for the message.

    Raises:
        WeightsError: with some names and the number of what is missing, too much or misshapen.
        EncoderError: if the network cannot be built.
    """
    with torch.device("meta"):
        wanted = make_backbone(config, image_px).state_dict()
    tensors = dict(tensors)
    for name in wanted.keys() - tensors.keys():
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.zeros((), dtype=torch.long)
    missing = [name for name in wanted if name not in tensors]
    surplus = [name for name in tensors if name not in wanted]
    misshapen = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in tensors and tensors[name].shape != tensor.shape
    ]
    wrong = ((missing, "are missing"), (misshapen, "have another shape"), (surplus, "are unknown"))
    if any(names for names, _ in wrong):
        found = "; ".join(f"{len(names)} {kind}: {_some(names)}" for names, kind in wrong if names)
        raise WeightsError(
            f"{what} is not a whole {config.backbone} of {len(wanted)} tensors; {found}"
        )
    return {name: tensors[name] for name in wanted}


def named(config: EncoderConfig) -> str:
    """A network in words, with what differs from the one of its name."""
    parts = [config.backbone]
    parts += [f"{config.width} times as wide"] * (config.width > 1)
    parts += [f"of {'-'.join(map(str, config.layers))} blocks"] if config.layers else []
    parts += [f"with a {config.stem} stem"] * (config.stem != "imagenet")
    return " ".join(parts)


def put_into(backbone: nn.Module, weights: Weights) -> None:
    """Give a network of ours these weights, in place.

    Raises:
        WeightsError: if it is another network.
    """
    own = backbone.state_dict()
    differ = [
        n for n, t in own.items() if getattr(weights.tensors.get(n), "shape", None) != t.shape
    ]
    if differ or len(own) != len(weights.tensors):
        raise WeightsError(
            f"the weights ({weights.about}) do not fit the network of this run: {len(differ)} of "
            f"its {len(own)} tensors differ, {_some(differ)}; choose the same --encoder settings"
        )
    backbone.load_state_dict(weights.tensors)
