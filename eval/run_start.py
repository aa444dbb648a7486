"""How the processes of a run begin: all from the same checkpoint, or none.

The first process finds it. The machines of a run may share its folder or not: on one that has no
such checkpoint, its first process fetches it from the mirror.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from rich.console import Console

from eval.log_copies import LogCopies, Machine
from eval.mirror import Mirror, copy_checkpoint
from eval.remote_checkpoints import RemoteCheckpoints, sha256_of
from eval.run_config import TrainConfig
from eval.run_folder import (
    Asked,
    along_with,
    find_start,
    is_restart,
    source_of,
    trim_logs,
    write_settings,
)
from eval.run_lock import hold
from model.checkpoint import (
    MANIFEST_NAME,
    Checkpoint,
    CheckpointError,
    folder_name,
    load_checkpoint,
)
from model.collectives import from_first, gather, rank, world_size
from pipeline.program import DataError, InputError, exit_code_of
from pipeline.remote_folder import RemoteError, RetryPolicy
from pipeline.writable_folder import AT_START, WritableFolder

T = TypeVar("T")
# How a line is printed: nothing in it means anything to the console.
AS_IT_IS: Any = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}


def open_run(
    config: TrainConfig,
    output: Path,
    manifest_sha256: str,
    accelerator: Accelerator,
    console: Console,
) -> Checkpoint | None:
    """Find what the run goes on from, if anything, and write its settings into its folder.

    Every process gets the same checkpoint.

    Raises:
        InputError, CheckpointError, OSError: if the folder, checkpoint or mirror cannot be used.
    """
    say = partial(console.print, **AS_IT_IS)
    mirror = RemoteCheckpoints(config.mirror) if config.mirror else None
    asked = Asked(config, output, manifest_sha256, mirror, this_machine())
    is_first, is_first_here = accelerator.is_main_process, accelerator.is_local_main_process
    together = partial(all_or_none, accelerator.device)

    def find() -> Checkpoint | None:
        found = find_start(asked, say)
        if found is not None and asked.machine.others():
            share(found.folder, asked, partial(say, style="yellow"))
        return found

    found = together(find if is_first else None)
    start = from_first(describe(found, output), accelerator.device)
    if start:
        here = partial(start_here, asked, json.loads(start), say)
        found = together(here if is_first_here and not is_first else None) or found
        found = together(here if not is_first_here else None) or found

    def claim() -> None:
        output.mkdir(parents=True, exist_ok=True)
        hold(output, is_restart=is_restart())

    together(claim if is_first else None)

    def prepare() -> None:
        output.mkdir(parents=True, exist_ok=True)
        trim_logs(output, found.step if found else 0, rank(), accelerator.num_processes)
        if is_first:
            write_settings(output, config)

    together(prepare)
    return found


def mirror_of(config: TrainConfig, found: Checkpoint | None, console: Console) -> Mirror | None:
    """What copies the run's checkpoints and logs; it begins with the checkpoint found.

    One process of each machine has it, and the first one's copies checkpoints.
    """
    machine = this_machine()
    if not config.mirror or config.output is None or rank() != machine.first:
        return None
    mirror = Mirror(
        config.mirror,
        keep=config.keep,
        logs=LogCopies(config.output, machine),
        say=partial(Console().print if rank() else console.print, **AS_IT_IS),
    )
    if found is not None and found.folder.parent == config.output and rank() == 0:
        mirror.take(found.folder)
    return mirror


def refuse_uncopied(config: TrainConfig, uncopied: Path | None) -> None:
    """End a finished run with an error if its last checkpoint is on this machine alone.

    Args:
        config: of the run.
        uncopied: that checkpoint, if it is.

    Raises:
        InputError: saying how to copy it.
    """
    if uncopied is not None:
        raise InputError(
            f"the run is done, but its last checkpoint {uncopied} could not be copied to "
            f"{config.mirror}: the same command with --resume copies it"
        )


def all_or_none(device: torch.device, work: Callable[[], T] | None) -> T | None:
    """What ``work`` gives on this process, where it has any, once all processes are done.

    Raises:
        InputError: on all of them, if one could not do its own.
    """
    result, problem, code = None, None, 0
    try:
        result = work() if work else None
    except (InputError, CheckpointError, OSError) as error:
        problem, code = error, exit_code_of(error)
    codes_W = gather(torch.tensor([code], dtype=torch.uint8, device=device))
    if problem is not None:
        raise problem
    if codes_W.any():
        raise InputError(
            "another process of this run cannot start; its own line says why",
            exit_code=int(codes_W.max()),
        )
    return result


def this_machine() -> Machine:
    """Which processes of this run are here; each machine has as many."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size())
    return Machine(rank() // here * here, here, world_size())


def share(folder: Path, asked: Asked, warn: Callable[[str], None]) -> None:
    """Put a checkpoint into the mirror, where machines without this folder look for it.

    That this cannot be done is no error here: they may share the folder after all.
    """
    if asked.mirror is not None and folder.parent == asked.output:
        try:
            WritableFolder(asked.mirror.url, AT_START).tree()  # one that is away gets no patience
            logs = LogCopies(asked.output, asked.machine, patience_s=0)  # they wait for this
            copy_checkpoint(folder, WritableFolder(asked.mirror.url, RetryPolicy()), logs)
        except RemoteError as error:
            warn(f"{folder} is not in {asked.mirror.url} for machines without it ({error})")


def describe(found: Checkpoint | None, output: Path) -> str:
    """What identifies a checkpoint, as JSON; "" for none.

    The folder of one in ``output`` is not named: it may be another one on another machine.
    """
    if found is None:
        return ""
    place = "" if found.folder.parent == output else str(found.folder)
    return json.dumps({"step": found.step, "place": place, "manifest": digest_of(found.folder)})


def digest_of(folder: Path) -> str:
    """SHA-256 of a checkpoint's manifest, which holds those of its files."""
    return sha256_of((folder / MANIFEST_NAME).read_bytes())


def start_here(asked: Asked, start: dict[str, Any], say: Callable[..., None]) -> Checkpoint:
    """The checkpoint that the first process found, from this one's folder or a store.

    Raises:
        DataError: if neither has it.
        OSError: if it cannot be written.
    """
    step, name = start["step"], folder_name(start["step"])
    folder = Path(start["place"]) if start["place"] else asked.output / name
    with suppress(OSError, CheckpointError):
        if digest_of(folder) == start["manifest"]:
            return load_checkpoint(folder)
    remote = source_of(asked)
    if remote is None or start["place"]:
        raise DataError(
            f"{folder} is not the checkpoint that process 0 goes on from: give a folder that all "
            "machines share, or a --mirror"
        )
    try:
        head = remote.head(step)
        if sha256_of(head.manifest) != start["manifest"]:
            raise DataError(f"{head.where} is not the checkpoint that process 0 goes on from")
        along = along_with(remote, step, asked, say)
        return load_checkpoint(remote.fetch(head, asked.output, along))
    except (CheckpointError, InputError) as error:
        raise DataError(str(error), exit_code=exit_code_of(error)) from error
