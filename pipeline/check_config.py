"""The sub-commands of check_shards and every flag of each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.program import InputError


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
    decode: float = 0.0
    """Also decode this share of the pictures, chosen by chance. 1: all."""
    workers: int = 0
    """Processes. 0: one for each core."""

    def __post_init__(self) -> None:
        require_workers(self.workers)
        if not 0 <= self.decode <= 1:
            raise InputError(f"--decode {self.decode}: give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Which set to describe."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder with a manifest, or its URL."""
    picture: Path | None = None
    """PNG with histograms."""


@dataclass(frozen=True, kw_only=True)
class DropConfig:
    """Which pictures to leave out of a set."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder with a manifest."""
    drop: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Keys: names of the pictures in the tars, without ending."""
    keys: tuple[Path, ...] = ()
    """Files with a key a line, or with JSON lines that have a "key"."""
    erase: bool = False
    """Also overwrite the pictures and their metadata in the tars."""
    workers: int = 0
    """Processes. 0: one for each core."""

    def __post_init__(self) -> None:
        require_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class ExportIdxConfig:
    """Which set's tars to index for DALI."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder with a manifest."""
    output: Path | None = None
    """Folder for the .idx files. None: beside the manifest."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Which pictures to write out."""

    shards: Annotated[str, tyro.conf.Positional]
    """Folder with a manifest, or its URL."""
    output: Annotated[Path, tyro.conf.Positional]
    """Folder for the pictures."""
    count: int = 16
    """How many."""
    seed: int = 0
    """Of the choice."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"--count {self.count}: give a number of at least 1")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class UploadConfig:
    """Which set to put into an object store."""

    shards: Annotated[Path, tyro.conf.Positional]
    """Folder with a manifest."""
    url: Annotated[str, tyro.conf.Positional]
    """s3://BUCKET/FOLDER or gs://BUCKET/FOLDER."""


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
    | Annotated[
        StatsConfig,
        tyro.conf.subcommand(
            "stats", description="Sizes, shapes, classes and equal pictures, from the indexes."
        ),
    ]
    | Annotated[
        DropConfig,
        tyro.conf.subcommand(
            "drop", description="Leave pictures out of a set, by their keys, at once and for good."
        ),
    ]
    | Annotated[
        ExportIdxConfig,
        tyro.conf.subcommand(
            "export-idx", description="Text indexes for DALI's own WebDataset reader."
        ),
    ]
    | Annotated[
        SampleConfig,
        tyro.conf.subcommand("sample", description="Write some pictures out as files."),
    ]
    | Annotated[
        UploadConfig,
        tyro.conf.subcommand("upload", description="Put a set into an object store."),
    ]
)


def require_workers(workers: int) -> None:
    """Refuse a number of processes below 0."""
    if workers < 0:
        raise InputError(f"--workers {workers}: give 0 (all cores) or a number of processes")
