"""The tars that a command line names, local or behind a URL, and a local copy of each."""

import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from braceexpand import UnbalancedBracesError, braceexpand

from pipeline.location import as_location
from pipeline.program import InputError
from pipeline.remote_folder import Counters, RemoteError, RemoteFolder, RetryPolicy
from pipeline.shard_format import index_name

TARS_LIMIT = 1_000_000  # that braces may stand for
NUMBER_RANGE = re.compile(r"\{(-?[0-9]{1,18})\.\.(-?[0-9]{1,18})")
ASKED_AT_ONCE = 16  # sizes of tars that a command line names one by one


@dataclass(frozen=True)
class FoundTar:
    """A tar that somebody else wrote."""

    folder: Path | str
    """Where it lies: a folder or a URL."""
    name: str
    size: int
    """Bytes."""
    version: str
    """Changes when somebody writes to it."""

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"


def find_tars(places: Iterable[str]) -> list[FoundTar]:
    """The tars that a command line names, in its order.

    Args:
        places: tars, or folders (their ``*.tar``, by name), local or behind a URL, all with
            ``{000..123}`` or ``{a,b}``.

    Raises:
        InputError: if there is none, or two cannot be told apart by their names.
    """
    named = [one for place in places for one in _expanded(place)]
    tars = [*_remote_tars(named)] if any(_is_url(name) for name in named) else []
    tars += [tar for name in named if not _is_url(name) for tar in _local_tars(Path(name))]
    if not tars:
        raise InputError("no tars: give WebDataset tars or a folder of them")
    by_index: dict[str, FoundTar] = {}
    for tar in tars:
        other = by_index.setdefault(index_name(tar.name), tar)
        if other is not tar:
            is_same = str(other) == str(tar)
            what = "is given twice" if is_same else f"and {other} have the same name"
            raise InputError(f"{tar} {what}: each tar of a set needs a name of its own")
    folders = sorted({str(tar.folder) for tar in tars})
    if len(folders) > 1:
        raise InputError(
            f"the tars lie in {len(folders)} folders ({folders[0]}, {folders[1]}): index each "
            "folder by itself, or link the tars into one"
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


def _is_url(name: str) -> bool:
    return isinstance(as_location(name), str)


def _local_tars(place: Path) -> list[FoundTar]:
    if place.is_dir():
        paths = sorted(path.absolute() for path in place.glob("*.tar") if path.is_file())
        if not paths:
            raise InputError(f"{place} holds no *.tar: give the folder in which the tars lie")
    elif place.is_file():
        paths = [place.absolute()]
    else:
        raise InputError(f"{place} does not exist: check the path")
    found = [(path, path.stat()) for path in paths]
    return [
        FoundTar(p.parent, p.name, status.st_size, str(status.st_mtime_ns)) for p, status in found
    ]


def _remote_tars(names: list[str]) -> Iterator[FoundTar]:
    folders: dict[str, RemoteFolder] = {}

    def of(url: str) -> list[FoundTar]:
        place, name = (url, "") if not url.endswith(".tar") else url.rsplit("/", 1)
        folder = folders.setdefault(place, RemoteFolder(place, RetryPolicy(), Counters()))
        try:
            files = [folder.file(name)] if name else folder.files()
        except RemoteError as error:
            raise InputError(
                f"{url} cannot be had ({error}): check the URL and the credentials in the "
                "environment; a web server lists no folder, name its tars with {000..123}"
            ) from error
        tars = [FoundTar(place, *file) for file in files if file[0].endswith(".tar")]
        if not tars:
            raise InputError(f"{url} holds no *.tar: give the folder in which the tars lie")
        return tars

    urls = [str(as_location(name)) for name in names if _is_url(name)]
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        for tars in pool.map(of, urls):
            yield from tars


@contextmanager
def local_copy(tar: FoundTar, output: Path) -> Iterator[Path]:
    """The path of a tar; of one behind a URL that of a copy, which is gone afterwards.

    Raises:
        InputError: if it cannot be had.
        OSError: if there is no room for the copy.
    """
    if isinstance(tar.folder, Path):
        yield tar.folder / tar.name
        return
    with tempfile.TemporaryFile(dir=output) as file:  # without a name: a kill leaves nothing
        os.posix_fallocate(file.fileno(), 0, max(tar.size, 1))
        os.ftruncate(file.fileno(), tar.size)
        folder = RemoteFolder(tar.folder, RetryPolicy(), Counters())
        try:
            folder.download(tar.name, tar.size, "", file.fileno())
        except RemoteError as error:
            raise InputError(
                f"{tar} cannot be had ({error}): the same command goes on from here"
            ) from error
        finally:
            folder.close()
        yield Path(f"/proc/self/fd/{file.fileno()}")
