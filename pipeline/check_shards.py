"""Look after shards: index tars that other software wrote, verify any set.

python pipeline/check_shards.py index SHARDS...
python pipeline/check_shards.py verify SET
"""

import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.command_line import parse_flags
from pipeline.foreign_shards import IndexedShard, IndexRules, index_shard
from pipeline.index_set import (
    JOURNAL_NAME,
    UNUSUAL_NAME,
    add_line,
    being_indexed,
    find_tars,
    plan_jobs,
    read_journal,
    write_set,
)
from pipeline.program import InputError, available_cores, run_program
from pipeline.shard_format import Manifest
from pipeline.verify_set import Fault, ShardCheck, check_jobs, verify_shard
from pipeline.worker_pool import Job, Result, run_jobs


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Which tars to index and how."""

    shards: Annotated[tuple[str, ...], tyro.conf.Positional]
    """WebDataset tars, or folders of them; {000..123} and {a,b} stand for several."""
    output: Path | None = None
    """Folder for indexes and manifest. None: beside the tars."""
    decode: bool = False
    """Decode every picture, and leave out what fails."""
    label_key: str | None = None
    """Label in the json of a sample. None: its .cls, where there is one."""
    workers: int = 0
    """Processes. 0: one for each core."""

    def __post_init__(self) -> None:
        require_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Which set to verify."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder with a manifest."""
    workers: int = 0
    """Processes. 0: one for each core."""

    def __post_init__(self) -> None:
        require_workers(self.workers)


Command = (
    Annotated[
        IndexConfig,
        tyro.conf.subcommand(
            "index", description="One pass over WebDataset tars; afterwards train.py takes them."
        ),
    ]
    | Annotated[
        VerifyConfig,
        tyro.conf.subcommand(
            "verify", description="Compare tars and indexes with what the manifest says."
        ),
    ]
)


def require_workers(workers: int) -> None:
    """Refuse a number of processes below 0."""
    if workers < 0:
        raise InputError(f"--workers {workers}: give 0 (all cores) or a number of processes")


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
    output = config.output or tars[0].parent
    rules = IndexRules(decode=config.decode, label_key=config.label_key)
    with being_indexed(output) as journal:
        known = read_journal(journal)
        plan = plan_jobs(tars, output, rules, known)
        done = {shard.info.name: shard for shard in plan.kept}

        def take(shard: IndexedShard) -> None:
            done[shard.info.name] = shard
            add_line(journal, shard)

        total = sum(job.tar.stat().st_size for job in plan.jobs)
        run_with_bar(console, "indexing", index_shard, plan.jobs, config.workers, total, take)
        shards = [done[tar.name] for tar in tars]
        others = [shard for name, shard in known.items() if name not in done]
        manifest = write_set(shards, others, tars[0].parent, output, rules)
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
    checks: list[ShardCheck] = check_jobs(config.shards)
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


def main() -> None:
    """Parse the command line and do what it says."""
    config: IndexConfig | VerifyConfig = parse_flags(Command, __doc__)  # type: ignore[arg-type]
    console = Console()
    if isinstance(config, IndexConfig):
        index(config, console)
    else:
        verify(config, console)


if __name__ == "__main__":
    run_program(main)
