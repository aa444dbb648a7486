"""Every number of a run, and the file that holds them.

Here and not in ``train.py`` because whoever judges a run reads its settings too.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from model.encoder import EncoderConfig
from model.moco import MoCoConfig
from model.schedule import OptimiserConfig
from pipeline.command_line import require_at_least_1
from pipeline.data_config import DataConfig
from pipeline.program import InputError
from pipeline.settings import from_plain, to_plain

# Settings that a resumed run may have otherwise than it started with: where things lie, what is
# watched, how fast; the length too, which stretches the schedule and is said aloud.
MAY_CHANGE = {
    *("resume", "output", "mirror", "log_every", "log_samples", "health_every", "max_skipped"),
    *("save_every", "save_minutes", "keep", "hang_seconds", "trackers"),
    *("knn_train", "knn_test", "knn_every", "epochs", "steps", "precision"),
    *("compile", "channels_last", "micro_batch"),
    *(
        "data.shards",
        "data.cache",
        "data.cache_gib",
        "data.threads",
        "data.engine",
        "data.max_bad_share",
    ),
}


LEAST_KEPT = 2


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
    micro_batch: int | None = None
    """At most so many pictures go through a process's network at once, and the gradients of its
    share of --batch add up: less memory, the same result. None: its whole share."""
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
    mirror: str | None = None
    """Copy each checkpoint and the logs there too, to s3://BUCKET/FOLDER or gs://..., of this run
    alone; --resume on a machine without the folder goes on from there."""
    resume: str | None = None
    """Go on: with no value after the newest intact checkpoint in --output or --mirror, with auto
    likewise or from the start if there is none, or with the path or URL of a checkpoint or run
    after that one."""
    log_every: int = 10
    """Steps between reports."""
    health_every: int = 5
    """Reports between looks at the dictionary (rank, ages, similarities); 0: never."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """What gets the curves; wandb and trackio are extras of these names."""
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
    """Labelled shards that votes come from, for a kNN score during the run, computed beside it.
    Features lie on the device, 8 KB a picture for a ResNet-50."""
    knn_test: str | None = None
    """Labelled shards that are judged, for a kNN score during the run."""
    knn_every: int = 1000
    """Steps between kNN scores."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "batch", "log_every", "save_every", "knn_every", "max_skipped")
        if self.micro_batch is not None:
            require_at_least_1(self, "micro_batch")
        if self.steps is not None:
            require_at_least_1(self, "steps")
        if self.health_every < 0:
            raise InputError(f"--health-every {self.health_every}: give 0 or more")
        if self.keep < LEAST_KEPT:
            raise InputError(
                f"--keep {self.keep}: give at least {LEAST_KEPT}, so that there is another one "
                "where the newest is damaged"
            )
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed {self.seed}: give a number from 0 to 2**63 - 1")
        for name in ("save_minutes", "hang_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)}: give 0 or a number above it")
        if not 0 < self.epochs < math.inf:
            raise InputError(f"--epochs {self.epochs}: give a number above 0")
        if (self.knn_train is None) != (self.knn_test is None):
            raise InputError("--knn-train and --knn-test belong together: give both or none")

    def length(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.steps or round(self.epochs * steps_per_epoch)


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
        below = to_plain(recipe)
        # The recipe's rate is for the recipe's batch, one in the file for the file's.
        own = plain.get("optimiser")
        has_lr = isinstance(own, dict) and "lr" in own
        lr_batch = recipe.optimiser.lr_batch or recipe.batch
        below["optimiser"]["lr_batch"] = None if has_lr else lr_batch
        plain = merged(below, plain)
    return from_plain(TrainConfig, {**plain, "resume": None}, str(path))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested settings of which the second ones win."""
    result = dict(below)
    for name, value in above.items():
        is_nested = isinstance(value, dict) and isinstance(below.get(name), dict)
        result[name] = merged(below[name], value) if is_nested else value
    return result
