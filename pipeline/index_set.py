"""An index for a set of foreign tars: which tars, what is known of them, classes, manifest.

``indexed.jsonl`` gets a line when a tar is done, so a run that ends early loses only what it was
doing. It is also how a later run knows which tars are still the same.
"""

import fcntl
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import UnbalancedBracesError, braceexpand

from pipeline.foreign_shards import (
    LABEL_LIMIT,
    IndexedShard,
    IndexJob,
    IndexRules,
    numbers_of,
    sha256_of,
)
from pipeline.location import as_location
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
TARS_LIMIT = 1_000_000  # that braces may stand for
NUMBER_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")


def find_tars(places: Iterable[str]) -> list[Path]:
    """The tars that a command line names, in its order.

    Args:
        places: tars, folders (their ``*.tar``, by name), either with ``{000..123}`` or ``{a,b}``.

    Raises:
        InputError: if there is none, or two cannot be told apart by their names.
    """
    named = [one for place in places for one in _expanded(place)]
    tars = [tar for place in named for tar in _tars_of(place)]
    if not tars:
        raise InputError("no tars: give WebDataset tars or a folder of them")
    by_index: dict[str, Path] = {}
    for tar in tars:
        other = by_index.setdefault(index_name(tar.name), tar)
        if other is not tar:
            what = "is given twice" if other == tar else f"and {other} have the same name"
            raise InputError(f"{tar} {what}: each tar of a set needs a name of its own")
    folders = {tar.parent for tar in tars}
    if len(folders) > 1:
        first, second = sorted(map(str, folders))[:2]
        raise InputError(
            f"the tars lie in {len(folders)} folders ({first}, {second}): index each folder by "
            "itself, or link the tars into one"
        )
    return tars


def _expanded(place: str) -> list[str]:
    if "{" not in place or Path(place).exists():
        return [place]
    # Looked at before: braceexpand makes every name of a range before it gives the first.
    ranges = (abs(int(last) - int(first)) + 1 for first, last in NUMBER_RANGE.findall(place))
    if math.prod(ranges) > TARS_LIMIT:
        raise InputError(f"{place} stands for more than {TARS_LIMIT:,} tars: give fewer")
    try:
        return list(braceexpand(place))
    except UnbalancedBracesError as error:
        raise InputError(f"{place}: a brace is not closed; write {{000..123}}") from error


def _tars_of(name: str) -> list[Path]:
    place = as_location(name)
    if isinstance(place, str):
        raise InputError(
            f"{name} is behind a URL, and a tar is read whole to be indexed: fetch the tars, index "
            "them here, and upload indexes and manifest beside them"
        )
    if place.is_dir():
        tars = sorted(path.absolute() for path in place.glob("*.tar") if path.is_file())
        if not tars:
            raise InputError(f"{place} holds no *.tar: give the folder in which the tars lie")
        return tars
    if not place.is_file():
        raise InputError(f"{place} does not exist: check the path")
    return [place.absolute()]


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
    tars: list[Path], output: Path, rules: IndexRules, known: dict[str, IndexedShard]
) -> Plan:
    """Decide which tars have to be read."""
    kept, jobs = [], []
    for tar in tars:
        status = tar.stat()
        version = str(status.st_mtime_ns)
        earlier = known.get(tar.name)
        if earlier is not None and not _is_whole(earlier, output, rules, status.st_size):
            earlier = None
        if earlier is not None and earlier.version == version:
            kept.append(earlier)
        else:
            jobs.append(
                IndexJob(tar=tar, output=output, rules=rules, version=version, known=earlier)
            )
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
    tars: Path,
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
