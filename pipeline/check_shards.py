"""Look after shards: index tars that other software wrote, verify any set, see what it holds.

python pipeline/check_shards.py index SHARDS...
python pipeline/check_shards.py verify SET
python pipeline/check_shards.py stats SET
python pipeline/check_shards.py drop SET KEYS...
python pipeline/check_shards.py export-idx SET
python pipeline/check_shards.py sample SET FOLDER
python pipeline/check_shards.py upload SET s3://BUCKET/FOLDER
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.check_config import (
    Command,
    DropConfig,
    ExportIdxConfig,
    IndexConfig,
    SampleConfig,
    StatsConfig,
    UploadConfig,
    VerifyConfig,
)
from pipeline.command_line import parse_flags
from pipeline.drop_samples import FoundKeys, drop, find_jobs, find_keys, read_keys
from pipeline.export_set import export_indexes, write_samples
from pipeline.foreign_shards import IndexedShard, IndexRules, index_shard
from pipeline.found_tars import find_tars
from pipeline.index_set import (
    JOURNAL_NAME,
    UNUSUAL_NAME,
    add_line,
    being_indexed,
    plan_jobs,
    read_journal,
    write_set,
)
from pipeline.program import InputError, available_cores, run_program
from pipeline.set_stats import draw_stats, gather, rows_of
from pipeline.shard_format import Manifest, read_manifest
from pipeline.shard_store import ShardStore
from pipeline.upload_set import upload
from pipeline.verify_set import Fault, ShardCheck, check_jobs, verify_shard
from pipeline.worker_pool import Job, Result, run_jobs


def run_with_bar(
    console: Console,
    title: str,
    work: Callable[[Job], Result],
    jobs: list[Job],
    workers: int,
    total_bytes: int,
    finished: Callable[[Result], None],
) -> None:
    """Run jobs in parallel processes, with a progress bar that counts bytes."""
    if not jobs:
        return
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(title, total=total_bytes)
        run_jobs(
            work,
            jobs,
            workers or available_cores(),
            lambda _, result: finished(result),
            lambda done: progress.update(bar, completed=done),
        )
        progress.update(bar, completed=total_bytes)


def index(config: IndexConfig, console: Console) -> Manifest:
    """Index the tars of ``config``; what an earlier run did and still holds is kept.

    Raises:
        InputError: if a tar cannot be read as one, or none has a usable picture.
        OSError: if the output cannot be written.
    """
    started = time.monotonic()
    tars = find_tars(config.shards)
    folder = tars[0].folder
    output = config.output or folder
    if isinstance(output, str):
        raise InputError(
            f"{output} is behind a URL: give a local folder for the index with --output"
        )
    rules = IndexRules(decode=config.decode, label_key=config.label_key)
    with being_indexed(output) as journal:
        known = read_journal(journal)
        plan = plan_jobs(tars, output, rules, known)
        done = {shard.info.name: shard for shard in plan.kept}

        def take(shard: IndexedShard) -> None:
            done[shard.info.name] = shard
            add_line(journal, shard)

        total = sum(job.tar.size for job in plan.jobs)
        run_with_bar(console, "indexing", index_shard, plan.jobs, config.workers, total, take)
        shards = [done[tar.name] for tar in tars]
        others = [shard for name, shard in known.items() if name not in done]
        manifest = write_set(shards, others, folder, output, rules)
    seconds = time.monotonic() - started
    console.print(index_table(shards, manifest, len(plan.kept), f"{seconds:.1f} s"))
    if any(shard.unusual for shard in shards):
        line = f"each finding: {UNUSUAL_NAME} in {output}; {JOURNAL_NAME} is for the next run"
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    line = f"{output}: data set {manifest.sha256[:12]}, ready for train.py"
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
    return manifest


def index_table(shards: list[IndexedShard], manifest: Manifest, kept: int, seconds: str) -> Table:
    """What was found, and what is unusual about it."""
    table = Table(show_header=False, title="indexed", title_justify="left")
    table.add_row("pictures", f"{manifest.samples:,}")
    formats = sum((Counter(shard.formats) for shard in shards), Counter[str]())
    for name, count in formats.most_common():
        table.add_row("", f"{count:,} {name}")
    labelled = sum(shard.labelled for shard in shards)
    table.add_row("with a label", f"{labelled:,}, {len(manifest.classes):,} classes")
    table.add_row("tars", f"{len(shards):,}, {kept:,} of them unchanged since an earlier run")
    empty = [shard.info.name for shard in shards if not shard.info.samples]
    if empty:
        table.add_row("", Text(f"{len(empty):,} without a picture, left out: {empty[0]} ..."))
    table.add_row("size", f"{sum(shard.info.bytes for shard in shards) / 2**20:,.1f} MiB")
    table.add_row("time", seconds)
    for is_sample, title in ((True, "doubtful"), (False, "left out")):
        reasons = Counter(
            reason.partition(":")[0]
            for shard in shards
            for _, reason, sample in shard.unusual
            if sample == is_sample
        )
        if reasons:
            table.add_row(title, f"{sum(reasons.values()):,} members")
        for reason, count in reasons.most_common(8):
            table.add_row("", Text(f"{count:,} {reason}"))
    for shard in [shard for shard in shards if shard.ending][:8]:
        table.add_row("damaged tar", Text(f"{shard.info.name}: {shard.ending}"))
    return table


def verify(config: VerifyConfig, console: Console) -> None:
    """Compare a set with its manifest.

    Raises:
        InputError: if it differs; what and where is printed before.
    """
    checks: list[ShardCheck] = check_jobs(config.shards, config.decode)
    faults: list[Fault] = []
    total = sum(check.info.bytes for check in checks)
    run_with_bar(console, "verifying", verify_shard, checks, config.workers, total, faults.extend)
    for fault in sorted(faults):
        line = f"{fault.shard}: {fault.what}"
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise InputError(
            f"{config.shards}: {len({fault.shard for fault in faults})} of {len(checks)} shards "
            "differ from the manifest (listed above): fetch or pack these again"
        )
    samples = sum(check.info.samples for check in checks)
    console.print(f"{samples:,} pictures in {len(checks):,} shards are as the manifest says")


def stats(config: StatsConfig, console: Console) -> None:
    """Describe a set."""
    store = ShardStore(config.shards)
    found = gather(store)
    table = Table(show_header=False, title="set", title_justify="left")
    for title, text in rows_of(found, store.manifest):
        table.add_row(title, text)
    console.print(table)
    for line in found.unread:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if config.picture:
        draw_stats(found, config.picture)
        console.print(f"histograms: {config.picture}", markup=False, soft_wrap=True)
    store.close()


def drop_keys(config: DropConfig, console: Console) -> None:
    """Drop pictures by their keys.

    Raises:
        InputError: if a key is not in the set; nothing is changed then.
    """
    keys = read_keys(config.drop, config.keys)
    jobs = find_jobs(config.shards, keys)
    found: list[FoundKeys] = []
    total = sum(shard.bytes for shard in read_manifest(config.shards).shards)
    run_with_bar(console, "looking", find_keys, jobs, config.workers, total, found.append)
    missing = sorted(keys - {key for shard in found for key in shard.keys})
    if missing:
        raise InputError(
            f"{config.shards} has no picture {missing[0]!r} ({len(missing)} of {len(keys)} keys "
            "are not there): nothing was changed"
        )
    drop(config.shards, found, erase=config.erase)
    count = sum(len(shard.keys) for shard in found)
    how = "dropped and erased" if config.erase else "dropped"
    manifest = read_manifest(config.shards)
    line = f"{count:,} pictures {how}; the set is now {manifest.sha256[:12]}"
    console.print(line, highlight=False)


def export_idx(config: ExportIdxConfig, console: Console) -> None:
    """Write text indexes."""
    output = config.output or config.shards
    count = sum(1 for _ in export_indexes(config.shards, output))
    console.print(f"{count:,} .idx files in {output}", markup=False, soft_wrap=True)


def sample(config: SampleConfig, console: Console) -> None:
    """Write pictures out."""
    store = ShardStore(config.shards)
    written, bad = write_samples(store, config.output, config.count, config.seed)
    more = f", {bad:,} passed over because they cannot be used" if bad else ""
    line = f"{written:,} pictures in {config.output}{more}"
    console.print(line, markup=False, soft_wrap=True)
    store.close()


def upload_set(config: UploadConfig, console: Console) -> None:
    """Put a set into an object store, with a progress bar that counts bytes."""
    total = sum(path.stat().st_size for path in config.shards.glob("[!.]*") if path.is_file())
    columns = (TextColumn("uploading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    count = 0
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("uploading", total=total)
        for path in upload(config.shards, config.url):
            progress.advance(bar, path.stat().st_size)
            count += 1
    line = f"{count:,} files in {config.url}, ready for train.py"
    console.print(line, markup=False, soft_wrap=True)


def main() -> None:
    """Parse the command line and do what it says."""
    config: Any = parse_flags(Command, __doc__)  # type: ignore[arg-type]
    console = Console()
    commands: dict[type, Callable[[Any, Console], object]] = {
        IndexConfig: index,
        VerifyConfig: verify,
        StatsConfig: stats,
        DropConfig: drop_keys,
        ExportIdxConfig: export_idx,
        SampleConfig: sample,
        UploadConfig: upload_set,
    }
    commands[type(config)](config, console)


if __name__ == "__main__":
    run_program(main)
