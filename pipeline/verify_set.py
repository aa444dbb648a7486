"""Is a set of shards still what its manifest says? Byte for byte, and if not, which pictures."""

from pathlib import Path
from typing import NamedTuple

from pipeline.foreign_shards import sha256_of
from pipeline.location import tars_location
from pipeline.program import InputError
from pipeline.shard_format import ShardInfo, index_name, read_manifest
from pipeline.shard_store import BadSampleError, ShardStore

FAULTS_OF_A_SHARD = 20  # named one by one


class ShardCheck(NamedTuple):
    """A shard to be compared with its line of the manifest."""

    folder: Path
    tars: Path
    number: int
    info: ShardInfo


class Fault(NamedTuple):
    """What is wrong with a shard."""

    shard: str
    what: str


def check_jobs(folder: Path) -> list[ShardCheck]:
    """One check for each shard of a local set.

    Raises:
        InputError: if there is no set, or its tars are behind a URL.
    """
    manifest = read_manifest(folder)
    tars = tars_location(folder, manifest.tars)
    if not isinstance(tars, Path):
        raise InputError(f"{folder}: its tars are at {tars}; only local ones can be verified")
    return [ShardCheck(folder, tars, n, info) for n, info in enumerate(manifest.shards)]


def verify_shard(check: ShardCheck) -> list[Fault]:
    """Everything that differs from the manifest."""
    info = check.info
    faults = []
    try:
        if sha256_of(check.folder / index_name(info.name)) != info.index_sha256:
            faults.append(Fault(info.name, "its index is not the one of the manifest"))
    except OSError as error:
        return [Fault(info.name, f"its index cannot be read: {error.strerror}")]
    try:
        size = (check.tars / info.name).stat().st_size
        if size != info.bytes:
            faults.append(Fault(info.name, f"{size} bytes, the manifest says {info.bytes}"))
        elif sha256_of(check.tars / info.name) == info.sha256:
            return faults
        else:
            faults.append(Fault(info.name, "its sha256 is not that of the manifest"))
    except OSError as error:
        return [*faults, Fault(info.name, f"cannot be read: {error.strerror}")]
    return faults + _bad_pictures(check)


def _bad_pictures(check: ShardCheck) -> list[Fault]:
    store = ShardStore(check.folder)
    bad = []
    for index in range(check.info.samples):
        try:
            store.picture(check.number, index)
        except BadSampleError as error:
            key = store.key(check.number, index)
            bad.append(Fault(check.info.name, f"picture {index} {key}: {error}"))
    rest = len(bad) - FAULTS_OF_A_SHARD
    more = [Fault(check.info.name, f"and {rest} more pictures")] if rest > 0 else []
    return bad[:FAULTS_OF_A_SHARD] + more
