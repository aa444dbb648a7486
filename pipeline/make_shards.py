"""Pack a folder of pictures into tar shards with an index and a manifest.

    python pipeline/make_shards.py SOURCE OUTPUT

SOURCE is ``class/picture`` or a flat folder. Every picture is decoded once; what is broken is left
out and listed in OUTPUT/refused.jsonl with its reason. The same pictures give the same bytes,
whatever the number of processes.
"""

import contextlib
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:  # run as a script: import from the repository root, not from pipeline/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pipeline.command_line import parse_flags
from pipeline.packing import ShardJob, ShardResult, pack_shard, plan_shards
from pipeline.program import InputError, available_cores, run_program
from pipeline.shard_format import (
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    atomic_file,
    write_manifest,
)
from pipeline.sources import Source, image_folder, shuffled
from pipeline.validate import Limits, StoredForm
from pipeline.worker_pool import run_jobs

REFUSED_NAME = "refused.jsonl"
CHANGED_NAME = "changed.jsonl"
IGNORED_NAME = "ignored.jsonl"
MARKER_NAME = ".packing"  # lies in a folder while it is being filled


class TooManyRefusedError(InputError):
    """Most of a source cannot be used, so it is likely not what it was meant to be."""

    exit_code = 3


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack and how."""

    source: Annotated[Path, tyro.conf.Positional]
    """Folder of pictures: class/picture, or flat."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder for the shards: new or empty."""
    shard_mib: int = 256
    """Largest size of a shard, in MiB of source files."""
    shard_samples: int = 10_000
    """Most pictures in a shard."""
    seed: int = 0
    """Of the order in which the pictures are packed."""
    workers: int = 0
    """Processes. 0: one for each core."""
    max_refused: float = 0.5
    """Give up, with exit code 3, when more than this share of the pictures was refused."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    """What is too much for one picture."""
    form: Annotated[StoredForm, tyro.conf.arg(name="")] = field(default_factory=StoredForm)
    """How pictures are stored."""

    def __post_init__(self) -> None:
        for name in ("shard_mib", "shard_samples"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"{flag} {getattr(self, name)}: give a number of at least 1")
        if not 0 <= self.max_refused <= 1:
            raise InputError(f"--max-refused {self.max_refused}: give a number from 0 to 1")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give a number of at least 0")
        if self.workers < 0:
            raise InputError(
                f"--workers {self.workers}: give 0 (all cores) or a number of processes"
            )


def prepare_output(output: Path) -> list[Path]:
    """Make the folder, or see that it is ours to fill, and mark it as being filled.

    Returns:
        The folders that had to be made, the deepest first.

    Raises:
        InputError: if it holds anything that is not the leftover of a packing.
    """
    if (output / MANIFEST_NAME).exists():
        raise InputError(
            f"{output} already holds finished shards: choose a new folder or remove it"
        )
    if output.is_dir() and not (output / MARKER_NAME).exists():
        for path in output.iterdir():
            raise InputError(
                f"{output} is not empty (it holds {path.name!r}): choose a new folder for the "
                "shards"
            )
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER_NAME).touch()
    remove_files(output)  # of a packing that was killed, perhaps with other settings
    return made


def remove_files(output: Path) -> None:
    """Take away what a packing wrote that did not finish."""
    ours = ("shard-", REFUSED_NAME, CHANGED_NAME, IGNORED_NAME, MANIFEST_NAME)
    for path in output.iterdir():
        if path.name.removeprefix(".").startswith(ours):
            path.unlink(missing_ok=True)


def remove_unfinished(output: Path, made: list[Path]) -> None:
    """Take away what a packing wrote that did not finish, and the folders that it made."""
    remove_files(output)
    (output / MARKER_NAME).unlink(missing_ok=True)
    for folder in made:
        with contextlib.suppress(OSError):  # not empty: somebody else has put something there
            folder.rmdir()


def pack_all(jobs: list[ShardJob], workers: int, console: Console) -> list[ShardResult]:
    """Run the jobs in parallel processes, with a progress bar that counts pictures."""
    total = sum(len(job.pictures) for job in jobs)
    columns = (
        TextColumn("packing"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    results: dict[int, ShardResult] = {}
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("packing", total=total)
        run_jobs(
            pack_shard,
            jobs,
            workers,
            results.__setitem__,
            lambda done: progress.update(bar, completed=done),
        )
        progress.update(bar, completed=total)
    return [results[number] for number in range(len(jobs))]


def write_list(path: Path, rows: list[tuple[str, str]], what: str) -> None:
    """JSON lines of files and what happened to them; no file where there is nothing to say."""
    if rows:
        with atomic_file(path) as file:
            for name, reason in sorted(rows):
                file.write(json.dumps({"file": name, what: reason}).encode() + b"\n")


def check_refused(refused: list[tuple[str, str]], pictures: int, config: PackConfig) -> None:
    """Stop where the share of refused pictures is above the limit.

    Raises:
        TooManyRefusedError: with the most frequent reason.
    """
    if len(refused) <= config.max_refused * pictures and len(refused) < pictures:
        return
    kind, count = Counter(kind_of(reason) for _, reason in refused).most_common(1)[0]
    raise TooManyRefusedError(
        f"{len(refused)} of {pictures} pictures of {config.source} were refused, {count} of them: "
        f"{kind}; {config.output / REFUSED_NAME} lists them, --max-refused raises the limit"
    )


def kind_of(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(":")[0]


def summarise(
    console: Console, source: Source, results: list[ShardResult], manifest: Manifest, seconds: float
) -> None:
    """The table at the end: what was made and what was left out."""
    refused = [row for result in results for row in result.refused]
    changed = [row for result in results for row in result.changed]
    size = sum(shard.bytes for shard in manifest.shards)
    table = Table(show_header=False, title="packed", title_justify="left")
    table.add_row("pictures", f"{manifest.samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "none (flat)")
    if source.outside:
        table.add_row("", Text(f"because {source.outside} lies outside the class folders"))
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", f"{size / 2**20:,.1f} MiB")
    table.add_row("speed", f"{len(source.pictures) / seconds:,.0f} images/s, {seconds:.1f} s")
    for title, rows in (("transcoded", changed), ("refused", refused)):
        table.add_row(title, f"{len(rows):,}")
        kinds = Counter(kind_of(reason) for _, reason in rows)
        for kind, count in kinds.most_common(5):
            table.add_row("", Text(f"{count:,} {kind}"))
    if source.ignored:
        table.add_row("not pictures", f"{len(source.ignored):,} files, listed in {IGNORED_NAME}")
    console.print(table)
    if refused:
        console.print(f"what was refused and why: {REFUSED_NAME} beside the shards", style="yellow")


def pack(config: PackConfig, console: Console) -> Manifest:
    """Pack the source of ``config``; leaves nothing behind when it cannot finish.

    Raises:
        InputError: if the source has no usable picture or the output is taken.
        OSError: if the output cannot be written.
    """
    source = image_folder(config.source)
    made = prepare_output(config.output)
    started = time.monotonic()
    try:
        plan = plan_shards(
            shuffled(source.pictures, config.seed),
            config.output,
            config.shard_mib * 2**20,
            config.shard_samples,
        )
        jobs = [ShardJob(path, pictures, config.limits, config.form) for path, pictures in plan]
        workers = config.workers or available_cores()
        results = pack_all(jobs, workers, console)
        refused = [row for result in results for row in result.refused]
        write_list(config.output / REFUSED_NAME, refused, "reason")
        write_list(config.output / IGNORED_NAME, source.ignored, "reason")
        shards: list[ShardInfo] = [result.info for result in results if result.info]
        check_refused(refused, len(source.pictures), config)
        changed = [row for result in results for row in result.changed]
        write_list(config.output / CHANGED_NAME, changed, "change")
        made_by = {
            "program": "make_shards",
            "seed": config.seed,
            "shard_mib": config.shard_mib,
            "shard_samples": config.shard_samples,
            **vars(config.limits),
            **vars(config.form),
        }
        manifest = write_manifest(config.output, shards, source.classes, made_by)
        (config.output / MARKER_NAME).unlink()
    except TooManyRefusedError:
        raise  # what was refused can be looked up in the unfinished folder
    except BaseException:
        remove_unfinished(config.output, made)
        raise
    summarise(console, source, results, manifest, time.monotonic() - started)
    return manifest


def main() -> None:
    """Parse the command line and pack."""
    config = parse_flags(PackConfig, __doc__)
    console = Console()
    manifest = pack(config, console)
    line = f"{config.output}: data set {manifest.sha256[:12]}, ready for train.py"
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_program(main)
