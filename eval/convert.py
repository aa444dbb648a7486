"""Convert a backbone: from any project's checkpoint to timm, torchvision, detectron2 or the hub.

    python eval/convert.py INPUT OUTPUT --to timm

INPUT is a run of ours, one of its checkpoints, or a checkpoint file of MoCo v1, v2 or v3,
mmselfsup, solo-learn, VISSL, lightly, torchvision or timm. Whose it is is seen from the names of
its tensors, and said. A backbone is converted whole or not at all; heads are left out.
"""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from safetensors.torch import save

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.model_card import model_card
from eval.weights_source import Choice, Source, open_weights
from model.checkpoint import CheckpointError
from model.encoder import EncoderConfig, EncoderError
from model.export import detectron2_content, hub_config, timm_arguments, torchvision_state
from model.network_shape import WeightsError
from model.weights import Origin, Which
from pipeline.command_line import parse_flags
from pipeline.program import InputError, run_program
from pipeline.shard_format import atomic_file

Target = Literal["timm", "torchvision", "detectron2", "hub"]
ENDINGS = {"timm": ".safetensors", "torchvision": ".pth", "detectron2": ".pkl", "hub": ""}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """What is converted to what."""

    input: Annotated[Path, tyro.conf.Positional]
    """A checkpoint file, or the folder of a run or of one checkpoint."""
    output: Annotated[Path, tyro.conf.Positional]
    """New file; for the hub a new folder."""
    to: Target
    """timm: .safetensors. torchvision: .pth. detectron2: .pkl. hub: folder with a model card."""
    encoder: Which = "query"
    """Which of the two encoders."""
    origin: Annotated[Literal[Origin, "auto"], tyro.conf.arg(name="from")] = "auto"
    """Whose checkpoint it is; auto: seen from its names."""
    network: str | None = None
    """Name of the network in timm, where the shapes do not tell."""
    heads: int | None = None
    """Attention heads of a ViT, which no shape tells."""
    scores: tuple[Path, ...] = ()
    """Results of eval programs (--json) for the model card."""
    license: str | None = None
    """Licence of the weights for the model card, as the hub abbreviates it."""

    def __post_init__(self) -> None:
        ending = ENDINGS[self.to]
        if ending and self.output.suffix != ending:
            raise InputError(f"{self.output}: the name of a file for {self.to} ends in {ending}")
        if self.output.exists():
            raise InputError(f"{self.output} exists already: remove it, or name another")
        if not self.output.absolute().parent.is_dir():
            raise InputError(f"{self.output}: its folder does not exist, make it first")
        if (self.scores or self.license) and self.to != "hub":
            raise InputError("--scores and --license are for the model card of --to hub")


def write_timm(source: Source, path: Path, _: ConvertConfig) -> str:
    """A file for ``timm.create_model``; the command that loads it."""
    name, arguments = timm_arguments(source.weights)
    given = "".join(f", {key}={value}" for key, value in arguments.items())
    _write(path, save(source.weights.tensors))
    return f"timm.create_model({name!r}, checkpoint_path={str(path)!r}{given})"


def write_torchvision(source: Source, path: Path, _: ConvertConfig) -> str:
    """A file for torchvision's ResNets; the command that loads it."""
    state = torchvision_state(source.weights)
    with atomic_file(path) as file:
        torch.save(state, file)
    return (
        f"model.load_state_dict(torch.load({str(path)!r}, weights_only=True), strict=False), where "
        "only fc is missing"
    )


def write_detectron2(source: Source, path: Path, _: ConvertConfig) -> str:
    """A file for ``MODEL.WEIGHTS`` of detectron2; how it is used."""
    content = detectron2_content(source.weights)
    _write(path, pickle.dumps(content))  # detectron2 has no other format; never read here
    return (
        f"{len(content['model'])} arrays for MODEL.WEIGHTS; with MODEL.PIXEL_MEAN and PIXEL_STD of "
        f"{_as_pixels(source.view.mean)} and {_as_pixels(source.view.std)}, INPUT.FORMAT RGB and "
        "MODEL.RESNETS.STRIDE_IN_1X1 False"
    )


def _as_pixels(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{255 * value:.3f}" for value in values) + "]"


def write_hub(source: Source, folder: Path, config: ConvertConfig) -> str:
    """A folder for the hub, complete or not there; the command that loads it."""
    settings = hub_config(source.weights, source.view.mean, source.view.std)
    scores = [read_score(path) for path in config.scores]
    card = model_card(source, settings, scores, config.license)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a kill
    part.mkdir()
    try:
        (part / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
        (part / "model.safetensors").write_bytes(save(source.weights.tensors, {"format": "pt"}))
        (part / "README.md").write_text(card)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return f"timm.create_model({f'local-dir:{folder}'!r}, pretrained=True)"


def read_score(path: Path) -> dict[str, Any]:
    """A result that an eval program wrote with --json.

    Raises:
        InputError: if it is none.
    """
    try:
        score = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--scores {path} is not JSON ({error})") from error
    if not isinstance(score, dict) or "top1" not in score or "protocol" not in score:
        raise InputError(
            f"--scores {path} is no result of an eval program: it needs top1, protocol"
        )
    return score


WRITERS: dict[Target, Callable[[Source, Path, ConvertConfig], str]] = {
    "timm": write_timm,
    "torchvision": write_torchvision,
    "detectron2": write_detectron2,
    "hub": write_hub,
}


def _write(path: Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def main() -> None:
    """Read, say what it is, write, say how it is loaded."""
    config = parse_flags(ConvertConfig, __doc__)
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    choice = Choice(
        encoder=config.encoder,
        origin=None if config.origin == "auto" else config.origin,
        network=EncoderConfig(backbone=config.network) if config.network else None,
        heads=config.heads,
    )
    source = open_weights(config.input, choice, console.print)
    weights = source.weights
    console.print(f"{config.input}: {weights.about}, {len(weights.tensors)} tensors")
    for note in weights.notes:
        console.print(note)
    how = WRITERS[config.to](source, config.output, config)
    console.print(f"{config.output}: {config.to}; {how}")


if __name__ == "__main__":
    run_program(main, (CheckpointError, EncoderError, WeightsError))
