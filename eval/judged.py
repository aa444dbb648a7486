"""What an evaluation judges: the encoder of a run, of any project's checkpoint, or pixels.

Letters in names: N images, F features, H W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.weights_source import HUB_WEIGHTS, Choice, eval_view_of, open_weights, starting_weights
from model.checkpoint import Checkpoint, file_sha256
from model.encoder import Encoder, EncoderConfig, make_backbone
from model.weights import put_into
from pipeline.data_config import DataConfig
from pipeline.eval_loader import EvalView, Interpolation
from pipeline.settings import from_plain


@dataclass(frozen=True)
class Judged:
    """A network ``[N, 3, H, W] -> [N, F]``, the view it expects, and what it is.

    ``about`` goes into every result, so that a score can be traced to its weights.
    """

    network: nn.Module
    view: EvalView
    about: dict[str, Any]


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
        untrained: the weights it started with: from the run's own seed, or its --encoder.weights.
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
    elif weights := starting_weights(encoder_config, data.image_px):
        put_into(encoder.backbone, weights)
    encoder.eval()
    about = {
        "checkpoint": found.folder.name,
        "recipe": config["recipe"],
        "backbone": encoder_config.backbone,
        "encoder": "untrained" if untrained else which,
        "step": 0 if untrained else found.step,
    }
    return Judged(encoder.backbone, eval_view_of(data, interpolation), about)


def timm_encoder(name: str, view: EvalView) -> Judged:
    """A timm network with random weights, the same every time.

    Raises:
        EncoderError: if timm does not know it.
    """
    torch.manual_seed(0)
    backbone = make_backbone(EncoderConfig(backbone=name), view.crop_px).eval()
    return Judged(backbone, view, {"backbone": name, "encoder": "timm", "weights": "random"})


def foreign_encoder(path: Path, choice: Choice, warn: Callable[[str], None]) -> Judged:
    """The backbone in another project's checkpoint file.

    Raises:
        InputError, WeightsError, EncoderError: if there is no whole one.
    """
    source = open_weights(path, choice, warn)
    weights = source.weights
    for note in weights.notes:
        warn(note)
    backbone = make_backbone(weights.network, weights.image_px)
    put_into(backbone, weights)
    about = {
        "weights": str(path),
        "weights_sha256": file_sha256(path / HUB_WEIGHTS if path.is_dir() else path),
        "backbone": weights.network.backbone,
        "encoder": weights.about,
        **weights.facts,
    }
    return Judged(backbone.eval(), source.view, about)


def pixels(view: EvalView) -> Judged:
    """The picture itself as its features: what an encoder must beat."""
    return Judged(nn.Flatten(), view, {"encoder": "raw pixels"})
