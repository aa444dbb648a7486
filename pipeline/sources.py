"""What can be packed: each source is a list of pictures with a key, a place and a label.

An image folder is ``class/picture`` (any depth below the class) or flat, without classes.
"""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.integer_hash import hash_of
from pipeline.picture_header import EMPTY, UNKNOWN, BadHeaderError, read_header
from pipeline.program import InputError
from pipeline.shard_format import NO_LABEL

PICTURE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2"),
        *("png", "webp", "gif", "tif", "tiff", "bmp", "ppm", "pgm", "avif", "ico", "psd"),
    )
)
# A USTAR name holds 100 characters; a suffix of 9 and an extension of 5 must fit behind the stem.
KEY_STEM_LENGTH = 80


@dataclass(frozen=True)
class SourcePicture:
    """One file to pack. ``relative`` is its path below the source, for people and for logs."""

    key: str
    path: Path
    relative: str
    label: int


@dataclass(frozen=True)
class Source:
    """All pictures of a source in an order that depends on their names alone."""

    pictures: list[SourcePicture]
    classes: list[str]
    ignored: list[tuple[str, str]]  # files that are not looked at, and why
    outside: str = ""  # the first picture that keeps sub-folders from being classes


def image_folder(root: Path) -> Source:
    """The pictures below ``root``; its sub-folders are the classes, if it has any.

    Raises:
        InputError: if the folder is missing or holds no picture.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"the source {root} {what}: give a folder of pictures")
    relatives, ignored = [], []
    for path, why_not in walk_files(root):
        if why_not:
            ignored.append((path.as_posix(), why_not))
        else:
            relatives.append(path)
    if not relatives:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(
            f"the source {root} holds no pictures ({len(ignored)} other files): give a folder with "
            f"files ending in {suffixes}"
        )
    relatives.sort(key=lambda path: path.as_posix())
    outside = [path.as_posix() for path in relatives if len(path.parts) == 1]
    has_classes = not outside
    classes = sorted({path.parts[0] for path in relatives}) if has_classes else []
    label_of = {name: label for label, name in enumerate(classes)}
    names = [path.as_posix() for path in relatives]
    return Source(
        [
            SourcePicture(key, root / path, name, label_of.get(path.parts[0], NO_LABEL))
            for key, path, name in zip(keys_of(names), relatives, names, strict=True)
        ],
        classes,
        ignored,
        outside[0] if 0 < len(outside) < len(relatives) else "",
    )


def walk_files(root: Path) -> Iterator[tuple[Path, str]]:
    """Files below ``root``, relative to it, each with why it is no picture by its name, or "".

    Links are followed, but no folder is walked twice: a loop cannot trap us, and no picture comes
    in by two ways. Folders of the tree itself go before links to them.
    """
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], deque[Path]()
    while waiting or links:
        folder = waiting.pop() if waiting else links.popleft()
        try:
            status = folder.stat()
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            yield folder.relative_to(root), f"folder that cannot be read: {error.strerror}"
            continue
        if (status.st_dev, status.st_ino) in seen:
            yield folder.relative_to(root), "link to a folder that is walked by another way"
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            path = folder / entry.name
            if not path.is_dir():
                yield path.relative_to(root), _why_no_picture(path)
            elif entry.is_symlink():
                links.append(path)
            else:
                waiting.append(path)


def _why_no_picture(path: Path) -> str:
    """By its name, and where that has no ending by its first bytes."""
    if not path.exists():
        return "link to nothing"
    if not path.is_file():
        return "not a file"
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES or (not suffix and _begins_like_a_picture(path)):
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


def keys_of(names: list[str]) -> list[str]:
    """A tar key for each relative path: ASCII, no dots, no spaces, unique, still readable.

    A path that cannot be kept as it is, or shares its key with another, gets eight digits of its
    own SHA-256 behind it, so that a key depends on nothing but the names.
    """
    stems = [re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0] or name) for name in names]
    # webdataset keeps folders such as "__meta__" for notes of its own.
    stems = [re.sub(r"(^|/)__+", r"\1_", stem) for stem in stems]
    # "A" and "a" would be one file where a tar is unpacked on a disk that ignores case.
    often = Counter(stem.lower() for stem in stems)
    keys = []
    for name, stem in zip(names, stems, strict=True):
        kept = stem == name.rpartition(".")[0] and len(stem) <= KEY_STEM_LENGTH
        if kept and often[stem.lower()] == 1:
            keys.append(stem)
        else:
            digits = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            keys.append(f"{stem[:KEY_STEM_LENGTH]}-{digits}")
    return keys


def shuffled(pictures: list[SourcePicture], seed: int) -> list[SourcePicture]:
    """The pictures in a random order that is a function of the seed and their number."""
    if not pictures:
        return []
    rank = hash_of(seed, np.arange(len(pictures), dtype=np.uint64))
    return [pictures[place] for place in rank.argsort(kind="stable")]
