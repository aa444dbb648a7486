"""The logs of a run in its mirror: which belong to a checkpoint, and only what is new is uploaded.

A log only grows while a run goes on, so its copy is cut into parts of 4 MiB, of which the last one
alone changes. A part is named by its place and its SHA-256, ``logs/run.jsonl/000012-SHA256``, and
``logs/step-000012000-0.json`` lists the parts of all logs as they were when that checkpoint was
copied. So what a run that goes on from an earlier checkpoint writes never touches what belongs to
another one, and a log of gigabytes costs a checkpoint its new lines and at most one part.

Every machine of a run brings the logs of its own processes; the number in a list's name is that of
its first process.
"""

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from eval.run_report import LOG_NAME
from model.checkpoint import folder_name, step_in
from pipeline.remote_folder import DamagedError, RemoteFolder
from pipeline.shard_format import atomic_file
from pipeline.writable_folder import WritableFolder

PART_BYTES = 4 << 20
PARTS_AT_ONCE = 8
LIST_VERSION = 1
LIST_LIMIT_BYTES = 64 << 20
LOG_PATTERN = re.compile(
    rf"{re.escape(LOG_NAME)}|(?:quarantine|skipped|samples)-(\d+)\.jsonl|hang-(\d+)\.txt"
    r"|tensorboard/events\.out\.tfevents\.[\w.-]+"
)
PART_PATTERN = re.compile(r"logs/(.+)/(\d{6,})-([0-9a-f]{64})")
LIST_PATTERN = re.compile(r"logs/(step-\d{9})-(\d+)\.json")
LOOK_S = 1.0


@dataclass(frozen=True)
class Machine:
    """Which of a run's processes are on a machine: each has logs of its own."""

    first: int = 0
    """Number of its first process."""
    processes: int = 1
    world: int = 1
    """Processes of the whole run."""

    def has(self, log: str) -> bool:
        """Whether a log is written here; of the run and of ranks that are no more, on the first."""
        found = LOG_PATTERN.fullmatch(log)
        number = found and (found[1] or found[2])
        if number is None or int(number) >= self.world:
            return found is not None and self.first == 0
        return self.first <= int(number) < self.first + self.processes

    def others(self) -> list[int]:
        """First processes of the other machines, each of which has as many."""
        return [rank for rank in range(0, self.world, self.processes) if rank != self.first]


@dataclass(frozen=True)
class Part:
    """A piece of a log."""

    bytes: int
    sha256: str

    def place(self, log: str, number: int) -> str:
        """Where it lies, below the URL of the run."""
        return f"logs/{log}/{number:06d}-{self.sha256}"


def list_name(step: int, first: int) -> str:
    """Where a machine lists its logs of a checkpoint, below the URL of the run."""
    return f"logs/{folder_name(step)}-{first}.json"


class LogCopies:
    """Brings the logs of one machine into a store.

    Made when the logs have been cut to the checkpoint that a run goes on from: after that they grow
    only, which is why a part that is full is read once.

    Args:
        run: folder of the run.
        machine: this one.
        patience_s: how long a checkpoint waits for the other machines' logs, which are small.
    """

    def __init__(self, run: Path, machine: Machine, patience_s: float = 30.0) -> None:
        self._run = run
        self.machine = machine
        self._patience_s = patience_s
        self._full: dict[str, list[Part]] = {}
        self._last = "", b""

    def copy(self, step: int, remote: WritableFolder, present: dict[str, int]) -> None:
        """Bring what is new, and list all there is as belonging to the checkpoint of a step.

        Args:
            step: of the checkpoint.
            remote: the mirror.
            present: what is there.

        Raises:
            RemoteError: if it cannot be written or does not read back as it is here.
            OSError: if it cannot be read here.
        """
        logs = {name: self._copy_log(name, remote, present) for name in self._names()}
        listed = {name: [[p.bytes, p.sha256] for p in parts] for name, parts in logs.items()}
        content = json.dumps({"version": LIST_VERSION, "logs": listed}).encode()
        name = list_name(step, self.machine.first)
        if (name, content) != self._last or name not in present:
            remote.write(name, content)
        self._last = name, content

    def await_others(self, step: int, remote: WritableFolder) -> None:
        """Until the other machines have brought theirs, or patience is over.

        Raises:
            RemoteError: if the store does not serve.
        """
        deadline = time.monotonic() + self._patience_s
        wanted = {list_name(step, first) for first in self.machine.others()}
        while wanted and wanted - remote.tree().keys() and time.monotonic() < deadline:
            time.sleep(LOOK_S)

    def _names(self) -> list[str]:
        paths = [*self._run.glob("*"), *self._run.glob("tensorboard/*")]
        names = [path.relative_to(self._run).as_posix() for path in paths if path.is_file()]
        return sorted(name for name in names if self.machine.has(name))

    def _copy_log(self, log: str, remote: WritableFolder, present: dict[str, int]) -> list[Part]:
        full, parts = self._full.setdefault(log, []), []
        with (self._run / log).open("rb") as file:
            size = file.seek(0, 2)  # the run writes on: what comes now belongs to the next one
            for number, start in enumerate(range(0, size, PART_BYTES)):
                span = (start, min(start + PART_BYTES, size))
                part = full[number] if number < len(full) else None
                if part is None or part.place(log, number) not in present:
                    part = bring_part(file, span, log, remote, present)
                parts.append(part)
        self._full[log] = [part for part in parts if part.bytes == PART_BYTES]
        return parts


def bring_part(
    file: BinaryIO,
    span: tuple[int, int],
    log: str,
    remote: WritableFolder,
    present: dict[str, int],
) -> Part:
    """Put the bytes of a span of a log into the store, unless they are there.

    Raises:
        RemoteError, OSError: as ``LogCopies.copy``.
    """
    start, end = span
    file.seek(start)
    content = file.read(end - start)
    part = Part(len(content), hashlib.sha256(content).hexdigest())
    place = part.place(log, start // PART_BYTES)
    if place not in present:
        remote.write_checked(place, content, part.sha256)
    return part


# What is there ------------------------------------------------------------------------------------


def parse_list(content: bytes, where: str) -> dict[str, list[Part]]:
    """The parts of each log that a list names.

    Raises:
        DamagedError: if it is none, or names what is no log of a run.
    """
    try:
        found = json.loads(content)
        if found["version"] != LIST_VERSION:
            raise DamagedError(f"{where} has version {found['version']}, not {LIST_VERSION}")
        logs = {
            str(log): [Part(int(size), str(sha256)) for size, sha256 in parts]
            for log, parts in found["logs"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{where} is not a list of logs ({error})") from error
    for log, parts in logs.items():
        if not LOG_PATTERN.fullmatch(log) or any(not is_sound(part) for part in parts):
            raise DamagedError(f"{where} lists {log!r} with parts that no run of ours writes")
    return logs


def is_sound(part: Part) -> bool:
    """Whether size and SHA-256 are such as ``LogCopies`` writes."""
    return 0 < part.bytes <= PART_BYTES and bool(re.fullmatch(r"[0-9a-f]{64}", part.sha256))


def lists_for(step: int, names: list[str]) -> list[str]:
    """Of each machine its list of this step, or else that of the next one after or before it."""
    best: dict[int, tuple[tuple[bool, bool, int], str]] = {}
    for name in names:
        if found := LIST_PATTERN.fullmatch(name):
            other, first = step_in(found[1]) or 0, int(found[2])
            rank = (other != step, other < step, abs(other - step)), name
            best[first] = min(best.get(first, rank), rank)
    ordered = sorted((rank[0], first, name) for first, (rank, name) in best.items())
    return [name for *_, name in ordered]


def fetch_logs(
    remote: RemoteFolder, step: int, run: Path, machine: Machine, warn: Callable[[str], None]
) -> None:
    """Put the logs that belong to a checkpoint into the folder of a run; each there whole.

    They may go on beyond the step. A part that is lost or damaged ends its log, which is said.

    Args:
        remote: the mirror.
        step: of the checkpoint.
        run: folder of the run.
        machine: whose logs are wanted.
        warn: told of a log that is not whole.

    Raises:
        RemoteError: if the store does not serve.
        OSError: if they cannot be written.
    """
    done: set[str] = set()
    for name in lists_for(step, list(remote.tree())):
        try:
            logs = parse_list(remote.read(name, LIST_LIMIT_BYTES), f"{remote.url}/{name}")
        except DamagedError as error:
            warn(f"{error}; these logs begin anew")
            continue
        for log in sorted(log for log in logs if machine.has(log) and log not in done):
            done.add(log)
            path = run / log
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                try:
                    for content in contents(remote, log, logs[log]):
                        file.write(content)
                except DamagedError as error:
                    warn(f"{error}; {path} is without what came from there on")


def contents(remote: RemoteFolder, log: str, parts: list[Part]) -> Iterator[bytes]:
    """The parts of a log, some of them fetched ahead."""

    def read(number: int) -> bytes:
        part = parts[number]
        place = part.place(log, number)
        content = remote.read(place, part.bytes)
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise DamagedError(f"{remote.url}/{place} is damaged: its checksum differs")
        return content

    with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="parts") as pool:
        for first in range(0, len(parts), PARTS_AT_ONCE):
            last = min(first + PARTS_AT_ONCE, len(parts))
            yield from pool.map(read, range(first, last))


def remove_old_logs(
    remote: WritableFolder, step: int, kept: list[int], unlisted: frozenset[str]
) -> frozenset[str]:
    """Take away the lists of checkpoints that are gone, and parts that no list names any more.

    Args:
        remote: the mirror.
        step: the newest of this run; lists of later ones stay.
        kept: checkpoints that are there.
        unlisted: parts that no list named when this was called before.

    Returns:
        Parts that no list names now. A machine may be about to list them, so they stay until the
        next time. Where a list is damaged, no part goes.

    Raises:
        RemoteError: if the store does not serve.
    """
    sizes = remote.tree()
    found = [LIST_PATTERN.fullmatch(name) for name in sizes]
    lists = {match[0]: step_in(match[1]) or 0 for match in found if match}
    gone = [name for name, of in lists.items() if of <= step and of not in kept]
    remote.delete(gone)
    named: set[str] = set()
    for name in lists.keys() - set(gone):
        try:
            logs = parse_list(remote.read(name, LIST_LIMIT_BYTES), f"{remote.url}/{name}")
        except DamagedError:
            return frozenset()
        named |= {
            part.place(log, number)
            for log, parts in logs.items()
            for number, part in enumerate(parts)
        }
    loose = frozenset(name for name in sizes if PART_PATTERN.fullmatch(name)) - named
    remote.delete(sorted(loose & unlisted))
    return loose - unlisted
