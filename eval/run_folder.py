"""The folder of a run: a new one, or one whose newest checkpoint is gone on from."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from eval.environment import environment
from eval.log_copies import Machine
from eval.mirror_at_start import CopiesSeen, copies_at_start, nothing_to_go_on_from
from eval.remote_checkpoints import RemoteCheckpoints
from eval.run_config import MAY_CHANGE, TrainConfig
from eval.run_report import LOG_NAME, trim_log
from eval.step_log import cut, logs_of, rank_of
from model.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointError,
    checkpoint_folders,
    first_intact,
    folder_name,
    load_checkpoint,
    newest_checkpoint,
    step_in,
)
from model.schedule import scaled_lr
from pipeline.location import as_location, is_url
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


@dataclass(frozen=True)
class Asked:
    """What is asked for, as far as finding its start goes."""

    config: TrainConfig
    output: Path
    manifest_sha256: str
    """Identity of the data set."""
    mirror: RemoteCheckpoints | None = None
    """Copies of the run's checkpoints."""
    machine: Machine = field(default_factory=Machine)
    """Where this process runs."""


def find_start(asked: Asked, say: Callable[..., None]) -> Checkpoint | None:
    """The checkpoint that a run goes on from, None for its first step.

    A run that has a checkpoint in its own folder or mirror goes on from the newest intact one of
    them when a launcher has started it again, whatever --resume says. One that is not in the folder
    is fetched into it; nothing else is written.

    Args:
        asked: what is asked for.
        say: prints a line; takes ``style``.

    Raises:
        InputError: if the folder or mirror holds a run and nothing says to go on with it, the
            checkpoint belongs to another run, or a store does not serve that is needed.
        CheckpointError: if there is nothing to resume from.
    """
    output, resume = asked.output, asked.config.resume
    has_local, wanted = bool(checkpoint_folders(output)), resume is not None or is_restart()
    copies = CopiesSeen()
    if asked.mirror:
        url = asked.mirror.url
        copies = copies_at_start(url, output, say, has_local=has_local, is_to_go_on=wanted)
    has_checkpoints = has_local or bool(copies.steps)
    holds_run = has_checkpoints or (output / LOG_NAME).exists()
    if is_restart() and (holds_run or resume in (None, NEWEST)):
        resume = IF_ANY
    if resume is None:
        if holds_run:
            is_here = has_local or (output / LOG_NAME).exists()
            place = output if is_here or not asked.mirror else asked.mirror.url
            raise InputError(
                f"{place} holds a run already: add --resume to go on, or choose another"
            )
        return None
    if resume not in (NEWEST, IF_ANY):
        found = checkpoint_at(resume, asked, copies, say)
    elif has_checkpoints or not (holds_run or resume == IF_ANY):
        found = newest_of(asked, copies, say)
    else:
        if holds_run:
            say(f"{output} has no checkpoint yet: starting at the first step")
        return None
    refuse_other_run(asked, found.state, str(found.folder))
    return found


def newest_of(asked: Asked, copies: CopiesSeen, say: Callable[..., None]) -> Checkpoint:
    """The newest intact checkpoint of a run, in its folder or, where it is not there, its mirror.

    Raises:
        CheckpointError: if there is none.
        InputError: if the mirror's belong to another run, or it does not serve.
    """
    warn = partial(say, style="yellow")
    if asked.mirror is None or not copies.steps:
        try:
            return newest_checkpoint(asked.output, warn)
        except CheckpointError as error:
            if copies.away is None:
                raise
            raise nothing_to_go_on_from(copies.away, asked.output) from error
    places: list[tuple[int, bool, Callable[[], Checkpoint]]] = [
        (step, True, partial(load_checkpoint, folder))
        for step, folder in checkpoint_folders(asked.output)
    ]
    places += [
        (step, False, partial(fetched, asked.mirror, step, asked, say)) for step in copies.steps
    ]
    places.sort(key=lambda place: place[:2], reverse=True)  # of the same step the folder first
    where = f"{asked.output} and {asked.mirror.url}"
    return first_intact([load for *_, load in places], warn, where)


def fetched(
    remote: RemoteCheckpoints, step: int, asked: Asked, say: Callable[..., None]
) -> Checkpoint:
    """A checkpoint below a URL, brought into the folder of the run; its logs too, from the mirror.

    Raises:
        CheckpointError: if it is damaged.
        InputError: if it belongs to another run, or the store does not serve.
    """
    head = remote.head(step)
    refuse_other_run(asked, head.state, head.where)
    mebibytes = sum(entry.bytes for entry in head.files.values()) / 2**20
    say(f"fetching {head.where} ({mebibytes:,.1f} MiB)")
    return load_checkpoint(remote.fetch(head, asked.output, along_with(remote, step, asked, say)))


def along_with(
    remote: RemoteCheckpoints, step: int, asked: Asked, say: Callable[..., None]
) -> Callable[[], None]:
    """What fetches the logs that belong to a checkpoint of the run's own mirror."""
    if asked.mirror is None or remote.url != asked.mirror.url:
        return lambda: None
    warn = partial(say, style="yellow")
    return partial(remote.fetch_beside, step, asked.output, asked.machine, warn)


def is_restart() -> bool:
    """Whether torchrun, accelerate or Slurm has started this run before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in RESTART_COUNTS)


def checkpoint_at(
    place: str, asked: Asked, copies: CopiesSeen, say: Callable[..., None]
) -> Checkpoint:
    """The checkpoint in ``place``, or the newest intact one of the run in ``place``.

    Raises:
        InputError: if the run's own folder or mirror holds later ones, which would be taken for its
            newest; or a store does not serve.
        CheckpointError: if there is none.
    """
    if is_url(place):
        return checkpoint_below(as_location(place), asked, copies, say)
    path = Path(place)
    if not path.is_dir():
        raise InputError(
            f"--resume {path} is no folder: give a checkpoint, a run, or nothing for the newest "
            "checkpoint in --output"
        )
    is_one = (path / MANIFEST_NAME).exists() or path.name.startswith("step-")
    warn = partial(say, style="yellow")
    found = load_checkpoint(path) if is_one else newest_checkpoint(path, warn)
    refuse_before_later(place, found.step, asked, copies)
    return found


def checkpoint_below(
    url: Path | str, asked: Asked, copies: CopiesSeen, say: Callable[..., None]
) -> Checkpoint:
    """Likewise for a URL; it is fetched into the folder of the run.

    Raises:
        InputError, CheckpointError: as ``checkpoint_at``.
    """
    remote, step = below(str(url))

    def load(step: int) -> Checkpoint:
        refuse_before_later(str(url), step, asked, copies)
        return fetched(remote, step, asked, say)

    if step is not None:
        return load(step)
    steps = remote.steps()
    if not steps:
        raise CheckpointError(f"{url} holds no checkpoint: give the URL of a run, or start one")
    places = [partial(load, step) for step in reversed(steps)]
    return first_intact(places, partial(say, style="yellow"), str(url))


def below(url: str) -> tuple[RemoteCheckpoints, int | None]:
    """The run whose URL, or that of one of its checkpoints, this is; and the step of that one."""
    run, _, name = url.rpartition("/")
    step = step_in(name)
    return RemoteCheckpoints(url if step is None else run), step


def source_of(asked: Asked) -> RemoteCheckpoints | None:
    """Where the checkpoint that a run goes on from can be fetched, if anywhere."""
    resume = asked.config.resume
    return below(str(as_location(resume)))[0] if resume and is_url(resume) else asked.mirror


def refuse_before_later(place: str, step: int, asked: Asked, copies: CopiesSeen) -> None:
    """See that a run holds no later checkpoints than the one that it is to go on from.

    Raises:
        InputError: naming the latest.
    """
    later = [str(folder) for number, folder in checkpoint_folders(asked.output) if number > step]
    if asked.mirror and copies.steps and copies.steps[-1] > step:
        later.append(f"{asked.mirror.url}/{folder_name(copies.steps[-1])}")
    if later:
        raise InputError(
            f"--resume {place} is older than {later[-1]}: give another --output, or remove the "
            "later checkpoints first"
        )


def refuse_other_run(asked: Asked, state: dict[str, Any], where: str) -> None:
    """See that a checkpoint belongs to the run that is asked for.

    Args:
        asked: what is asked for.
        state: the checkpoint's plain values.
        where: it lies, for the message.

    Raises:
        InputError: naming what differs.
        CheckpointError: if it does not say whose it is.
    """
    try:
        was, before = state["data"]["manifest_sha256"], flat(state["config"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where} is not a checkpoint of this program") from error
    config = asked.config
    if was != asked.manifest_sha256:
        raise InputError(
            f"{where} was trained on data set {was[:12]}, {config.data.shards} is "
            f"{asked.manifest_sha256[:12]}: give the same shards, or start a new run"
        )
    now = flat(to_plain(config))
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
            f"{where} was trained with {'; '.join(other[:SHOWN_DIFFERENCES])}{more}: use "
            "the same, or start a new run in another --output"
        )
    done, end = state["step"], config.length(state["data"]["samples"] // config.batch)
    if done > end:
        raise InputError(
            f"{where} has done {done:,} steps, --steps or --epochs ask for {end:,} in all: ask for "
            "as many or more, or start a new run in another --output"
        )


def write_settings(output: Path, config: TrainConfig) -> None:
    """Make the folder, and in it the settings, which ``--config`` reads, and the environment.

    Raises:
        OSError: if it cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    write_plain(output / CONFIG_NAME, to_plain(config))
    write_plain(output / ENVIRONMENT_NAME, environment())


def trim_logs(output: Path, step: int, rank: int, world: int) -> None:
    """Drop what an earlier part of the run has logged after ``step`` steps, on this process.

    The first process does so in the logs of the run and of ranks that are no more, too. From here
    on logs grow only, which their copies in a mirror count on.
    """
    if rank == 0:
        trim_log(output / LOG_NAME, step)

    def mine(name: str) -> list[Path]:
        logs = logs_of(output, name)
        return [p for p in logs if rank_of(p) == rank or (rank == 0 and rank_of(p) >= world)]

    for log in mine("quarantine"):
        trim_log(log, step - 1)  # its steps count from 0
    for log in [*mine("samples"), *mine("skipped")]:
        cut(log, step)


def write_plain(path: Path, content: dict[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
