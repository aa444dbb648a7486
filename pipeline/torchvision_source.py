"""Any classification data set of torchvision by its name: ``torchvision:CIFAR10:train``.

The third word is its split: ``train``, ``test`` and whatever else its class knows. Pictures that
lie in files of their own keep their bytes; the others are handed over as PNG, without loss.
"""

import functools
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.entry_list import Entry
from pipeline.program import InputError
from pipeline.sources import Source, SourceConfig

SCHEME = "torchvision:"


def torchvision_source(name: str, config: SourceConfig) -> Source:
    """The pictures of a data set that lies in ``--root`` (it is not downloaded).

    Raises:
        InputError: if torchvision has none of that name, or it is not there.
    """
    place = f"{name}:{config.root or '.'}"
    dataset = open_dataset(place)
    return Source(_entries(dataset, name, place), _classes_of(dataset))


def _classes_of(dataset: Any) -> list[str]:
    """Names in the order of the labels; numbers where there are only these; none where neither."""
    if classes := getattr(dataset, "classes", None):
        return [str(name[0] if isinstance(name, tuple) else name) for name in classes]
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels):
            return [str(number) for number in range(int(max(labels)) + 1)]
    return []


@functools.lru_cache(maxsize=1)
def open_dataset(place: str) -> Any:
    """The data set of ``torchvision:NAME[:SPLIT]:ROOT``.

    Raises:
        InputError: as above.
    """
    from torchvision import datasets  # torch takes seconds to import

    name, _, rest = place.removeprefix(SCHEME).partition(":")
    split, _, root = rest.rpartition(":")
    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind) or not issubclass(kind, datasets.VisionDataset):
        raise InputError(f"{place}: torchvision has no data set {name!r}")
    known = inspect.signature(kind).parameters
    arguments: dict[str, Any] = {"root": root} if "root" in known else {}
    if split:
        if "split" in known:
            arguments["split"] = split
        elif "train" in known and split in ("train", "test"):
            arguments["train"] = split == "train"
        else:
            raise InputError(f"{place}: {name} has no split {split!r}")
    try:
        return kind(**arguments)
    except (RuntimeError, ValueError, TypeError, OSError) as error:
        line = " ".join(str(error).split())
        raise InputError(f"{place} cannot be opened ({line}): is --root its folder?") from error


def _entries(dataset: Any, name: str, place: str) -> Iterator[Entry]:
    files = _files_of(dataset)
    stem = name.removeprefix(SCHEME).replace(":", "/")
    for number in range(len(dataset)):
        if files:
            path, label = files[number]
            yield Entry(f"{stem}/{number}{Path(path).suffix}", path, _size(path), int(label))
        else:
            yield Entry(f"{stem}/{number}.png", place, 0, None, number)


def _files_of(dataset: Any) -> list[tuple[str, int]]:
    """Paths and labels, of data sets that keep them as ImageFolder does."""
    for attribute in ("samples", "_samples"):
        rows = getattr(dataset, attribute, None)
        if rows and isinstance(rows[0], tuple) and Path(str(rows[0][0])).is_file():
            return [(str(path), int(label)) for path, label in rows]
    return []


def _size(path: str) -> int:
    return Path(path).stat().st_size


def picture_of(place: str, number: int) -> tuple[bytes, int | None]:
    """One picture as PNG, and its label.

    Raises:
        InputError: if the data set does not give pictures with a number as their label.
    """
    image, label = open_dataset(place)[number]
    if not hasattr(image, "save"):
        raise InputError(f"{place} gives {type(image).__name__}, not pictures")
    output = io.BytesIO()
    image.save(output, "PNG", compress_level=1)
    return output.getvalue(), int(label)
