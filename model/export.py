"""A backbone as other software wants it: timm, torchvision, detectron2.

Each function refuses a network that the other side cannot build, instead of writing a file that
cannot be loaded.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from model.encoder import MORE_RESNETS, EncoderConfig
from model.network_shape import WeightsError
from model.weights import Weights

AUTHOR = "MOCO"  # as in the official converter
# Names of ResNets in detectron2, in the order of the official converter.
DETECTRON2 = (
    (r"^(?!layer)", "stem."),
    (r"layer([1-4])", lambda match: f"res{int(match[1]) + 1}"),
    (r"bn([1-3])", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


def is_vit(weights: Weights) -> bool:
    """Whether the backbone is a ViT."""
    return "cls_token" in weights.tensors


def timm_arguments(weights: Weights) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which ``timm.create_model`` builds this backbone.

    Raises:
        WeightsError: if timm has no such network.
    """
    config = weights.network
    _require_plain(config, "timm")
    if config.width > 1:
        raise WeightsError(
            f"timm has no ResNet whose stem is {config.width} times as wide: convert to detectron2,"
            " or use the checkpoint as it is"
        )
    name, arguments = MORE_RESNETS.get(config.backbone, (config.backbone, {}))
    arguments = {**arguments, "num_classes": 0}
    if config.layers:
        arguments["layers"] = list(config.layers)
    if config.heads:
        arguments["num_heads"] = config.heads
    if is_vit(weights):
        arguments["img_size"] = weights.image_px
    return name, arguments


def torchvision_state(weights: Weights) -> dict[str, Tensor]:
    """Tensors that torchvision's ResNet of the same name loads strictly but for ``fc``.

    Raises:
        WeightsError: if it is no ResNet, or one that torchvision cannot build.
    """
    if is_vit(weights) or weights.network.width > 1:
        raise WeightsError(
            f"torchvision builds no {weights.network.backbone} of width {weights.network.width} "
            "with these names: convert to timm or detectron2"
        )
    _require_plain(weights.network, "torchvision")
    return dict(weights.tensors)


def detectron2_content(weights: Weights) -> dict[str, Any]:
    """What detectron2 reads from a ``.pkl`` of a backbone, as the official converter writes it.

    A ResNet-50 has 318 arrays: 53 convolutions and 53 batch norms of five.

    Raises:
        WeightsError: if it is no ResNet, or one with a stem that detectron2 does not build.
    """
    if is_vit(weights):
        raise WeightsError(
            f"detectron2 has no backbone like {weights.network.backbone}: convert a ResNet"
        )
    _require_plain(weights.network, "detectron2")
    return {
        "model": {detectron2_name(n): _array(t) for n, t in weights.tensors.items()},
        "__author__": AUTHOR,
        "matching_heuristics": True,
    }


def detectron2_name(name: str) -> str:
    """A tensor's name in detectron2: ``layer1.0.bn2.bias`` is ``res2.0.conv2.norm.bias``."""
    for pattern, new in DETECTRON2:
        name = re.sub(pattern, new, name, count=1)
    return name


def _array(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.contiguous().numpy()
    return array


def _require_plain(config: EncoderConfig, target: str) -> None:
    if config.stem != "imagenet":
        raise WeightsError(
            f"{target} builds no ResNet with the 3x3 stem {config.stem!r}: judge or train it here "
            "from its own checkpoint"
        )


def hub_config(weights: Weights, mean: tuple[float, ...], std: tuple[float, ...]) -> dict[str, Any]:
    """``config.json`` of a folder that ``timm.create_model("local-dir:...")`` or the hub loads.

    Args:
        weights: the backbone.
        mean: of the pictures it was trained on, per channel in [0, 1].
        std: likewise.
    """
    name, arguments = timm_arguments(weights)
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": _features(weights.tensors),
        "global_pool": "token" if is_vit(weights) else "avg",
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, weights.image_px, weights.image_px],
            "fixed_input_size": is_vit(weights),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "mean": list(mean),
            "std": list(std),
            "first_conv": "patch_embed.proj" if is_vit(weights) else "conv1",
            "classifier": "head" if is_vit(weights) else "fc",
        },
    }


def _features(tensors: Mapping[str, Tensor]) -> int:
    if "norm.weight" in tensors:
        return len(tensors["norm.weight"])
    norms = [n for n in tensors if re.match(r"layer4\.\d+\.bn\d\.weight", n)]
    return len(tensors[max(norms)])
