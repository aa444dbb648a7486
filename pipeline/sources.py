"""What can be packed: each source is a list of pictures with a key, a place and a label.

An image folder is ``class/picture`` (any depth below the class) or flat, without classes.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.integer_hash import hash_of
from pipeline.program import InputError
from pipeline.shard_format import NO_LABEL

PICTURE_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "jp2"),
        *("png", "webp", "gif", "tif", "tiff", "bmp", "ppm", "pgm"),
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
    ignored: int  # files that are no pictures by their name
    outside: str = ""  # the first picture that keeps sub-folders from being classes


def image_folder(root: Path) -> Source:
    """The pictures below ``root``; its sub-folders are the classes, if it has any.

    Raises:
        InputError: if the folder is missing or holds no picture.
    """
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise InputError(f"the source {root} {what}: give a folder of pictures")
    relatives, ignored = [], 0
    for path in walk_files(root):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            relatives.append(path.relative_to(root))
        else:
            ignored += 1
    if not relatives:
        suffixes = " ".join(sorted(PICTURE_SUFFIXES))
        raise InputError(
            f"the source {root} holds no pictures ({ignored} other files): give a folder with "
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


def walk_files(root: Path) -> Iterator[Path]:
    """Regular files below ``root``; links to folders are not followed, so a loop cannot trap us."""
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file():
                yield path


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
