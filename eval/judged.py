"""What an evaluation judges: the encoder of a run, of one checkpoint, or a timm network.

Letters in names: N images, F features, H W pixels.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from model.checkpoint import FOLDER_PATTERN, Checkpoint, load_checkpoint, newest_checkpoint
from model.encoder import Encoder, EncoderConfig, make_backbone
from pipeline.data_config import DataConfig
from pipeline.eval_loader import EvalView, Interpolation
from pipeline.program import InputError
from pipeline.settings import from_plain


@dataclass(frozen=True)
class Judged:
    """A network ``[N, 3, H, W] -> [N, F]``, the view it expects, and what it is.

    ``about`` goes into every result, so that a score can be traced to its weights.
    """

    network: nn.Module
    view: EvalView
    about: dict[str, Any]


def eval_view_of(data: DataConfig, interpolation: Interpolation) -> EvalView:
    """How pictures are shown to an encoder that was trained with these settings."""
    return EvalView(
        resize_px=data.eval_resize_px,
        crop_px=data.image_px,
        interpolation=interpolation,
        mean=data.mean,
        std=data.std,
    )


def open_checkpoint(path: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint at ``path``: the newest one of a run, or one by its own folder.

    Raises:
        InputError: if there is nothing.
        CheckpointError: if there is no intact one.
    """
    if not path.is_dir():
        raise InputError(f"{path} is not a folder: give a run or one of its checkpoints")
    if FOLDER_PATTERN.fullmatch(path.resolve().name):
        return load_checkpoint(path)
    return newest_checkpoint(path, warn)


def checkpoint_encoder(
    found: Checkpoint,
    interpolation: Interpolation,
    *,
    key_encoder: bool = False,
    untrained: bool = False,
) -> Judged:
    """The encoder of a checkpoint, or the same network with the weights that it started with.

    Args:
        found: an intact checkpoint.
        interpolation: of the evaluation view.
        key_encoder: judge the key encoder instead of the query encoder.
        untrained: fresh weights from the run's own seed.
    """
    config = found.state["config"]
    place = str(found.folder / "state.json")
    encoder_config = from_plain(EncoderConfig, config["encoder"], f"{place}:encoder")
    data = from_plain(DataConfig, config["data"], f"{place}:data")
    torch.manual_seed(config["seed"])
    encoder = Encoder(encoder_config, image_px=data.image_px)
    which = "encoder_k" if key_encoder else "encoder_q"
    if not untrained:
        encoder.load_state_dict(found.tensors[which])
    encoder.eval()
    about = {
        "checkpoint": found.folder.name,
        "recipe": config["recipe"],
        "backbone": encoder_config.backbone,
        "encoder": "untrained" if untrained else which,
        "step": 0 if untrained else found.step,
    }
    return Judged(encoder.backbone, eval_view_of(data, interpolation), about)


def timm_encoder(name: str, weights: Path | None, view: EvalView) -> Judged:
    """A timm network with random weights or with those of a local safetensors file.

    Raises:
        InputError: if the file is not there or does not fit the network.
    """
    torch.manual_seed(0)
    backbone = make_backbone(EncoderConfig(backbone=name), view.crop_px)
    if weights is not None:
        _load_backbone(backbone, name, weights)
    backbone.eval()
    about = {"backbone": name, "encoder": "timm", "weights": str(weights) if weights else "random"}
    return Judged(backbone, view, about)


def _load_backbone(backbone: nn.Module, name: str, weights: Path) -> None:
    if not weights.is_file():
        raise InputError(f"--weights {weights} is not a file: give a local .safetensors file")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise InputError(f"--weights {weights} is not a safetensors file ({error})") from error
    tensors = {key: value for key, value in tensors.items() if not re.match(r"(fc|head)\.", key)}
    try:
        backbone.load_state_dict(tensors)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise InputError(f"--weights {weights} does not fit {name}: {first}") from error


def pixels(view: EvalView) -> Judged:
    """The picture itself as its features: what an encoder must beat."""
    return Judged(nn.Flatten(), view, {"encoder": "raw pixels"})
