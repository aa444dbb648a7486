"""Leave pictures out of a finished set for good, by their keys.

A reader of this project passes over what the index calls dropped. ``erase`` also overwrites the
bytes in the tar, which keeps its size, so that every other place stays true: the picture with
zeros, its metadata with an empty object. The manifest follows, so the set becomes another one.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pipeline.foreign_shards import sha256_of
from pipeline.location import tars_location
from pipeline.program import InputError
from pipeline.shard_format import (
    BLOCK_BYTES,
    FLAG_DROPPED,
    MANIFEST_NAME,
    ShardInfo,
    atomic_file,
    index_bytes,
    index_name,
    read_index,
    read_manifest,
    rewrite_shards,
)
from pipeline.shard_store import ShardStore
from pipeline.worker_pool import advance


@dataclass(frozen=True)
class FindJob:
    """A shard in which keys are looked for."""

    folder: Path
    number: int
    keys: frozenset[str]


@dataclass(frozen=True)
class FoundKeys:
    """Which samples of a shard have them."""

    number: int
    keys: dict[str, int]


def find_jobs(folder: Path, keys: frozenset[str]) -> list[FindJob]:
    """One job for each shard.

    Raises:
        InputError: if there is no set whose tars are local.
    """
    manifest = read_manifest(folder)
    if not isinstance(tars_location(folder, manifest.tars), Path):
        raise InputError(f"{folder}: its tars are at {manifest.tars}, so they cannot be changed")
    return [FindJob(folder, number, keys) for number in range(len(manifest.shards))]


def find_keys(job: FindJob) -> FoundKeys:
    """Read the key of every sample of a shard."""
    store = ShardStore(job.folder)
    found = {}
    for index in range(store.manifest.shards[job.number].samples):
        key = store.key(job.number, index)
        if key in job.keys:
            found[key] = index
    advance(store.manifest.shards[job.number].bytes)
    return FoundKeys(job.number, found)


def drop(folder: Path, found: list[FoundKeys], *, erase: bool) -> None:
    """Mark samples as dropped. Killed on the way, the same command finishes it.

    Args:
        folder: of the set.
        found: where the keys are.
        erase: also overwrite their bytes.
    """
    manifest = read_manifest(folder)
    tars = tars_location(folder, manifest.tars)
    assert isinstance(tars, Path)
    shards = list(manifest.shards)
    for shard in found:
        if shard.keys:
            indexes = sorted(shard.keys.values())
            shards[shard.number] = _mark(folder, shards[shard.number], indexes)
    rewrite_shards(folder / MANIFEST_NAME, shards)
    if not erase:
        return
    for shard in found:
        if shard.keys:
            info = shards[shard.number]
            _erase(folder, tars / info.name, sorted(shard.keys.values()))
            shards[shard.number] = replace(info, sha256=sha256_of(tars / info.name))
    rewrite_shards(folder / MANIFEST_NAME, shards)


def _mark(folder: Path, info: ShardInfo, indexes: list[int]) -> ShardInfo:
    path = folder / index_name(info.name)
    records = np.array(read_index(path))
    records["flags"][indexes] |= FLAG_DROPPED
    data = index_bytes(records)
    with atomic_file(path) as file:
        file.write(data)
    return replace(info, index_sha256=hashlib.sha256(data).hexdigest())


def _erase(folder: Path, tar: Path, indexes: list[int]) -> None:
    records = read_index(folder / index_name(tar.name))
    handle = os.open(tar, os.O_RDWR)
    try:
        for record in records[indexes]:
            start = int(record["block"]) * BLOCK_BYTES
            for place, size, is_json in _members_from(handle, start - BLOCK_BYTES):
                content = b"{}".ljust(size) if is_json and size >= 2 else bytes(size)
                os.pwrite(handle, content, place)
        os.fsync(handle)
    finally:
        os.close(handle)


def _members_from(handle: int, place: int) -> Iterator[tuple[int, int, bool]]:
    """Data of the picture whose header is at ``place``, and of the metadata that follows it."""
    key = ""
    while True:
        try:
            member = tarfile.TarInfo.frombuf(
                os.pread(handle, BLOCK_BYTES, place), "utf-8", "replace"
            )
        except tarfile.HeaderError:
            return
        stem, _, suffix = member.name.rpartition(".")
        if key and stem != key:
            return
        if not key or suffix == "json":
            yield place + BLOCK_BYTES, member.size, suffix == "json"
        key = stem
        place += BLOCK_BYTES + member.size + -member.size % BLOCK_BYTES


def read_keys(words: tuple[str, ...], lists: tuple[Path, ...]) -> frozenset[str]:
    """Keys from the command line and from files with one a line (or JSON lines with ``key``).

    Raises:
        InputError: if there are none, or a file cannot be read.
    """
    keys = set(words)
    for path in lists:
        if not path.is_file():
            raise InputError(f"--keys {path}: no such file")
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                try:
                    keys.add(str(json.loads(line)["key"]))
                except (ValueError, KeyError) as error:
                    raise InputError(f"{path} has a line without a key: {line[:80]}") from error
            elif line.strip():
                keys.add(line.strip())
    if not keys:
        raise InputError("no keys: name them, or give a file of them with --keys")
    return frozenset(keys)
