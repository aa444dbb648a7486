"""Is a set of shards still what its manifest says? Byte for byte, and if not, which pictures."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline.foreign_shards import sha256_of
from pipeline.integer_hash import hash_of, uniform
from pipeline.location import tars_location
from pipeline.program import InputError
from pipeline.shard_format import FLAG_DROPPED, ShardInfo, index_name, read_manifest
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.validate import Limits, RefusedError, decode_grey

FULL_SIZE = 1 << 20  # no decoder leaves anything out for a picture of so many pixels a side
FAULTS_OF_A_SHARD = 20  # named one by one


class ShardCheck(NamedTuple):
    """A shard to be compared with its line of the manifest."""

    folder: Path
    tars: Path
    number: int
    info: ShardInfo
    decode: float
    """The share of its pictures that are decoded as well."""


class Fault(NamedTuple):
    """What is wrong with a shard."""

    shard: str
    what: str


def check_jobs(folder: Path, decode: float = 0.0) -> list[ShardCheck]:
    """One check for each shard of a local set.

    Raises:
        InputError: if there is no set, or its tars are behind a URL.
    """
    manifest = read_manifest(folder)
    tars = tars_location(folder, manifest.tars)
    if not isinstance(tars, Path):
        raise InputError(f"{folder}: its tars are at {tars}; only local ones can be verified")
    return [ShardCheck(folder, tars, n, info, decode) for n, info in enumerate(manifest.shards)]


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
            return faults + (_bad_pictures(check) if check.decode else [])
        else:
            faults.append(Fault(info.name, "its sha256 is not that of the manifest"))
    except OSError as error:
        return [*faults, Fault(info.name, f"cannot be read: {error.strerror}")]
    return faults + _bad_pictures(check)


def _bad_pictures(check: ShardCheck) -> list[Fault]:
    store = ShardStore(check.folder)
    bad = []
    drawn = hash_of(check.number, np.arange(check.info.samples, dtype=np.uint64))
    for index, chance in enumerate(uniform(drawn).tolist()):
        try:
            if store.records(check.number)[index]["flags"] & FLAG_DROPPED:
                continue
            picture = store.picture(check.number, index)
            if chance < check.decode:
                decode_grey(picture.tobytes(), Limits(), FULL_SIZE)
        except (BadSampleError, RefusedError) as error:
            key = store.key(check.number, index)
            bad.append(Fault(check.info.name, f"picture {index} {key}: {error}"))
    rest = len(bad) - FAULTS_OF_A_SHARD
    more = [Fault(check.info.name, f"and {rest} more pictures")] if rest > 0 else []
    return bad[:FAULTS_OF_A_SHARD] + more
