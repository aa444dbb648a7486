"""One shard's worth of packing: the unit of work, of parallelism and of retry.

Which picture goes into which shard is decided from the list alone, before any is read, so the
bytes do not depend on the number of processes.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.shard_format import Sample, ShardInfo, index_name, write_shard
from pipeline.sources import SourcePicture
from pipeline.validate import Limits, RefusedError, StoredForm, accept_picture, check_bytes
from pipeline.worker_pool import advance


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its tar, the pictures meant for it, what is too much, how to store them."""

    path: Path
    pictures: list[SourcePicture]
    limits: Limits
    form: StoredForm


@dataclass
class ShardResult:
    """What became of a job. ``info`` is None where no picture could be used."""

    info: ShardInfo | None = None
    bytes_read: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)  # relative path, reason
    changed: list[tuple[str, str]] = field(default_factory=list)  # relative path, what changed
    class_counts: dict[int, int] = field(default_factory=dict)


def plan_shards(
    pictures: list[SourcePicture], folder: Path, shard_bytes: int, shard_samples: int
) -> list[tuple[Path, list[SourcePicture]]]:
    """Cut the list into shards of at most so many bytes or pictures, whichever comes first."""
    groups: list[list[SourcePicture]] = [[]]
    size = 0
    for picture in pictures:
        try:
            picture_bytes = picture.path.stat().st_size
        except OSError:  # gone or unreadable: refused with its reason when its shard is written
            picture_bytes = 0
        full = size + picture_bytes > shard_bytes or len(groups[-1]) >= shard_samples
        if full and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append(picture)
        size += picture_bytes
    return [(folder / f"shard-{number:06d}.tar", group) for number, group in enumerate(groups)]


def pack_shard(job: ShardJob) -> ShardResult:
    """Validate the pictures of one shard and write it.

    Raises:
        OSError: if the shard cannot be written; nothing of it is left then.
    """
    result = ShardResult()
    try:
        result.info = write_shard(job.path, _samples(job, result))
    except BaseException:
        for name in (job.path.name, index_name(job.path.name)):
            with contextlib.suppress(OSError):
                job.path.with_name(name).unlink(missing_ok=True)
        raise
    return result


def read_picture(path: Path, limits: Limits) -> bytes:
    """The bytes of a file; none are read of one that is too large.

    Raises:
        OSError: if it cannot be read.
        RefusedError: if it is too large.
    """
    with path.open("rb") as file:
        check_bytes(os.fstat(file.fileno()).st_size, limits)
        return file.read()


def _samples(job: ShardJob, result: ShardResult) -> Iterator[Sample]:
    for picture in job.pictures:
        try:
            data = read_picture(picture.path, job.limits)
            accepted = accept_picture(data, job.limits, job.form)
        except OSError as error:
            result.refused.append((picture.relative, f"cannot be read: {error.strerror}"))
        except RefusedError as error:
            result.refused.append((picture.relative, str(error)))
        else:
            result.bytes_read += len(data)
            if accepted.change:
                result.changed.append((picture.relative, accepted.change))
            counts = result.class_counts
            counts[picture.label] = counts.get(picture.label, 0) + 1
            yield Sample(
                key=picture.key,
                picture=accepted.picture,
                width=accepted.width,
                height=accepted.height,
                label=picture.label,
            )
        advance(1)
