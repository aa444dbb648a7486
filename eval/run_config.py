"""Every number of a run, the recipes, and the command line that changes them.

Here and not in ``train.py`` because whoever judges a run reads its settings too.
"""

import argparse
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from model.encoder import EncoderConfig
from model.moco import MoCoConfig
from model.schedule import OptimiserConfig
from pipeline.command_line import parse_flags, require_at_least_1
from pipeline.data_config import DataConfig
from pipeline.program import InputError
from pipeline.settings import from_plain, to_plain

# Settings that a resumed run may have otherwise than it started with: where things lie, what is
# watched, how fast; the length too, which stretches the schedule and is said aloud.
MAY_CHANGE = {
    *("resume", "output", "log_every", "log_samples", "health_every", "max_skipped"),
    *("save_every", "save_minutes", "keep", "hang_seconds"),
    *("knn_train", "knn_test", "knn_every", "epochs", "steps", "precision"),
    *("compile", "channels_last"),
    *(
        "data.shards",
        "data.cache",
        "data.cache_gib",
        "data.threads",
        "data.engine",
        "data.max_bad_share",
    ),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every number of a run."""

    recipe: tyro.conf.Suppress[str]
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    moco: MoCoConfig = field(default_factory=MoCoConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    batch: int = 256
    """Pictures in a step, all processes together."""
    epochs: float = 200.0
    """Passes over the pictures."""
    steps: int | None = None
    """Length of the run in steps, instead of --epochs."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the encoders' arithmetic; no is float32. Loss, queue and weights are float32 always."""
    compile: bool = False
    """Compile both encoders with torch.compile; off, with a message, where that fails."""
    channels_last: bool = False
    """Weights and views with the channels of a pixel side by side; for convolutions on a GPU."""
    seed: int = 0
    """Of weights, order, views, queue and shuffle."""
    output: Path | None = None
    """Folder of the run: new, or one to go on with by --resume."""
    resume: str | None = None
    """Go on: with no value after the newest intact checkpoint in --output, with auto likewise or
    from the start if there is none, or with the path of a checkpoint or run after that one."""
    log_every: int = 10
    """Steps between reports."""
    health_every: int = 5
    """Reports between looks at the dictionary (rank, ages, similarities); 0: never."""
    log_samples: bool = False
    """Write the numbers of each step's samples to samples-RANK.jsonl."""
    save_every: int = 1000
    """Steps between checkpoints; the last step has one always."""
    save_minutes: float = 0.0
    """Minutes since the last checkpoint after which there is one, whatever the step. 0: never."""
    max_skipped: int = 20
    """End the run after so many steps in a row without a finite gradient; each is left out."""
    hang_seconds: float = 540.0
    """End a process that does no step for so long, with its threads' stacks in hang-RANK.txt, to be
    started again. Below the ten minutes after which NCCL gives up. 0: never."""
    keep: int = 3
    """Checkpoints that stay, at least 2."""
    knn_train: str | None = None
    """Labelled shards that votes come from, for a kNN score during the run."""
    knn_test: str | None = None
    """Labelled shards that are judged, for a kNN score during the run."""
    knn_every: int = 1000
    """Steps between kNN scores."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "batch", "log_every", "save_every", "knn_every", "max_skipped")
        if self.health_every < 0:
            raise InputError(f"--health-every {self.health_every}: give 0 or more")
        if self.steps is not None and self.steps < 1:
            raise InputError(f"--steps {self.steps}: give a number of at least 1")
        for name in ("save_minutes", "hang_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)}: give 0 or a number above it")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs {self.epochs}: give a number above 0")
        if (self.knn_train is None) != (self.knn_test is None):
            raise InputError("--knn-train and --knn-test belong together: give both or none")


# Sources: v1 https://arxiv.org/abs/1911.05722 sections 3.3 and 4, and the defaults of the official
# main_moco.py; v2 https://arxiv.org/abs/2003.04297 and the flags --mlp --moco-t 0.2 --aug-plus
# --cos; v3 https://arxiv.org/abs/2104.02057 and the commands of its official CONFIG.md; cifar10 the
# authors' CIFAR-10 notebook (asymmetric form).
def _v3_resnet(epochs: int, *, lr: float, weight_decay: float, momentum: float) -> TrainConfig:
    """MoCo v3 on a ResNet-50; its settings change with the length."""
    return TrainConfig(
        recipe=f"moco-v3-{epochs}",
        data=DataConfig(views="moco-v3"),
        encoder=EncoderConfig(backbone="resnet50", head="v3", dim=256, zero_init_residual=True),
        moco=_v3_moco(momentum=momentum, temperature=1.0),
        optimiser=OptimiserConfig(
            name="lars",
            lr=lr,
            lr_batch=256,
            weight_decay=weight_decay,
            every="step",
            warmup_epochs=10,
        ),
        batch=4096,
        epochs=epochs,
        precision="fp16",
    )


def _v3_vit(name: str, backbone: str) -> TrainConfig:
    """MoCo v3 on a ViT of 12 heads with frozen patch projection, 300 epochs."""
    return TrainConfig(
        recipe=name,
        data=DataConfig(views="moco-v3-vit"),
        encoder=EncoderConfig(backbone=backbone, heads=12, head="v3", dim=256),
        moco=_v3_moco(momentum=0.99, temperature=0.2),
        optimiser=OptimiserConfig(
            name="adamw", lr=1.5e-4, lr_batch=256, weight_decay=0.1, every="step", warmup_epochs=40
        ),
        batch=4096,
        epochs=300,
        precision="fp16",
    )


def _v3_moco(*, momentum: float, temperature: float) -> MoCoConfig:
    return MoCoConfig(
        mechanism="batch",
        momentum=momentum,
        momentum_schedule="cosine",
        temperature=temperature,
        symmetric=True,
        predictor=True,
        loss_2t=True,
        batch_norm="sync",
    )


RECIPES = {
    "moco-v1": TrainConfig(
        recipe="moco-v1",
        data=DataConfig(views="moco-v1"),
        encoder=EncoderConfig(backbone="resnet50", head="linear"),
        moco=MoCoConfig(queue=65_536, momentum=0.999, temperature=0.07),
        optimiser=OptimiserConfig(lr=0.03, schedule="steps", milestones=(0.6, 0.8)),  # 120, 160
        batch=256,
        epochs=200,
    ),
    "moco-v2": TrainConfig(
        recipe="moco-v2",
        data=DataConfig(views="moco-v2"),
        encoder=EncoderConfig(backbone="resnet50", head="mlp"),
        moco=MoCoConfig(queue=65_536, momentum=0.999, temperature=0.2),
        optimiser=OptimiserConfig(lr=0.03, schedule="cosine"),
        batch=256,
        epochs=200,
    ),
    "moco-v3-100": _v3_resnet(100, lr=0.6, weight_decay=1e-6, momentum=0.99),
    "moco-v3-300": _v3_resnet(300, lr=0.3, weight_decay=1e-6, momentum=0.99),
    "moco-v3-1000": _v3_resnet(1000, lr=0.3, weight_decay=1.5e-6, momentum=0.996),
    "moco-v3-vit-s": _v3_vit("moco-v3-vit-s", "vit_small_patch16_224"),
    "moco-v3-vit-b": _v3_vit("moco-v3-vit-b", "vit_base_patch16_224"),
    "cifar10": TrainConfig(
        recipe="cifar10",
        data=DataConfig(
            views="cifar10",
            image_px=32,
            eval_resize_px=32,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2023, 0.1994, 0.2010),
        ),
        encoder=EncoderConfig(backbone="resnet18", stem="cifar", head="linear"),
        moco=MoCoConfig(queue=4096, momentum=0.99, temperature=0.1),
        optimiser=OptimiserConfig(lr=0.06, weight_decay=5e-4, schedule="cosine"),
        batch=512,
        epochs=200,
    ),
    # Ours: a network and a queue small enough for minutes on a CPU and for a few hundred pictures.
    "demo": TrainConfig(
        recipe="demo",
        data=DataConfig(
            views="marks",
            image_px=32,
            eval_resize_px=32,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
        ),
        encoder=EncoderConfig(backbone="resnet18", layers=(1, 1, 1, 1), head="mlp"),
        moco=MoCoConfig(queue=512, momentum=0.99, temperature=0.1, batch_norm_groups=4),
        # 0.06 collapsed within four epochs: the loss went to log(K + 1), kNN stood still.
        optimiser=OptimiserConfig(lr=0.015, weight_decay=5e-4),
        batch=64,
        epochs=30,
        save_every=500,
    ),
}


def parse_arguments(arguments: list[str], about: str) -> TrainConfig:
    """Settings: those of the recipe, then those of --config FILE, then the flags.

    Args:
        arguments: of the command line.
        about: what --help says of the program.

    Raises:
        InputError: if the recipe or a setting in the file is unknown.
    """
    default, rest = recipe_of(arguments)
    return parse_flags(TrainConfig, about_recipes(about, default), rest, default)


def about_recipes(about: str, default: TrainConfig) -> str:
    """What --help says of a program whose first word is a recipe."""
    known = ", ".join(RECIPES)
    return f"{about}\nRecipes: {known}. The defaults shown are those of {default.recipe}."


def recipe_of(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The settings that the flags change, and the flags.

    Raises:
        InputError: if the recipe or a setting in the file is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", nargs="?", const="newest")  # tyro's flags have a value or none
    files, rest = parser.parse_known_args(arguments)
    if files.resume is not None:
        rest += ["--resume", files.resume]
    known = ", ".join(RECIPES)
    default = None
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"there is no recipe {name!r}: choose one of {known}.{hint}")
        default = RECIPES[name]
    if files.config is not None:
        default = read_config(files.config, default)
    if default is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError(f"no recipe: the first word is one of {known}")
        default = RECIPES["moco-v2"]
    return default, rest


def read_config(path: Path, recipe: TrainConfig | None) -> TrainConfig:
    """The settings that a run wrote to its config.json, over those of the recipe.

    Raises:
        InputError: if it is no such file or has unknown settings.
    """
    try:
        plain = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not JSON ({error})") from error
    if not isinstance(plain, dict):
        raise InputError(f"--config {path} holds no settings: give a run's config.json")
    if recipe is not None:
        plain = merged(to_plain(recipe), plain)
    return from_plain(TrainConfig, {**plain, "resume": None}, str(path))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of which the second ones win."""
    result = dict(below)
    for name, value in above.items():
        is_nested = isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = merged(below[name], value) if is_nested else value
    return result
