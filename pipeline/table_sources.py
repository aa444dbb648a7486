"""Sources that are lists: a table with paths or URLs and labels, or paths on standard input.

CSV with a header line, JSON lines, Parquet. Every column beside path and label is metadata.
"""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from pipeline.entry_list import Entry
from pipeline.location import as_location, is_url
from pipeline.program import InputError
from pipeline.sources import Source, SourceConfig

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")


def table_source(table: Path, config: SourceConfig) -> Source:
    """The pictures that a table names; relative paths are those of its folder or ``--root``.

    Raises:
        InputError: if it is missing; while it is read, if it is none or a row has no path.
    """
    if not table.is_file():
        raise InputError(f"the source {table} does not exist: give a table of pictures")
    return Source(_entries(_rows(table), table, config), empty="names no pictures")


def list_source(lines: TextIO, config: SourceConfig) -> Source:
    """One path or URL a line."""
    root = config.root or Path()
    paths = (line.rstrip("\n") for line in lines)
    entries = (_entry(path, root, None, None) for path in paths if path)
    return Source(entries, empty="(standard input) names no pictures")


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(table)
        return
    with table.open(newline="" if suffix in (".csv", ".tsv") else None, encoding="utf-8") as file:
        try:
            if suffix in (".csv", ".tsv"):
                csv.field_size_limit(sys.maxsize)
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",")
            else:
                yield from (json.loads(line) for line in file if line.strip())
        except (csv.Error, ValueError) as error:
            raise InputError(f"the table {table} cannot be read: {error}") from error


def _parquet_rows(table: Path) -> Iterator[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise InputError(
            f"{table}: Parquet needs the extra 'parquet' (pip install pyarrow), or give CSV or "
            "JSON lines"
        ) from None
    try:
        with parquet.ParquetFile(table) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except ArrowException as error:
        raise InputError(f"the table {table} cannot be read: {error}") from error


def _entries(rows: Iterable[dict[str, Any]], table: Path, config: SourceConfig) -> Iterator[Entry]:
    root = config.root or table.parent
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get(config.path_column), str):
            columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise InputError(
                f"row {number} of {table} has no text in the column {config.path_column!r} "
                f"(columns: {columns}): name it with --path-column"
            )
        path, label = row.pop(config.path_column), row.pop(config.label_column, None)
        metadata = {str(name): _plain(v) for name, v in row.items() if v not in (None, "")}
        yield _entry(path, root, _label(label, number, table), metadata or None)


def _label(value: Any, number: int, table: Path) -> str | int | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return int(value) if value.isdecimal() and len(value) < 10 else value
    if type(value) is int and value >= 0:
        return value
    raise InputError(f"row {number} of {table} has the label {value!r}: give a name or a number")


def _plain(value: Any) -> Any:
    """What JSON can say; dates and the like as text."""
    if isinstance(value, dict):
        return {str(name): _plain(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _entry(
    path: str, root: Path, label: str | int | None, metadata: dict[str, Any] | None
) -> Entry:
    if is_url(path):
        as_location(path)  # refuses what is no URL of a file
        return Entry(path.partition("://")[2], path, 0, label, metadata=metadata)
    place = root / path
    try:
        size = place.stat().st_size
    except (OSError, ValueError):  # refused with its reason when its shard is written
        size = 0
    return Entry(path.lstrip("/"), str(place), size, label, metadata=metadata)
