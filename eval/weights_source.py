"""Weights to judge, convert or start from: any project's checkpoint file, or a run of ours.

Letters in names: N images, H W pixels.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from model.checkpoint import FOLDER_PATTERN, Checkpoint, load_checkpoint, newest_checkpoint
from model.encoder import Encoder, EncoderConfig
from model.moco import QueryEncoder
from model.weights import Origin, Weights, Which, fit, named, put_into, read_weights
from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD, DataConfig
from pipeline.eval_loader import EvalView, Interpolation
from pipeline.program import InputError
from pipeline.settings import from_plain

BACKBONE = "backbone."
CHANNELS = 3
HUB_CONFIG = "config.json"
HUB_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which of the weights in a checkpoint, and what its tensors do not tell."""

    encoder: Which = "query"
    origin: Origin | None = None
    network: EncoderConfig | None = None
    heads: int | None = None
    interpolation: Interpolation = "bicubic"


@dataclass(frozen=True)
class Source:
    """A backbone, the view that it expects, and the settings of the run that made it.

    ``run`` is empty for a checkpoint of another project.
    """

    weights: Weights
    view: EvalView
    run: dict[str, Any]


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


def open_weights(path: Path, choice: Choice, warn: Callable[[str], None]) -> Source:
    """The backbone in a checkpoint file, a run of ours, one of its checkpoints, or a hub folder.

    Args:
        path: a file, or the folder of a run, of a checkpoint or as from the hub.
        choice: which encoder, and what the file does not tell.
        warn: told of checkpoints that had to be passed over.

    Raises:
        InputError, WeightsError, CheckpointError, EncoderError: if there is no whole backbone.
    """
    if path.is_dir() and (path / HUB_WEIGHTS).is_file():
        return _of_hub(path, choice)
    if path.is_dir():
        return _of_run(open_checkpoint(path, warn), choice)
    weights = read_weights(
        path,
        encoder=choice.encoder,
        origin=choice.origin,
        network=choice.network,
        heads=choice.heads,
    )
    return Source(weights, _view_for(weights, choice), {})


def _view_for(weights: Weights, choice: Choice) -> EvalView:
    return EvalView(
        resize_px=weights.image_px * 8 // 7,  # 256 for 224
        crop_px=weights.image_px,
        interpolation=choice.interpolation,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _of_run(found: Checkpoint, choice: Choice) -> Source:
    config = found.state["config"]
    place = str(found.folder / "state.json")
    network = from_plain(EncoderConfig, config["encoder"], f"{place}:encoder")
    data = from_plain(DataConfig, config["data"], f"{place}:data")
    which = f"encoder_{choice.encoder[0]}"
    tensors = {
        name.removeprefix(BACKBONE): tensor
        for name, tensor in found.tensors[which].items()
        if name.startswith(BACKBONE)
    }
    weights = Weights(
        fit(tensors, network, data.image_px, f"{found.folder} ({which})"),
        network,
        data.image_px,
        f"mocostream run, {choice.encoder} encoder after {found.step} steps, {named(network)}",
        {"step": found.step, "recipe": config["recipe"]},
    )
    return Source(weights, eval_view_of(data, choice.interpolation), dict(found.state))


def _of_hub(folder: Path, choice: Choice) -> Source:
    config = _hub_settings(folder / HUB_CONFIG)
    weights = read_weights(
        folder / HUB_WEIGHTS,
        encoder=choice.encoder,
        network=choice.network,
        heads=choice.heads or config.get("model_args", {}).get("num_heads"),
    )
    mean, std = (tuple(config["pretrained_cfg"][name]) for name in ("mean", "std"))
    return Source(weights, replace(_view_for(weights, choice), mean=mean, std=std), {})


def _hub_settings(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        if all(len(config["pretrained_cfg"][name]) == CHANNELS for name in ("mean", "std")):
            return config
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path} is no config.json of timm: give a folder that timm can load")


def starting_weights(network: EncoderConfig, image_px: int) -> Weights | None:
    """What a run with these settings starts from, if not from random weights.

    Raises:
        InputError, WeightsError, CheckpointError, EncoderError: if it does not fit the backbone.
    """
    if network.weights is None:
        return None
    choice = Choice(network=network)
    weights = open_weights(network.weights, choice, lambda _: None).weights
    fit(weights.tensors, network, image_px, f"--encoder.weights {network.weights}")
    return weights


def start_from(moco: QueryEncoder, weights: Weights) -> None:
    """Put a backbone into the encoders; their heads stay random."""
    for encoder in moco.children():
        if isinstance(encoder, Encoder):
            put_into(encoder.backbone, weights)
