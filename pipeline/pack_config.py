"""What to pack and how: every flag of make_shards."""

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipeline.command_line import require_at_least_1
from pipeline.curation import CurationConfig
from pipeline.location import as_location, writable_location
from pipeline.program import InputError
from pipeline.sources import SourceConfig
from pipeline.validate import Limits, StoredForm


class TooManyRefusedError(InputError):
    """Most of a source cannot be used, so it is likely not what it was meant to be."""

    exit_code = 3
    keep_folder = True  # what was refused can be looked up in it


class OtherPartsError(InputError):
    """A part has done what it can do before others have come as far."""

    exit_code = 75  # "start me again", as of train.py


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What to pack and how."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of pictures (class/picture, or flat); a tar, or a folder of tars; a table of paths
    (.csv, .tsv, .jsonl, .parquet); torchvision:NAME[:SPLIT]; - for paths on standard input."""
    output: Annotated[str | Path, tyro.conf.Positional]
    """Folder for the shards, or s3://BUCKET/FOLDER or gs://...: new, empty or left unfinished."""
    scratch: Path | None = None
    """With a URL: local folder where shards are made and from which they are uploaded, a few at a
    time. Default: one of the system's temporary folder."""
    shard_mib: int = 256
    """Size of a shard, in MiB of source files, on average."""
    shard_samples: int = 10_000
    """Most pictures in a shard."""
    seed: int = 0
    """Of the order in which the pictures are packed."""
    workers: int = 0
    """Processes. 0: one for each core."""
    ray: bool = False
    """Run on the Ray cluster of RAY_ADDRESS, else on one that is started here (extra 'ray')."""
    part: str = ""
    """3/64: only the third of 64 parts. When all are done, the command without it joins them. With
    --duplicates each part runs twice: the first time it compares, and ends with exit code 75."""
    max_seconds: int = 300
    """Refuse a picture that takes longer than this. 0: wait for ever."""
    max_refused: float = 0.5
    """Give up, with exit code 3, when more than this share of the pictures was refused."""
    reading: Annotated[SourceConfig, tyro.conf.arg(name="")] = field(default_factory=SourceConfig)
    """What a source does not say itself."""
    curation: Annotated[CurationConfig, tyro.conf.arg(name="")] = field(
        default_factory=CurationConfig
    )
    """What to do with pictures that are there twice."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    """What is too much for one picture."""
    form: Annotated[StoredForm, tyro.conf.arg(name="")] = field(default_factory=StoredForm)
    """How pictures are stored."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "shard_mib", "shard_samples")
        if self.max_seconds < 0:
            raise InputError(f"--max-seconds {self.max_seconds}: give a number of at least 0")
        if not 0 <= self.max_refused <= 1:
            raise InputError(f"--max-refused {self.max_refused}: give a number from 0 to 1")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed}: give a number of at least 0")
        if self.workers < 0:
            raise InputError(
                f"--workers {self.workers}: give 0 (all cores) or a number of processes"
            )
        if self.url:
            writable_location(self.url)
        if self.scratch is not None and not self.url:
            raise InputError(
                f"--scratch {self.scratch}: {self.output} is a folder, shards are made in it: "
                "leave --scratch out, or give s3://BUCKET/FOLDER"
            )
        if self.url and self.part and self.curation.duplicates != "keep":
            raise InputError(
                f"--part {self.part} --duplicates {self.curation.duplicates}: parts compare their "
                f"pictures in a folder that they share, {self.output} is none; pack without parts"
            )
        self.part_of()

    @property
    def url(self) -> str:
        """Where the shards are brought when they are made, "" if they stay in the folder."""
        location = as_location(self.output)
        return location if isinstance(location, str) else ""

    @property
    def folder(self) -> Path:
        """Where shards are made."""
        if not self.url:
            return Path(self.output)
        scratch = self.scratch or Path(tempfile.gettempdir())
        name = hashlib.sha256(f"{self.url} {self.part} {os.getuid()}".encode()).hexdigest()[:16]
        return scratch / f"mocostream-packing-{name}"

    def part_of(self) -> tuple[int, int]:
        """Which part is packed, from 0, and of how many.

        Raises:
            InputError: if it is not written like 3/64.
        """
        if not self.part:
            return 0, 1
        number, _, count = self.part.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise InputError(f"--part {self.part}: give a part and their number, such as 3/64")
        return int(number) - 1, int(count)

    def part_name(self) -> str:
        """What the files of this part are called apart from those of others."""
        return f"-{self.part.replace('/', '-of-')}" if self.part else ""

    def made_by(self) -> dict[str, Any]:
        """The settings on which the bytes depend."""
        return {
            "program": "make_shards",
            "seed": self.seed,
            "shard_mib": self.shard_mib,
            "shard_samples": self.shard_samples,
            "duplicates": self.curation.duplicates,
            "near_duplicates": self.curation.near_duplicates,
            **vars(self.limits),
            **vars(self.form),
        }
