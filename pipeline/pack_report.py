"""What a packing says in the end: which files it left out or changed, and how it went."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipeline.entry_list import ListInfo
from pipeline.pack_config import PackConfig, TooManyRefusedError
from pipeline.packing import Plan
from pipeline.shard_format import Manifest, atomic_file

REFUSED_NAME = "refused.jsonl"
CHANGED_NAME = "changed.jsonl"
IGNORED_NAME = "ignored.jsonl"


def write_rows(path: Path, rows: Iterable[tuple[str, str]], what: str) -> None:
    """JSON lines of files and what happened to them; no file where there is nothing to say."""
    lines = [json.dumps({"file": name, what: reason}).encode() + b"\n" for name, reason in rows]
    if lines:
        with atomic_file(path) as file:
            file.writelines(lines)


def too_many_refused(
    refused: list[tuple[str, str]], pictures: int, config: PackConfig
) -> TooManyRefusedError:
    """The error, with the most frequent reason."""
    kind, count = Counter(kind_of(reason) for _, reason in refused).most_common(1)[0]
    return TooManyRefusedError(
        f"{len(refused)} of {pictures} pictures of {config.source} were refused, {count} of them: "
        f"{kind}; {config.folder / REFUSED_NAME} lists them, --max-refused raises the limit"
    )


def kind_of(reason: str) -> str:
    """A reason without its details."""
    return reason.partition(":")[0]


def report(
    plan: Plan,
    listed: ListInfo,
    manifest: Manifest,
    refused: list[tuple[str, str]],
    changed: list[tuple[str, str]],
    seconds: float,
) -> Table:
    """The table at the end: what was made and what was left out."""
    size = sum(shard.bytes for shard in manifest.shards)
    table = Table(show_header=False, title="packed", title_justify="left")
    table.add_row("pictures", f"{manifest.samples:,}")
    table.add_row("classes", f"{len(manifest.classes):,}" if manifest.classes else "none (flat)")
    if listed.classes and listed.unlabelled and not manifest.classes:
        table.add_row("", Text(f"because {listed.unlabelled} lies outside the class folders"))
    table.add_row("shards", f"{len(manifest.shards):,}")
    table.add_row("size", f"{size / 2**20:,.1f} MiB")
    table.add_row("speed", f"{plan.count / seconds:,.0f} images/s, {seconds:.1f} s")
    for title, rows in (("transcoded", changed), ("refused", refused)):
        table.add_row(title, f"{len(rows):,}")
        kinds = Counter(kind_of(reason) for _, reason in rows)
        for kind, count in kinds.most_common(5):
            table.add_row("", Text(f"{count:,} {kind}"))
    if listed.ignored:
        table.add_row("not pictures", f"{listed.ignored:,} files, listed in {IGNORED_NAME}")
    return table
