"""Checkpoints of a run below a URL: which there are, and one of them as a local folder.

They lie as in the folder of a run: ``step-000012000/`` with ``manifest.json``, without which a
folder is no checkpoint. Of them only safetensors and JSON are fetched; how large a file may be is
known before a byte of it is. Beside them lie the run's logs (``eval/log_copies.py``).
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from eval.log_copies import Machine, fetch_logs
from eval.tracking import STATE_NAME as TRACKERS_NAME
from eval.tracking import is_state
from model.checkpoint import (
    MANIFEST_NAME,
    STATE_NAME,
    CheckpointError,
    FileEntry,
    folder_name,
    parse_manifest,
    step_in,
)
from model.stopping import RESTART_CODE
from pipeline.program import InputError
from pipeline.remote_folder import (
    Counters,
    DamagedError,
    DownError,
    RemoteError,
    RemoteFolder,
    RetryPolicy,
)
from pipeline.shard_format import atomic_file

T = TypeVar("T")
MANIFEST_LIMIT_BYTES = 1 << 20
STATE_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Head:
    """A checkpoint that is not fetched yet."""

    step: int
    where: str
    """Its URL."""
    manifest: bytes
    files: dict[str, FileEntry]
    state: dict[str, Any]
    """Its plain values."""


class StoreAwayError(InputError):
    """A store that does not answer: nothing is wrong with the run, which may be started again."""

    exit_code = RESTART_CODE


class RemoteCheckpoints:
    """The checkpoints of the run below one URL.

    Args:
        url: of a run.
        policy: of retries.
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        self._folder = RemoteFolder(url, policy or RetryPolicy(), Counters())
        self.url = self._folder.url

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there whole, ascending.

        Raises:
            InputError: if they cannot be listed.
        """
        try:
            return complete_steps(self._folder.tree())
        except RemoteError as error:
            raise unreachable(self.url, error) from error

    def head(self, step: int) -> Head:
        """What the checkpoint of a step says of itself.

        Raises:
            CheckpointError: if it is damaged.
            InputError: if the store does not serve.
        """
        name = folder_name(step)
        where = f"{self.url}/{name}"
        manifest = self._read(f"{name}/{MANIFEST_NAME}", MANIFEST_LIMIT_BYTES)
        files = parse_manifest(manifest, where)
        content = self._read(f"{name}/{STATE_NAME}", STATE_LIMIT_BYTES)
        if STATE_NAME not in files or sha256_of(content) != files[STATE_NAME].sha256:
            raise CheckpointError(f"{where}/{STATE_NAME} is damaged: its checksum differs")
        try:
            state = json.loads(content)
            is_right = state["step"] == step
        except (ValueError, KeyError, TypeError, RecursionError):
            is_right = False
        if not is_right:
            raise CheckpointError(f"{where} does not hold the state of step {step}")
        return Head(step, where, manifest, files, state)

    def fetch(self, head: Head, run: Path, along: Callable[[], None] = lambda: None) -> Path:
        """A checkpoint as a folder in that of a run; checked, and there whole or not at all.

        Several processes may fetch one into the same folder.

        Args:
            head: of the checkpoint.
            run: folder of the run.
            along: fetches what belongs to it, before it stands: a start that finds it looks no
                further.

        Raises:
            CheckpointError: if it is damaged.
            InputError: if the store does not serve, or the disk has no room for it.
            OSError: if it cannot be written.
        """
        final = run / folder_name(head.step)
        mine = f".{final.name}.{socket.gethostname()}-"
        made = [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in run.glob(f"{mine}*.part"):
            shutil.rmtree(left_by_a_kill, ignore_errors=True)
        part = run / f"{mine}{os.getpid()}.part"
        try:
            needed = sum(entry.bytes for entry in head.files.values())
            if shutil.disk_usage(run).free < needed:
                raise InputError(
                    f"{head.where} has {needed / 2**30:.2f} GiB, {run} has not so much room: free "
                    "some, or choose a folder on another disk"
                )
            part.mkdir()
            for name, entry in head.files.items():
                self._download(f"{folder_name(head.step)}/{name}", entry, part / name)
            with atomic_file(part / MANIFEST_NAME) as file:
                file.write(head.manifest)
            along()
            put_in_place(part, final)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            for folder in made:
                if not any(folder.iterdir()):
                    folder.rmdir()
            raise
        return final

    def fetch_beside(
        self, step: int, run: Path, machine: Machine, warn: Callable[[str], None]
    ) -> None:
        """Put what lies beside a checkpoint into a run's folder: logs and the trackers' state.

        Args:
            step: of the checkpoint.
            run: folder of the run.
            machine: whose logs are wanted.
            warn: told of a log that is not whole.

        Raises:
            InputError: if the store does not serve.
            OSError: if they cannot be written.
        """
        try:
            fetch_logs(self._folder, step, run, machine, warn)
            with suppress(DamagedError):
                state = self._folder.read(TRACKERS_NAME, MANIFEST_LIMIT_BYTES)
                if machine.first == 0 and is_state(state):
                    with atomic_file(run / TRACKERS_NAME) as file:
                        file.write(state)
        except RemoteError as error:
            raise unreachable(self.url, error) from error

    def _read(self, name: str, limit_bytes: int) -> bytes:
        return self._served(lambda: self._folder.read(name, limit_bytes))

    def _download(self, name: str, entry: FileEntry, path: Path) -> None:
        with path.open("w+b") as file:
            os.truncate(file.fileno(), entry.bytes)
            self._served(
                lambda: self._folder.download(name, entry.bytes, entry.sha256, file.fileno())
            )
            os.fsync(file.fileno())

    def _served(self, once: Callable[[], T]) -> T:
        """What a store gives; that a file is gone or wrong is no fault of the store."""
        try:
            return once()
        except DamagedError as error:
            raise CheckpointError(f"{error}") from error
        except RemoteError as error:
            raise unreachable(self.url, error) from error


def complete_steps(sizes: dict[str, int]) -> list[int]:
    """Steps of the folders that have a manifest, ascending; ``sizes`` of all files by name."""
    places = [name.split("/") for name in sizes]
    found = [step_in(place[0]) for place in places if place[1:] == [MANIFEST_NAME]]
    return sorted(step for step in found if step is not None)


def put_in_place(part: Path, final: Path) -> None:
    """Give a finished folder its name, also where a damaged one or that of another process is."""
    if final.exists():
        shutil.rmtree(final, ignore_errors=True)
    try:
        part.replace(final)
    except OSError:
        if not final.is_dir():  # else another process was first with the same
            raise
        shutil.rmtree(part)


def unreachable(url: str, error: RemoteError) -> InputError:
    """The error for a store that does not serve; for one that does not answer a later start may."""
    kind = StoreAwayError if isinstance(error, DownError) else InputError
    return kind(
        f"{url} cannot be read ({error}): check the URL and the credentials in the environment"
    )


def sha256_of(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
