"""A folder of shards that is being filled: what is done, and that nobody else fills it.

Everything that is not for the finished set lies in the hidden folder ``.packing``, which also
marks the set as unfinished: the list of the source, the plan, and one ``done-*.json`` for each
finished shard, written after the shard itself. A packing that was killed goes on from these if its
plan (list and settings) is the same, else it begins anew.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.program import InputError
from pipeline.shard_format import MANIFEST_NAME, ShardInfo, atomic_file, index_name

WORK_NAME = ".packing"
PLAN_NAME = "plan.json"
IN_HAND_NAME = "in-hand-"  # and a shard's number: which of its pictures a worker decodes
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
OUR_LISTS = ("refused.jsonl", "changed.jsonl", "ignored.jsonl", "duplicates.jsonl")


@dataclass
class ShardResult:
    """What became of a shard. ``info`` is None where no picture could be used."""

    info: ShardInfo | None = None
    pictures: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    changed: list[tuple[str, str]] = field(default_factory=list)  # name, what changed
    place: str = ""
    """URL of the folder that the shard was brought to, "" where it was made."""


def shard_name(number: int) -> str:
    """The name of a tar."""
    return f"shard-{number:06d}.tar"


def done_path(output: Path, number: int) -> Path:
    """Where the result of a shard is kept."""
    return output / WORK_NAME / f"done-{number:06d}.json"


def in_hand_path(output: Path, number: int) -> Path:
    """Where a worker notes which picture of a shard it has in hand."""
    return output / WORK_NAME / f"{IN_HAND_NAME}{number:06d}"


def blamed_path(output: Path, number: int) -> Path:
    """Where it is noted which pictures of a shard are not to be decoded again, and why."""
    return output / WORK_NAME / f"blamed-{number:06d}.json"


def write_result(output: Path, number: int, result: ShardResult) -> None:
    """Declare a shard finished; its tar and index are on the disk, or in the store."""
    with atomic_file(done_path(output, number)) as file:
        file.write(json.dumps(asdict(result)).encode())


def read_result(output: Path, number: int) -> ShardResult | None:
    """The result of a finished shard, or None if it is still to be packed."""
    try:
        result = parse_result(done_path(output, number).read_bytes())
        info = result.info if result else None
        tar = output / shard_name(number)
        if result is None or not info or result.place:
            return result
        is_whole = tar.stat().st_size == info.bytes and _index_of(tar).exists()
        return result if is_whole else None
    except OSError:
        return None


def parse_result(data: bytes) -> ShardResult | None:
    """The result in the bytes of its file; None if they are none."""
    try:
        content = json.loads(data)
        info = ShardInfo(**content["info"]) if content["info"] else None
        rows = {name: [(n, why) for n, why in content[name]] for name in ("refused", "changed")}
        return ShardResult(info, content["pictures"], **rows, place=content.get("place", ""))
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def remove_shard(output: Path, number: int) -> None:
    """Take away the files of a shard, as far as they are there."""
    name = shard_name(number)
    for path in (output / name, output / index_name(name)):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _index_of(tar: Path) -> Path:
    return tar.with_name(index_name(tar.name))


@contextmanager
def being_filled(output: Path, part: str = "") -> Iterator[Path]:
    """Hold a folder for filling it; gives a new folder for the list of the source.

    After an error the folder stays if a shard is finished, for the next run; else all that was
    made is taken away.

    Args:
        output: new, empty, or left unfinished.
        part: the name of a part that is packed beside others; "" for one that fills it alone.

    Raises:
        InputError: if the folder is taken.
    """
    refuse_foreign(output)
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    output.mkdir(parents=True, exist_ok=True)
    work = output / WORK_NAME
    work.mkdir(exist_ok=True)
    list_folder = work / f"list{part}"
    with contextlib.ExitStack() as stack:
        stack.enter_context(_locked(work / "lock", shared=bool(part)))
        if part:
            stack.enter_context(_locked(work / f"lock{part}", shared=False))
        shutil.rmtree(list_folder, ignore_errors=True)
        list_folder.mkdir()
        try:
            yield list_folder
        except BaseException as error:
            keep = any(work.glob("done-*.json")) or getattr(error, "keep_folder", False)
            if not keep and not part:
                _remove_all(output, made)
            if isinstance(error, OSError) and error.errno in NO_ROOM and not error.filename:
                error.filename = str(output)  # a failed write says what is wrong, but not where
            raise


def refuse_foreign(output: Path) -> None:
    """See that a folder is new, empty, or one of ours that is unfinished.

    Raises:
        InputError: if it is not.
    """
    if (output / MANIFEST_NAME).exists():
        # Killed between the last two steps: the set is finished, the traces are not gone.
        shutil.rmtree(output / WORK_NAME, ignore_errors=True)
        raise InputError(
            f"{output} already holds finished shards: choose a new folder or remove it"
        )
    if output.is_dir() and not (output / WORK_NAME).is_dir():
        for path in output.iterdir():
            raise InputError(
                f"{output} is not empty (it holds {path.name!r}): choose a new folder for the "
                "shards"
            )


@contextmanager
def _locked(path: Path, *, shared: bool) -> Iterator[None]:
    handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise InputError(
            f"{path.parent.parent} is being filled by another make_shards: wait for it or choose "
            "another folder"
        ) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(handle)


def _remove_all(output: Path, made: list[Path]) -> None:
    remove_shards(output)
    shutil.rmtree(output / WORK_NAME, ignore_errors=True)
    for folder in made:
        with contextlib.suppress(OSError):  # not empty: somebody else has put something there
            folder.rmdir()


def remove_shards(output: Path) -> None:
    """Take away what an unfinished packing wrote, except the lists of running ones."""
    forget_finished(output)
    for path in output.iterdir():
        if path.name.removeprefix(".").startswith((*OUR_LISTS, MANIFEST_NAME)):
            path.unlink(missing_ok=True)
    for path in (output / WORK_NAME).glob("blamed-*"):
        path.unlink(missing_ok=True)


def forget_finished(output: Path) -> None:
    """Take away shards and the notes that they are done."""
    for path in [*output.glob("shard-*"), *output.glob(".shard-*")]:
        path.unlink(missing_ok=True)
    for path in (output / WORK_NAME).glob("done-*"):
        path.unlink(missing_ok=True)


def take_up(output: Path, plan: dict[str, Any], part: str) -> None:
    """Go on with a plan that is the same as that of the shards that lie here, or begin anew.

    Raises:
        InputError: if another plan is being packed in parts, which others may be doing now.
    """
    path = output / WORK_NAME / PLAN_NAME
    try:
        same = json.loads(path.read_bytes()) == json.loads(json.dumps(plan))
    except (OSError, ValueError):
        same = False
    if same:
        return
    if part and path.exists():
        raise InputError(
            f"{output} is filled from another list of pictures or with other settings: give every "
            "part the same ones, or choose another folder"
        )
    if not part:
        remove_shards(output)
    with atomic_file(path) as file:
        file.write(json.dumps(plan).encode())


def finish(output: Path) -> None:
    """Take away the traces of a packing whose manifest is written."""
    shutil.rmtree(output / WORK_NAME)
