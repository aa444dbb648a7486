"""What other software needs of a set: DALI's text index of each tar, and pictures as files."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.integer_hash import hash_of
from pipeline.location import tars_location
from pipeline.program import InputError
from pipeline.shard_format import (
    BLOCK_BYTES,
    FLAG_DROPPED,
    atomic_file,
    index_name,
    read_index,
    read_manifest,
)
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.tar_members import TarMembers, split_name

DALI_VERSION = "v1.2"


def export_indexes(folder: Path, output: Path) -> Iterator[Path]:
    """Write ``NAME.idx`` for each tar, as DALI's ``wds2idx`` does, without dropped samples.

    Raises:
        InputError: if there is no set whose tars are local.
    """
    manifest = read_manifest(folder)
    tars = tars_location(folder, manifest.tars)
    if not isinstance(tars, Path):
        raise InputError(f"{folder}: its tars are at {tars}; only local ones can be read")
    output.mkdir(parents=True, exist_ok=True)
    for info in manifest.shards:
        records = read_index(folder / index_name(info.name))
        dropped = records["block"][records["flags"] & FLAG_DROPPED > 0].astype(int) * BLOCK_BYTES
        path = output / f"{Path(info.name).stem}.idx"
        with atomic_file(path) as file:
            file.write(_dali_index(tars / info.name, set(dropped.tolist())))
        yield path


def _dali_index(tar: Path, dropped: set[int]) -> bytes:
    samples: list[list[str]] = []
    last_key, skipped = "", False
    with tar.open("rb") as file:
        for member in TarMembers(file, tar.stat().st_size, str(tar)):
            key, suffix = split_name(member.name) or ("", "")
            if not key or member.reason:
                continue
            if key != last_key:
                last_key, skipped = key, member.start in dropped
                if not skipped:
                    samples.append([])
            if not skipped:
                samples[-1].append(f"{suffix} {member.start} {member.size} {member.name}")
    lines = [f"{DALI_VERSION} {len(samples)}", *(" ".join(sample) for sample in samples)]
    return ("\n".join(lines) + "\n").encode()


def write_samples(store: ShardStore, output: Path, count: int, seed: int) -> tuple[int, int]:
    """Write some pictures as files, chosen by the seed; a sound one for each that is not.

    Returns:
        How many were written, and how many were passed over because they cannot be used.
    """
    output.mkdir(parents=True, exist_ok=True)
    firsts = np.concatenate([[0], np.cumsum(store.shard_samples)])
    order = hash_of(seed, np.arange(int(firsts[-1]), dtype=np.uint64)).argsort(kind="stable")
    written = bad = 0
    for place in order.tolist():
        if written == count:
            break
        shard = int(np.searchsorted(firsts, place, "right")) - 1
        index = place - int(firsts[shard])
        try:
            data = store.picture(shard, index).tobytes()
        except BadSampleError:
            bad += 1
            continue
        name = re.sub(r"[^A-Za-z0-9_-]", "__", store.key(shard, index)) or f"{shard}-{index}"
        (output / f"{name}.jpg").write_bytes(data)
        written += 1
    return written, bad
