"""What can be packed: each source yields entries, one at a time, in an order of its own.

An image folder is ``class/picture`` (any depth below the class) or flat, without classes. A file
``NAME.json`` or ``NAME.jpg.json`` beside a picture is its metadata.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.entry_list import Entry, Ignored
from pipeline.picture_header import EMPTY, UNKNOWN, BadHeaderError, read_header
from pipeline.program import InputError

PICTURE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2"),
        *("png", "webp", "gif", "tif", "tiff", "bmp", "ppm", "pgm", "avif", "ico", "psd"),
    )
)


@dataclass(frozen=True)
class Source:
    """Something with pictures."""

    entries: Iterator[Entry | Ignored]
    classes: list[str] | None = None
    """In the order of the labels; None: the names that the labels are, in alphabetical order."""
    all_or_none: bool = False
    """One entry without a label means that the labels of the others are no classes."""
    empty: str = "holds no pictures"
    """What to say where there are none."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """How a source is read that does not say everything itself."""

    labels: Path | None = None
    """Labels of a tar without them: the devkit of ILSVRC2012, or a text file."""
    root: Path | None = None
    """Folder of the paths in a table or a list, or of a torchvision data set."""
    path_column: str = "path"
    """Of a table: path or URL of the picture."""
    label_column: str = "label"
    """Of a table: name or number of the class, may be absent."""


def image_folder(root: Path) -> Source:
    """The pictures below ``root``; its sub-folders are the classes, if it has any.

    Raises:
        InputError: if the folder is missing.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"the source {root} {what}: give a folder of pictures")
    suffixes = " ".join(sorted(PICTURE_SUFFIXES))
    empty = f"holds no pictures: give a folder with files ending in {suffixes}"
    return Source(walk_pictures(root), all_or_none=True, empty=empty)


def walk_pictures(root: Path) -> Iterator[Entry | Ignored]:
    """Pictures below ``root`` with their class, and every other file with why it is none.

    Links are followed, but no folder is walked twice: a loop cannot trap us, and no picture comes
    in by two ways. Folders of the tree itself go before links to them.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [""], deque[str]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        try:
            status = (root / folder).stat()
            with os.scandir(root / folder) as found:
                files = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield Ignored(folder or ".", f"folder that cannot be read: {error.strerror}")
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield Ignored(folder, "link to a folder that is walked by another way")
            continue
        seen.add((status.st_dev, status.st_ino))
        others: list[os.DirEntry[str]] = []
        folders: list[os.DirEntry[str]] = []
        for file in files:
            (folders if _is_dir(file) else others).append(file)
        for file in reversed(folders):
            (links if file.is_symlink() else waiting).append(_join(folder, file.name))
        yield from _pictures_of(folder, others)


def _is_dir(file: os.DirEntry[str]) -> bool:
    try:
        return file.is_dir()
    except OSError:  # a link to itself
        return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _pictures_of(folder: str, files: list[os.DirEntry[str]]) -> Iterator[Entry | Ignored]:
    reasons = {file.name: _why_no_picture(file) for file in files}
    pictures = [file for file in files if not reasons[file.name]]
    side_cars = _side_cars([file.name for file in pictures], reasons)
    for file in files:
        name = _join(folder, file.name)
        if file.name in side_cars.values():
            continue
        if reason := reasons[file.name]:
            yield Ignored(name, reason)
            continue
        side_car = side_cars.get(file.name)
        yield Entry(
            name,
            file.path,
            _size_of(file),
            name.partition("/")[0] if folder else None,
            metadata=str(Path(file.path).with_name(side_car)) if side_car else None,
        )


def _size_of(file: os.DirEntry[str]) -> int:
    try:
        return file.stat().st_size
    except OSError:  # gone: refused with its reason when its shard is written
        return 0


def _side_cars(pictures: list[str], names: dict[str, str]) -> dict[str, str]:
    """The JSON file beside each picture that has one."""
    found = {}
    for picture in pictures:
        for name in (f"{picture}.json", f"{picture.rpartition('.')[0] or picture}.json"):
            if name in names:
                found[picture] = name
                break
    return found


def _why_no_picture(file: os.DirEntry[str]) -> str:
    """By its name, and where that has no ending by its first bytes."""
    if file.is_symlink() and not Path(file.path).exists():
        return "link to nothing"
    if not file.is_file():
        return "not a file"
    dot = file.name.rfind(".")
    suffix = file.name[dot:].lower() if 0 < dot < len(file.name) - 1 else ""
    if suffix in PICTURE_SUFFIXES or (not suffix and _begins_like_a_picture(Path(file.path))):
        return ""
    return f"ending {suffix}" if suffix else "no ending, and does not begin like a picture"


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            read_header(file.read(4096))
    except BadHeaderError as error:
        return str(error) not in (UNKNOWN, EMPTY)
    except OSError:
        pass  # refused with its reason when its shard is written
    return True
