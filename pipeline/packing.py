"""One shard's worth of packing: the unit of work, of parallelism and of retry.

Which picture goes into which shard is arithmetic on the number of entries and the seed, done
before any picture is read, so the bytes do not depend on the number of processes.
"""

import contextlib
import fcntl
import json
import math
import os
import stat
import struct
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.entry_list import WHOLE_FILE, Entry, EntryList
from pipeline.picture_header import BadHeaderError, read_header
from pipeline.shard_format import NO_LABEL, Sample, write_shard
from pipeline.torchvision_source import SCHEME, picture_of
from pipeline.unfinished import (
    WORK_NAME,
    ShardResult,
    blamed_path,
    in_hand_path,
    remove_shard,
    shard_name,
    write_result,
)
from pipeline.validate import Limits, RefusedError, StoredForm, accept_picture, check_bytes
from pipeline.worker_pool import advance

# Pictures done before it, process, since when (of the monotonic clock, which all processes share).
IN_HAND = struct.Struct("<QQd")
LARGE_PIXELS = 25_000_000
SIDE_CAR_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the bytes of all shards depend on."""

    output: Path
    list_folder: Path
    count: int
    """Entries in the list."""
    shards: int
    seed: int
    classes: tuple[str, ...]
    limits: Limits
    form: StoredForm
    url: str = ""
    """Where shards are brought when they are made, "" if they stay in ``output``."""
    agreed: dict[str, Any] = field(default_factory=dict)
    """What the next run compares its own plan with."""

    def places_of(self, number: int) -> tuple[int, int]:
        """The first place of a shard in the shuffled order, and the first of the next."""
        return number * self.count // self.shards, (number + 1) * self.count // self.shards


@dataclass(frozen=True)
class ShardJob:
    """A shard to write."""

    plan: Plan
    number: int
    entries: tuple[tuple[str, Entry], ...] | None = None
    """Its pictures with their keys, for a machine that has not the list."""


def with_entries(job: ShardJob) -> ShardJob:
    """The job with its part of the list."""
    return replace(job, entries=tuple(_entries_of(job)))


def _entries_of(job: ShardJob) -> Generator[tuple[str, Entry], None, None]:
    if job.entries is not None:
        yield from job.entries
        return
    entries = EntryList(job.plan.list_folder, job.plan.count, job.plan.seed)
    try:
        yield from entries.read(*job.plan.places_of(job.number))
    finally:
        entries.close()


def shards_needed(total_bytes: int, count: int, shard_bytes: int, shard_samples: int) -> int:
    """How many shards of equal numbers of pictures keep to both sizes, on average for the bytes."""
    return min(count, max(1, -(-total_bytes // shard_bytes), -(-count // shard_samples)))


def pack_shard(job: ShardJob) -> ShardResult:
    """Validate the pictures of one shard, write it and note that it is done.

    Raises:
        OSError: if the shard cannot be written; nothing of it is left then.
    """
    plan, result = job.plan, ShardResult(place=job.plan.url)
    (plan.output / WORK_NAME).mkdir(parents=True, exist_ok=True)  # on another machine's disk
    try:
        result.info = write_shard(plan.output / shard_name(job.number), _samples(job, result))
        if plan.url:
            # Here, because the clients of object stores take a worker 0.15 s to import.
            from pipeline.packed_store import bring

            bring(plan.output, plan.url, job.number, result, plan.agreed)
        write_result(plan.output, job.number, result)
    except BaseException:
        remove_shard(plan.output, job.number)
        raise
    return result


def read_blamed(output: Path, number: int) -> dict[int, str]:
    """Pictures of a shard that crashed a decoder or took too long, and which of these."""
    try:
        content = json.loads(blamed_path(output, number).read_bytes())
    except OSError:
        return {}
    return {int(count): reason for count, reason in content.items()}


class _InHand:
    """The note of a worker, for the program that watches it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)

    def note(self, pictures: int, since_s: float) -> None:
        os.pwrite(self._handle, IN_HAND.pack(pictures, os.getpid(), since_s), 0)

    def close(self) -> None:
        os.close(self._handle)
        self._path.unlink(missing_ok=True)


def _samples(job: ShardJob, result: ShardResult) -> Iterator[Sample]:
    plan = job.plan
    labels = {name: label for label, name in enumerate(plan.classes)}
    blamed = read_blamed(plan.output, job.number)
    entries = _entries_of(job)
    in_hand = _InHand(in_hand_path(plan.output, job.number))
    try:
        for key, entry in entries:
            in_hand.note(result.pictures, time.monotonic())
            try:
                if result.pictures in blamed:
                    raise RefusedError(blamed[result.pictures])
                data, label = read_picture(entry, plan.limits)
                with _alone_if_large(data, plan.output, in_hand, result.pictures):
                    accepted = accept_picture(data, plan.limits, plan.form)
            except OSError as error:
                result.refused.append((entry.name, f"cannot be read: {error.strerror}"))
            except RefusedError as error:
                result.refused.append((entry.name, str(error)))
            else:
                metadata, change = read_metadata(entry)
                change = "; ".join(filter(None, (accepted.change, change)))
                if change:
                    result.changed.append((entry.name, change))
                yield Sample(
                    key=key,
                    picture=accepted.picture,
                    width=accepted.width,
                    height=accepted.height,
                    label=_number_of(label, labels),
                    metadata=metadata,
                )
            result.pictures += 1
            advance(1)
    finally:
        entries.close()
        in_hand.close()


@contextmanager
def _alone_if_large(data: bytes, output: Path, in_hand: _InHand, pictures: int) -> Iterator[None]:
    """One large picture at a time on this machine: decoded it takes up to 8 bytes a pixel."""
    try:
        header = read_header(data)
        is_large = header.width * header.height > LARGE_PIXELS
    except BadHeaderError:
        is_large = len(data) > LARGE_PIXELS // 8  # of a format that Pillow alone knows
    if not is_large:
        yield
        return
    with (output / WORK_NAME / "large").open("w") as file:
        in_hand.note(pictures, math.inf)  # while it waits it does not take long
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        in_hand.note(pictures, time.monotonic())
        yield


def _number_of(label: str | int | None, labels: dict[str, int]) -> int:
    if isinstance(label, str):
        return labels.get(label, NO_LABEL)
    return NO_LABEL if label is None else label


def read_picture(entry: Entry, limits: Limits) -> tuple[bytes, str | int | None]:
    """The bytes of an entry and its label; none are read of one that is too large.

    Raises:
        OSError: if it cannot be read.
        RefusedError: if it is too large, or is cut off in the file that holds it.
    """
    if entry.path.startswith(SCHEME):
        try:
            return picture_of(entry.path, entry.offset)
        except Exception as error:  # a data set may raise anything for a picture
            raise RefusedError(f"cannot be read: {error or type(error).__name__}") from error
    if "://" not in entry.path:
        return _file_bytes(entry, limits), entry.label
    # Here, because the clients of object stores take a worker 0.15 s to import.
    from pipeline.url_pictures import fetch

    data = fetch(entry.path)
    check_bytes(len(data), limits)
    return data, entry.label


def _file_bytes(entry: Entry, limits: Limits) -> bytes:
    handle = os.open(entry.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for a writer
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError("not a file")
        whole = entry.offset == WHOLE_FILE
        size = status.st_size if whole else entry.size_bytes
        check_bytes(size, limits)
        start = 0 if whole else entry.offset
        data = os.pread(handle, size, start)
        while len(data) < size and (more := os.pread(handle, size - len(data), start + len(data))):
            data += more
    finally:
        os.close(handle)
    if len(data) < size:
        raise RefusedError(f"truncated: {len(data)} of {size} bytes in {entry.path}")
    return data


def read_metadata(entry: Entry) -> tuple[dict[str, Any] | None, str]:
    """The metadata of an entry, and what is wrong with the file that should hold it, or ""."""
    if not isinstance(entry.metadata, str):
        return entry.metadata, ""
    path = Path(entry.metadata)
    try:
        if path.stat().st_size > SIDE_CAR_LIMIT_BYTES:
            return None, f"without its metadata: {path.name} has more than 1 MiB"
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return None, f"without its metadata: {path.name}: {error}"
    if not isinstance(content, dict):
        return None, f"without its metadata: {path.name} holds no object"
    return content, ""
