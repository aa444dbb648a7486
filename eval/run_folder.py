"""The folder of a run: a new one, or one whose newest checkpoint is gone on from."""

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from eval.environment import environment
from eval.run_config import MAY_CHANGE, TrainConfig
from eval.run_report import LOG_NAME, trim_log
from model.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
)
from model.schedule import scaled_lr
from pipeline.program import InputError
from pipeline.settings import flat, to_plain
from pipeline.shard_format import atomic_file

CONFIG_NAME = "config.json"
ENVIRONMENT_NAME = "environment.json"
# Values of --resume beside the path of a checkpoint or of a run.
NEWEST, IF_ANY = "newest", "auto"
# Set, and above 0, where a launcher has started this run before.
RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
SHOWN_DIFFERENCES = 4


def find_start(
    config: TrainConfig, output: Path, manifest_sha256: str, say: Callable[..., None]
) -> Checkpoint | None:
    """The checkpoint that a run goes on from, None for its first step; nothing is written.

    A run that has a checkpoint in its own folder goes on from the newest intact one of them when
    a launcher has started it again, whatever --resume says.

    Args:
        config: the settings asked for.
        output: folder of the run.
        manifest_sha256: identity of the data set asked for.
        say: prints a line; takes ``style``.

    Raises:
        InputError: if the folder holds a run and nothing says to go on with it, or the checkpoint
            belongs to another run.
        CheckpointError: if there is nothing to resume from.
    """
    has_checkpoints = bool(checkpoint_folders(output))
    holds_run = has_checkpoints or (output / LOG_NAME).exists()
    resume = config.resume
    if is_restart() and (holds_run or resume in (None, NEWEST)):
        resume = IF_ANY
    if resume is None:
        if holds_run:
            raise InputError(
                f"{output} holds a run already: add --resume to go on, or choose another"
            )
        return None
    if resume in (NEWEST, IF_ANY):
        if not has_checkpoints and (holds_run or resume == IF_ANY):
            if holds_run:
                say(f"{output} has no checkpoint yet: starting at the first step")
            return None
        found = newest_checkpoint(output, partial(say, style="yellow"))
    else:
        found = checkpoint_at(Path(resume), output, partial(say, style="yellow"))
    refuse_other_run(config, found, manifest_sha256)
    return found


def is_restart() -> bool:
    """Whether torchrun, accelerate or Slurm has started this run before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTART_COUNTS)


def checkpoint_at(path: Path, output: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The checkpoint in ``path``, or the newest intact one of the run in ``path``.

    Raises:
        InputError: if the run's own folder holds later ones, which would be taken for its newest.
        CheckpointError: if there is none.
    """
    if not path.is_dir():
        raise InputError(
            f"--resume {path} is no folder: give a checkpoint, a run, or nothing for the newest "
            "checkpoint in --output"
        )
    is_one = (path / MANIFEST_NAME).exists() or path.name.startswith("step-")
    found = load_checkpoint(path) if is_one else newest_checkpoint(path, warn)
    later = [folder for step, folder in checkpoint_folders(output) if step > found.step]
    if later:
        raise InputError(
            f"--resume {path} is older than {later[-1]}: give another --output, or remove the "
            "later checkpoints first"
        )
    return found


def refuse_other_run(config: TrainConfig, found: Checkpoint, manifest_sha256: str) -> None:
    """See that a checkpoint belongs to the run that is asked for.

    Raises:
        InputError: naming what differs.
    """
    was = found.state["data"]["manifest_sha256"]
    if was != manifest_sha256:
        raise InputError(
            f"{found.folder} was trained on data set {was[:12]}, {config.data.shards} is "
            f"{manifest_sha256[:12]}: give the same shards, or start a new run"
        )
    before, now = flat(found.state["config"]), flat(to_plain(config))
    if (lr_batch := before.get("optimiser.lr_batch")) is not None:  # of a run of an older version
        lr = scaled_lr(before["optimiser.lr"], before["batch"], lr_batch)
        before |= {"optimiser.lr": lr, "optimiser.lr_batch": None}
    other = [
        f"{name} = {before.get(name)}, now it is {now.get(name)}"
        for name in sorted(before.keys() | now.keys(), key=lambda name: (name != "recipe", name))
        if name not in MAY_CHANGE and before.get(name) != now.get(name)
    ]
    if other:
        rest = len(other) - SHOWN_DIFFERENCES
        more = f"; and {rest} more" if rest > 0 else ""
        raise InputError(
            f"{found.folder} was trained with {'; '.join(other[:SHOWN_DIFFERENCES])}{more}: use "
            "the same, or start a new run in another --output"
        )


def write_settings(output: Path, config: TrainConfig) -> None:
    """Make the folder, and in it the settings, which ``--config`` reads, and the environment.

    Raises:
        OSError: if it cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_plain(output / CONFIG_NAME, to_plain(config))
    write_plain(output / ENVIRONMENT_NAME, environment())


def trim_logs(output: Path, step: int) -> None:
    """Drop bad samples that were met after ``step`` steps, also by ranks that are no more."""
    for log in output.glob("quarantine-*.jsonl"):
        trim_log(log, step - 1)  # its steps count from 0


def write_plain(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
