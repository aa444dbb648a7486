"""A set that is packed into an object store: what is there, and bringing a finished shard there.

Shards are made in a local folder (``pipeline/unfinished.py``) and uploaded one by one, so the disk
holds as many as there are workers. Below the URL lies what lies in a folder that is being filled:
shards, and in ``.packing/`` the plan and a ``done-*.json`` for each shard that is there, written
after it. The next run, on any machine, goes on from these; the manifest goes last.

Nothing locks a store. Packings of one plan do not disturb each other, their bytes are the same;
one of another plan that begins in the same place makes this one end at its next shard.
"""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypeVar

from pipeline.program import InputError
from pipeline.remote_folder import RemoteError, RetryPolicy
from pipeline.shard_format import MANIFEST_NAME, index_name
from pipeline.unfinished import (
    OUR_LISTS,
    PLAN_NAME,
    WORK_NAME,
    ShardResult,
    done_path,
    parse_result,
    remove_shard,
    shard_name,
    write_result,
)
from pipeline.writable_folder import WritableFolder, require_writable

T = TypeVar("T")
RECORD = re.compile(re.escape(WORK_NAME) + r"/done-(\d{6,})\.json")
RECORD_LIMIT_BYTES = 64 << 20  # it lists every picture that was refused or changed, at worst
PLAN_LIMIT_BYTES = 64 << 20  # it has the names of all classes
AT_ONCE = 16  # small files that are read


class PackedStore:
    """The place below a URL that is being filled with shards.

    Args:
        url: of a folder in an object store.
        policy: of retries.

    Raises:
        InputError: if the URL cannot be written to.
    """

    def __init__(self, url: str, policy: RetryPolicy | None = None) -> None:
        self.url = url
        self._remote = WritableFolder(url, policy or RetryPolicy())

    def refuse_foreign(self) -> None:
        """See that it can be written, and is new, empty, or one of ours that is unfinished.

        Raises:
            InputError: if it is not.
        """
        require_writable(self.url, "OUTPUT")
        sizes = self._tree()
        if MANIFEST_NAME in sizes:
            # Killed between the last two steps: the set is finished, the traces are not gone.
            self._delete([name for name in sizes if name.startswith(f"{WORK_NAME}/")])
            raise InputError(
                f"{self.url} already holds finished shards: choose a new folder or remove it"
            )
        if sizes and not any(name.startswith(f"{WORK_NAME}/") for name in sizes):
            raise InputError(
                f"{self.url} is not empty (it holds {min(sizes)!r}): choose a new folder for the "
                "shards"
            )

    def take_up(self, plan: dict[str, Any], part: str, folder: Path) -> None:
        """Go on with a plan that is the same as that of the shards that lie there, or begin anew.

        Args:
            plan: what the bytes of all shards depend on.
            part: the name of a part that is packed beside others; "" for one that fills it alone.
            folder: where shards are made; is told which are finished there.

        Raises:
            InputError: if another plan is being packed in parts, which others may be doing now;
                or the store does not serve.
        """
        name, content = f"{WORK_NAME}/{PLAN_NAME}", json.dumps(plan).encode()
        sizes = self._tree()
        if name in sizes and self._read(name, PLAN_LIMIT_BYTES) == content:
            self._note_finished(sizes, folder)
            return
        if name in sizes and part:
            raise InputError(
                f"{self.url} is filled from another list of pictures or with other settings: give "
                "every part the same ones, or choose another folder"
            )
        if not part:
            ours = ("shard-", f"{WORK_NAME}/", *OUR_LISTS)
            self._delete([name for name in sizes if name.startswith(ours)])
        self._served(lambda: self._remote.write(name, content))

    def _note_finished(self, sizes: dict[str, int], folder: Path) -> None:
        numbers = [int(found[1]) for name in sizes if (found := RECORD.fullmatch(name))]

        def read(number: int) -> tuple[int, ShardResult | None]:
            name = done_path(Path(), number).as_posix()
            return number, parse_result(self._read(name, RECORD_LIMIT_BYTES))

        with ThreadPoolExecutor(AT_ONCE) as pool:
            for number, result in pool.map(read, numbers):
                if result is not None and _is_there(result, number, sizes):
                    write_result(folder, number, replace(result, place=self.url))

    def put(self, folder: Path, number: int, result: ShardResult, plan: dict[str, Any]) -> None:
        """Upload a shard, then note there that it is finished; each file is read back.

        Args:
            folder: where it was made.
            number: of the shard.
            result: what became of it.
            plan: that it belongs to.

        Raises:
            InputError: if it cannot be uploaded, or another packing has begun there.
        """
        if self._read(f"{WORK_NAME}/{PLAN_NAME}", PLAN_LIMIT_BYTES) != json.dumps(plan).encode():
            raise InputError(
                f"another packing, of other pictures or with other settings, has begun in "
                f"{self.url}: give each a folder of its own"
            )
        try:
            if info := result.info:
                self._remote.write_checked(info.name, folder / info.name, info.sha256)
                index = index_name(info.name)
                self._remote.write_checked(index, folder / index, info.index_sha256)
            record = json.dumps(asdict(result)).encode()
            self._remote.write(done_path(Path(), number).as_posix(), record)
        except RemoteError as error:
            raise self._unwritable(error) from error

    def finish(self, folder: Path, results: Sequence[ShardResult]) -> None:
        """Upload the lists and the manifest of shards that are all there.

        Args:
            folder: where lists and manifest are.
            results: of all shards.

        Raises:
            InputError: if a shard is gone, or the store does not serve.
        """
        sizes = self._tree()
        for number, result in enumerate(results):
            if not _is_there(result, number, sizes):
                raise InputError(f"{self.url}: shard {number} is gone: run the same command again")
        try:
            for name in (*OUR_LISTS, MANIFEST_NAME):
                if (folder / name).exists():
                    self._remote.write(name, folder / name)
            self._remote.delete([name for name in sizes if name.startswith(f"{WORK_NAME}/")])
        except RemoteError as error:
            raise self._unwritable(error) from error

    def close(self) -> None:
        """Give up what is being asked."""
        self._remote.close()

    def _tree(self) -> dict[str, int]:
        return self._served(self._remote.tree)

    def _read(self, name: str, limit_bytes: int) -> bytes:
        return self._served(lambda: self._remote.read(name, limit_bytes))

    def _delete(self, names: list[str]) -> None:
        self._served(lambda: self._remote.delete(names))

    def _served(self, once: Callable[[], T]) -> T:
        try:
            return once()
        except RemoteError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: RemoteError) -> InputError:
        return InputError(f"{self.url}: {error}; what is finished stays, the same command goes on")


def _is_there(result: ShardResult, number: int, sizes: dict[str, int]) -> bool:
    """Whether the files of a finished shard are among those of these sizes."""
    info = result.info
    if info is None:
        return True
    has_tar = info.name == shard_name(number) and sizes.get(info.name) == info.bytes
    return has_tar and index_name(info.name) in sizes


def bring(folder: Path, url: str, number: int, result: ShardResult, plan: dict[str, Any]) -> None:
    """Upload a shard that was made in ``folder``, and take it away there.

    Raises:
        InputError: if it cannot be uploaded, or another packing has begun at the URL.
    """
    store = PackedStore(url)
    try:
        store.put(folder, number, result, plan)
    finally:
        store.close()
    remove_shard(folder, number)
