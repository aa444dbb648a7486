"""Pack pictures into tar shards with an index and a manifest.

    python pipeline/make_shards.py SOURCE OUTPUT

SOURCE is a folder ``class/picture`` or a flat one, ImageNet's tars as they are downloaded,
WebDataset shards, a table, a list or a data set of torchvision. Every picture is decoded once; what
is broken is left out and listed in OUTPUT/refused.jsonl with its reason. The same pictures give the
same bytes, whatever the number of processes. The same command goes on with a packing that was
stopped. OUTPUT is a folder, or s3://BUCKET/FOLDER or gs://..., to which each shard is uploaded.
"""

import shutil
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from pipeline.command_line import parse_flags
from pipeline.crash_guard import CrashGuard
from pipeline.curation import (
    DUPLICATES_NAME,
    print_jobs,
    read_prints,
    take_prints,
    write_duplicates,
)
from pipeline.entry_list import ListInfo, write_list
from pipeline.pack_config import OtherPartsError, PackConfig
from pipeline.pack_report import (
    CHANGED_NAME,
    IGNORED_NAME,
    REFUSED_NAME,
    report,
    too_many_refused,
    write_rows,
)
from pipeline.packing import Plan, ShardJob, pack_shard, shards_needed, with_entries
from pipeline.picture_bar import Bar, run_with_bar
from pipeline.program import InputError, run_program
from pipeline.shard_format import MANIFEST_NAME, Manifest, atomic_file, write_manifest
from pipeline.source_kinds import open_source
from pipeline.sources import Source, SourceConfig
from pipeline.unfinished import (
    WORK_NAME,
    ShardResult,
    being_filled,
    finish,
    forget_finished,
    read_result,
    refuse_foreign,
    take_up,
    write_result,
)
from pipeline.validate import Limits
from pipeline.worker_pool import warm_up

if TYPE_CHECKING:
    from pipeline.packed_store import PackedStore

LARGEST_LABEL = 10_000_000


def curate(listed: ListInfo, config: PackConfig, console: Console) -> list[str]:
    """Find the pictures that are there twice, if that is asked for.

    Returns:
        The digests of the other sources' lists.

    Raises:
        OtherPartsError: if this is a part, and others have not looked at their pictures yet.
    """
    curation = config.curation
    if curation.duplicates == "keep":
        return []
    lists = []
    for number, other in enumerate(curation.against):
        folder = listed.folder / f"against{number}"
        folder.mkdir()
        source = open_source(other, SourceConfig())
        lists.append(list_source(source, folder, other, config.limits))
    lists.append(listed)
    look, folder = curation.near_duplicates >= 0, config.folder / WORK_NAME
    jobs = [print_jobs(some, config.limits, folder, look=look) for some in lists]
    part, parts = config.part_of()
    mine = [job for some in jobs for job in some][part::parts]
    bar = Bar(console, sum(job.last - job.first for job in mine))
    # Lists and prints are in a folder, which a cluster has only where it is the output.
    here = replace(config, ray=config.ray and not config.url)
    try:
        run_with_bar("comparing", take_prints, mine, bar, here)
    except BrokenProcessPool as error:
        raise InputError(
            "a worker was ended while it compared pictures, by one that crashes its decoder or for "
            "want of memory: pack without --duplicates, then pack the shards again with it"
        ) from error
    missing = sum(not job.path.exists() for some in jobs for job in some)
    if missing:
        raise OtherPartsError(
            f"part {config.part} has compared its pictures, {missing} stretches of other parts are "
            "missing: when those have run too, the same command packs"
        )
    prints = read_prints([job for some in jobs for job in some])
    exact, near = write_duplicates(lists, prints, curation)
    what = "duplicates left out" if curation.duplicates == "drop" else "duplicates kept"
    console.print(
        f"{exact:,} pictures with the bytes and {near:,} with the looks of others: {what}"
    )
    return [some.sha256 for some in lists[:-1]]


def pack_all(plan: Plan, numbers: list[int], config: PackConfig, console: Console) -> None:
    """Pack these shards in parallel processes, with a progress bar that counts pictures.

    Raises:
        TooManyRefusedError: as soon as it is certain.
    """
    total = plan.count
    refused: list[tuple[str, str]] = []

    def take(place: int, result: ShardResult) -> None:
        if result.place:  # else it was written where the shard is
            write_result(config.folder, numbers[place], result)
        refused.extend(result.refused)
        if len(refused) > config.max_refused * total:
            write_rows(config.folder / REFUSED_NAME, refused, "reason")
            raise too_many_refused(refused, total, config)

    guard = CrashGuard(plan, config.max_seconds)
    guard.begin()
    while numbers:
        ahead = total - sum(last - first for first, last in map(plan.places_of, numbers))
        bar = Bar(console, total, ahead, take, guard.watch, with_entries)
        jobs = [ShardJob(plan, number) for number in numbers]
        try:
            run_with_bar("packing", pack_shard, jobs, bar, config)
        except BrokenProcessPool:
            guard.settle()
        numbers = [number for number in numbers if not read_result(config.folder, number)]


def list_source(source: Source, folder: Path, name: str, limits: Limits) -> ListInfo:
    """Write down what is to be packed.

    Raises:
        InputError: if that is nothing.
    """
    listed = write_list(folder, source.entries, limits.max_bytes)
    if not listed.count:
        raise InputError(f"the source {name} {source.empty} ({listed.ignored} other files)")
    return listed


def classes_of(source: Source, listed: ListInfo, config: PackConfig) -> list[str]:
    """Names in the order of the labels; where the labels are numbers, these.

    Raises:
        InputError: if some are numbers and others are names, or a number is beyond all reason.
    """
    if source.all_or_none and listed.unlabelled:
        return []
    if source.classes is not None:
        return source.classes
    if listed.largest_label < 0:
        return listed.classes
    if listed.classes:
        raise InputError(
            f"the labels of {config.source} are numbers ({listed.largest_label}) and names "
            f"({listed.classes[0]!r}): give one or the other"
        )
    if listed.largest_label > LARGEST_LABEL:
        raise InputError(
            f"{config.source} has the label {listed.largest_label}, the limit is {LARGEST_LABEL}: "
            "name the column of the label with --label-column"
        )
    return [str(number) for number in range(listed.largest_label + 1)]


def plan_for(source: Source, listed: ListInfo, config: PackConfig) -> Plan:
    """Which classes and how many shards there will be."""
    classes = classes_of(source, listed, config)
    return Plan(
        output=config.folder,
        list_folder=listed.folder,
        count=listed.count,
        shards=shards_needed(
            listed.total_bytes, listed.count, config.shard_mib * 2**20, config.shard_samples
        ),
        seed=config.seed,
        classes=tuple(classes),
        limits=config.limits,
        form=config.form,
        url=config.url,
    )


def pack(config: PackConfig, console: Console) -> Manifest | None:
    """Pack the source of ``config``; what was finished before it was stopped is kept.

    Returns:
        The manifest, or None for a part.

    Raises:
        InputError: if the source has no usable picture or the output is taken.
        TooManyRefusedError: if more pictures were refused than allowed.
        OSError: if the output cannot be written.
    """
    started = time.monotonic()
    store = packed_store(config)
    refuse_foreign(config.folder)
    source = open_source(str(config.source), config.reading)
    if not config.ray:
        warm_up(pack_shard)  # while the source is listed
    # Scratch of a part is its own: nobody else is in it.
    part = "" if store else config.part_name()
    with being_filled(config.folder, part) as list_folder:
        listed = list_source(source, list_folder, config.source, config.limits)
        against = curate(listed, config, console)
        plan = plan_for(source, listed, config)
        agreed = {
            "lists": [listed.sha256, *against],
            "classes": plan.classes,
            "made_by": config.made_by(),
        }
        take_up(config.folder, agreed, part)
        if store:
            forget_finished(config.folder)
            store.take_up(agreed, config.part_name(), config.folder)
            plan = replace(plan, agreed=agreed)
        number, parts = config.part_of()
        mine = range(number, plan.shards, parts)
        missing = [number for number in mine if not read_result(config.folder, number)]
        if len(missing) < len(mine):
            console.print(f"{len(mine) - len(missing)} of {len(mine)} shards are finished already")
        try:
            pack_all(plan, missing, config, console)
        except BaseException:
            done = sum(1 for number in mine if read_result(config.folder, number))
            if done:
                line = f"{done} of {len(mine)} shards are finished: the same command goes on"
                console.print(line, style="yellow")
            raise
        if config.part:
            console.print(f"part {config.part}: {len(mine)} of {plan.shards} shards are finished")
            clear_scratch(config)
            return None
        return join(plan, listed, config, console, started, store)


def packed_store(config: PackConfig) -> "PackedStore | None":
    """Where shards are brought to, unless they stay in a folder; seen to be free for them.

    Raises:
        InputError: if it is not.
    """
    if not config.url:
        return None
    # Here, because the clients of object stores take 0.15 s to import.
    from pipeline.packed_store import PackedStore

    store = PackedStore(config.url)
    store.refuse_foreign()
    (config.folder / MANIFEST_NAME).unlink(missing_ok=True)  # of one killed before it was uploaded
    return store


def clear_scratch(config: PackConfig) -> None:
    """Take away the folder that shards were made in, where they did not stay."""
    if config.url:
        shutil.rmtree(config.folder)


def join(
    plan: Plan,
    listed: ListInfo,
    config: PackConfig,
    console: Console,
    started: float,
    store: "PackedStore | None",
) -> Manifest:
    """Write the lists and the manifest of shards that are all finished, and a report."""
    output = config.folder
    refused: list[tuple[str, str]] = []
    changed: list[tuple[str, str]] = []
    shards, results = [], []
    for number in range(plan.shards):
        result = read_result(output, number)
        if result is None:
            raise OSError(f"shard {number} is gone: run the same command again")
        results.append(result)
        refused += result.refused
        changed += result.changed
        shards += [result.info] if result.info else []
    write_rows(output / REFUSED_NAME, sorted(refused), "reason")
    if len(refused) > config.max_refused * plan.count or not shards:
        raise too_many_refused(refused, plan.count, config)
    write_rows(output / CHANGED_NAME, sorted(changed), "change")
    for name in (IGNORED_NAME, DUPLICATES_NAME):
        path = listed.folder / name
        if path.exists() and path.stat().st_size:
            with atomic_file(output / name) as file, path.open("rb") as found:
                shutil.copyfileobj(found, file)
    manifest = write_manifest(output, shards, plan.classes, config.made_by())
    if store:
        store.finish(output, results)
    finish(output)
    seconds = time.monotonic() - started
    console.print(report(plan, listed, manifest, refused, changed, seconds))
    clear_scratch(config)
    if refused:
        console.print(f"what was refused and why: {REFUSED_NAME} beside the shards", style="yellow")
    return manifest


def main() -> None:
    """Parse the command line and pack."""
    config = parse_flags(PackConfig, __doc__)
    console = Console()
    manifest = pack(config, console)
    if manifest:
        line = f"{config.output}: data set {manifest.sha256[:12]}, ready for train.py"
        console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_program(main)
