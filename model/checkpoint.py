"""A checkpoint is a folder that is complete or not there, and nothing in it is ever unpickled.

``step-000012000/`` holds tensors as safetensors, everything else as ``state.json``, and
``manifest.json`` with the size and SHA-256 of each file. It is written under a temporary name,
fsynced and renamed. Older ones go only after the new one stands; at least two are kept, so that a
damaged newest one costs one interval and not the run.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CHECKPOINT_VERSION = 1
MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
FOLDER_PATTERN = re.compile(r"step-(\d{9})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message says which, why, and what to do."""


class NewerVersionError(CheckpointError):
    """One that a later version of this program wrote: whole, and not to be written over."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: groups of tensors by name, and plain values."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of a file."""

    bytes: int
    sha256: str


def save_checkpoint(
    run: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int = 3,
    spared: frozenset[Path] = frozenset(),
) -> Path:
    """Write ``run/step-NNNNNNNNN`` and remove the oldest beyond ``keep`` (at least 2).

    Args:
        run: folder of the run.
        step: steps done.
        tensors: for each file name (without ending) its tensors by name.
        state: plain values, written as JSON.
        keep: how many checkpoints stay.
        spared: folders that stay beside them, because somebody reads them.

    Raises:
        OSError: if it cannot be written; older checkpoints are untouched and no part is left.
    """
    final = run / folder_name(step)
    part = run / f".step-{step:09d}.part"
    require_space(run, tensors)
    for left_by_a_kill in run.glob(".step-*.part"):
        shutil.rmtree(left_by_a_kill, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for group, named in tensors.items():
            write_tensors(part / f"{group}.safetensors", named)
        write_json(part / STATE_NAME, {**state, "step": step, "version": CHECKPOINT_VERSION})
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(part.iterdir())
        }
        write_json(part / MANIFEST_NAME, {"version": CHECKPOINT_VERSION, "files": files})
        for path in [*part.iterdir(), part]:
            _fsync(path)
        if final.exists():  # the same step again, after a resume from an older checkpoint
            shutil.rmtree(final)
        part.replace(final)
        _fsync(run)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(final)  # a failed write says what is wrong, but not where
        raise
    # Later ones are damaged, or this step would have been resumed from them: they do not count.
    done = [folder for number, folder in checkpoint_folders(run) if number <= step]
    for old in done[: -max(keep, 2)]:
        if old not in spared:
            shutil.rmtree(old, ignore_errors=True)
    return final


def folder_name(step: int) -> str:
    """The name of the checkpoint of a step."""
    return f"step-{step:09d}"


def step_in(name: str) -> int | None:
    """The step in the name of a checkpoint; None for another name."""
    match = FOLDER_PATTERN.fullmatch(name)
    return int(match[1]) if match else None


def require_space(run: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """See that a checkpoint fits, rather than fill the disk that the run's log lies on too.

    Raises:
        OSError: if it does not.
    """
    run.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    if shutil.disk_usage(run).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_tensors(path: Path, named: dict[str, Tensor]) -> None:
    """A safetensors file; the writing does not hold Python's lock.

    Raises:
        OSError: with the system's number, which the library says in its message only.
    """
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def checkpoint_folders(run: Path) -> list[tuple[int, Path]]:
    """``(step, folder)`` of every finished checkpoint of a run, the oldest first."""
    if not run.is_dir():
        return []
    found = [(step_in(path.name), path) for path in run.iterdir() if path.is_dir()]
    return sorted((step, path) for step, path in found if step is not None)


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``, after every file in it was compared with its manifest.

    Raises:
        CheckpointError: if it is none, is damaged, or was written by another version.
    """
    try:
        require_file(folder / MANIFEST_NAME)
        files = parse_manifest((folder / MANIFEST_NAME).read_bytes(), str(folder))
        unknown = {path.name for path in folder.iterdir()} - {*files, MANIFEST_NAME}
        if unknown:
            raise CheckpointError(
                f"{folder} holds {sorted(unknown)[0]}, which its manifest does not list: a "
                "checkpoint of ours has safetensors and JSON only, remove what is not of it"
            )
        for name, entry in files.items():
            size = require_file(folder / name)
            if size != entry.bytes:
                raise CheckpointError(
                    f"{folder / name} is damaged: it has {size:,} bytes instead of {entry.bytes:,}"
                )
            if file_sha256(folder / name) != entry.sha256:
                raise CheckpointError(f"{folder / name} is damaged: its checksum differs")
        tensors = {
            Path(name).stem: load_file(folder / name)
            for name in files
            if name.endswith(".safetensors")
        }
        state = json.loads((folder / STATE_NAME).read_text())
        return Checkpoint(folder, int(state["step"]), tensors, state)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {Path(error.filename).name} is missing"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder} is not a checkpoint of this program ({error})") from error
    except SafetensorError as error:
        raise CheckpointError(f"{folder} holds unreadable tensors ({error})") from error


def require_file(path: Path) -> int:
    """Bytes of a plain file; a link to one is as good.

    Raises:
        CheckpointError: if it is a device or a pipe, whose reading may have no end.
        FileNotFoundError: if it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is damaged: it is no plain file")
    return status.st_size


def parse_manifest(content: bytes, where: str) -> dict[str, FileEntry]:
    """The files of a checkpoint by name, which its manifest lists.

    Args:
        content: of the manifest.
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: if it is none, was written by another version, or lists a file that no
            checkpoint of ours has.
    """
    try:
        manifest = json.loads(content)
        if (version := int(manifest["version"])) != CHECKPOINT_VERSION:
            kind = NewerVersionError if version > CHECKPOINT_VERSION else CheckpointError
            raise kind(
                f"{where} has checkpoint version {version}, this program reads "
                f"{CHECKPOINT_VERSION}: use the version of this program that wrote it"
            )
        files = {
            name: FileEntry(int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{where} is not a checkpoint of this program ({error})") from error
    for name in files:
        if Path(name).name != name or Path(name).suffix not in (".safetensors", ".json"):
            raise CheckpointError(f"{where} lists {name!r}, which no checkpoint of ours has")
    return files


def newest_checkpoint(run: Path, warn: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint of a run that verifies.

    Args:
        run: folder of the run.
        warn: told of each newer one that had to be passed over.

    Raises:
        CheckpointError: if there is none.
    """
    folders = checkpoint_folders(run)
    if not folders:
        raise CheckpointError(f"{run} holds no checkpoint: give the folder of a run, or start one")
    places = [partial(load_checkpoint, folder) for _, folder in reversed(folders)]
    return first_intact(places, warn, str(run))


def first_intact(
    places: Sequence[Callable[[], Checkpoint]], warn: Callable[[str], None], where: str
) -> Checkpoint:
    """The first checkpoint that can be loaded.

    Args:
        places: each loads one, or raises a CheckpointError.
        warn: told of each that had to be passed over.
        where: they lie, for the message.

    Raises:
        CheckpointError: if there is none.
        NewerVersionError: at the first of these, which a run that went on from an older one would
            write over.
    """
    for load in places:
        try:
            return load()
        except NewerVersionError:
            raise
        except CheckpointError as error:
            warn(f"{error}; falling back to the checkpoint before it")
    raise CheckpointError(f"none of the {len(places)} checkpoints in {where} is intact")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a value that people may want to read."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
