"""An index for a set of foreign tars: which tars, what is known of them, classes, manifest.

``indexed.jsonl`` gets a line when a tar is done, so a run that ends early loses only what it was
doing. It is also how a later run knows which tars are still the same.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.foreign_shards import (
    LABEL_LIMIT,
    IndexedShard,
    IndexJob,
    IndexRules,
    numbers_of,
    sha256_of,
)
from pipeline.found_tars import FoundTar
from pipeline.program import InputError
from pipeline.shard_format import (
    MANIFEST_NAME,
    NO_LABEL,
    Manifest,
    ShardInfo,
    atomic_file,
    index_bytes,
    index_name,
    read_index,
    read_manifest,
    write_manifest,
)

JOURNAL_NAME = "indexed.jsonl"
UNUSUAL_NAME = "unusual.jsonl"
PROGRAM = "check_shards index"


@contextmanager
def being_indexed(output: Path) -> Iterator[Path]:
    """Keep other runs out of a folder; gives its journal.

    Raises:
        InputError: if another run is at it, or it holds a set that make_shards packed.
    """
    if (output / MANIFEST_NAME).exists():
        made_by = read_manifest(output).made_by.get("program")
        if made_by != PROGRAM:
            raise InputError(
                f"{output} already holds a finished set, made by {made_by}, with its own index: "
                "use it as it is, or give another folder with --output"
            )
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    journal = output / JOURNAL_NAME
    handle = os.open(output, os.O_RDONLY)
    try:
        _lock(handle, output)
        journal.touch()
        yield journal
    finally:
        with suppress(OSError):  # of a run that came to nothing, nothing is left
            if not journal.stat().st_size:
                journal.unlink()
                for folder in made:
                    folder.rmdir()
        os.close(handle)


def _lock(handle: int, output: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{output} is being indexed by another run: wait for its end") from None
    except OSError:  # some network mounts lock no folders
        return


def read_journal(journal: Path) -> dict[str, IndexedShard]:
    """What earlier runs found out, by the name of the tar; the last line of a name counts."""
    known = {}
    with journal.open("rb") as file:
        for line in file:
            try:
                shard = _from_plain(json.loads(line))
            except (ValueError, KeyError, TypeError):  # cut off by a kill, or of another version
                continue
            known[shard.info.name] = shard
    return known


def add_line(journal: Path, shard: IndexedShard) -> None:
    """Take note that a tar is done."""
    with journal.open("ab") as file:
        file.write(b"\n" + _line(shard))  # the line before may have been cut off by a kill


def _line(shard: IndexedShard) -> bytes:
    return json.dumps(asdict(shard)).encode() + b"\n"


def _from_plain(plain: dict[str, Any]) -> IndexedShard:
    info, rules = ShardInfo(**plain.pop("info")), IndexRules(**plain.pop("rules"))
    classes = plain.pop("classes")
    if classes is not None:
        classes = {int(number): name for number, name in classes.items()}
    unusual = [(name, reason, is_sample) for name, reason, is_sample in plain.pop("unusual")]
    return IndexedShard(info=info, rules=rules, classes=classes, unusual=unusual, **plain)


@dataclass(frozen=True)
class Plan:
    """What is to be done: tars that are known and unchanged, and a job for each other one."""

    kept: list[IndexedShard]
    jobs: list[IndexJob]


def plan_jobs(
    tars: list[FoundTar], output: Path, rules: IndexRules, known: dict[str, IndexedShard]
) -> Plan:
    """Decide which tars have to be read."""
    kept, jobs = [], []
    for tar in tars:
        earlier = known.get(tar.name)
        if earlier is not None and not _is_whole(earlier, output, rules, tar.size):
            earlier = None
        if earlier is not None and earlier.version == tar.version:
            kept.append(earlier)
        else:
            jobs.append(IndexJob(tar=tar, output=output, rules=rules, known=earlier))
    return Plan(kept, jobs)


def _is_whole(shard: IndexedShard, output: Path, rules: IndexRules, size: int) -> bool:
    if shard.rules != rules or shard.info.bytes != size:
        return False
    index = output / index_name(shard.info.name)
    if shard.info.samples == 0:
        return not index.exists()
    return index.is_file() and sha256_of(index) == shard.info.index_sha256


def agree_on_classes(shards: list[IndexedShard], output: Path) -> tuple[str, ...]:
    """Give each class the same number in every index; rewrites those that have another one.

    Returns:
        The names of the classes, in the order of their numbers.
    """
    if all(shard.classes is None for shard in shards):
        top = max((shard.top_label for shard in shards), default=NO_LABEL)
        return tuple(str(number) for number in range(top + 1))
    named = {shard.info.name: _named_classes(shard, output) for shard in shards}
    number_of = numbers_of({name for classes in named.values() for name in classes.values()})
    if len(number_of) > LABEL_LIMIT:
        raise InputError(
            f"{len(number_of):,} different labels, at most {LABEL_LIMIT:,} can be classes: choose "
            "another --label-key"
        )
    for shard in shards:
        classes = named[shard.info.name]
        new = {number_of[name]: name for name in classes.values()}
        if new != classes:
            _renumber(shard, output, {old: number_of[name] for old, name in classes.items()})
        shard.classes, shard.top_label = new, max(new, default=NO_LABEL)
    names = sorted(number_of, key=lambda name: number_of[name])
    if names and number_of[names[-1]] != len(names) - 1:  # numbers with gaps
        return tuple(str(number) for number in range(number_of[names[-1]] + 1))
    return tuple(names)


def _named_classes(shard: IndexedShard, output: Path) -> dict[int, str]:
    if shard.classes is not None:
        return shard.classes
    if shard.labelled == 0:
        return {}
    labels = np.unique(read_index(output / index_name(shard.info.name))["label"])
    return {int(label): str(label) for label in labels if label != NO_LABEL}


def _renumber(shard: IndexedShard, output: Path, numbers: dict[int, int]) -> None:
    # A set whose labels are about to change is no finished set.
    (output / MANIFEST_NAME).unlink(missing_ok=True)
    path = output / index_name(shard.info.name)
    records = read_index(path).copy()
    old = np.array(sorted(numbers), dtype=np.int64)
    new = np.array([numbers[number] for number in old.tolist()], dtype=np.int64)
    has_label = records["label"] != NO_LABEL
    records["label"][has_label] = new[np.searchsorted(old, records["label"][has_label])]
    data = index_bytes(records)
    with atomic_file(path) as file:
        file.write(data)
    shard.info = replace(shard.info, index_sha256=sha256_of(path))


def write_set(
    shards: list[IndexedShard],
    others: Iterable[IndexedShard],
    tars: Path | str,
    output: Path,
    rules: IndexRules,
) -> Manifest:
    """Write what describes the set, the manifest last.

    Args:
        shards: of the set, in its order.
        others: that the journal knows from earlier runs.
        tars: folder in which they lie.
        output: of the indexes.
        rules: they were made by.

    Raises:
        InputError: if no shard has a usable picture.
    """
    with_pictures = [shard for shard in shards if shard.info.samples]
    if not any(shard.formats.keys() - {"unknown"} for shard in with_pictures):
        unusual = [f"{f[0]!a} in {s.info.name}: {f[1]}" for s in shards for f in s.unusual]
        first = f"; the first of {len(unusual)} findings: {unusual[0]}" if unusual else ""
        raise InputError(
            f"no usable picture in {len(shards)} tars of {tars}{first}: give WebDataset tars with "
            "jpg, png or webp members"
        )
    classes = agree_on_classes(with_pictures, output)
    _write_unusual(shards, output / UNUSUAL_NAME)
    with atomic_file(output / JOURNAL_NAME) as file:
        for shard in (*others, *shards):
            file.write(_line(shard))
    return write_manifest(
        output,
        [shard.info for shard in with_pictures],
        classes,
        {"program": PROGRAM, **asdict(rules)},
        tars="" if tars == output.absolute() else str(tars),
    )


def _write_unusual(shards: list[IndexedShard], path: Path) -> None:
    if not any(shard.unusual for shard in shards):
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as file:
        for shard in shards:
            for member, reason, is_sample in shard.unusual:
                row = {"shard": shard.info.name, "member": member, "reason": reason}
                file.write(json.dumps(row | {"sample": is_sample}).encode() + b"\n")
