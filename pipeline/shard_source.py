"""Where a store gets the files of its shards: a local folder, or a URL through the cache."""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from pipeline.local_tar import Bytes, Tar, file_system, is_network, open_tar
from pipeline.program import DataError, InputError
from pipeline.remote_folder import Counters, RefusedError, RemoteError, RemoteFolder, RetryPolicy
from pipeline.shard_cache import GIB, NoRoomError, ShardCache
from pipeline.shard_format import (
    INDEX_HEADER,
    INDEX_RECORD,
    MANIFEST_NAME,
    Manifest,
    ShardInfo,
    index_name,
    parse_manifest,
    read_manifest,
)

SHARDS_AT_ONCE = 2  # fetched ahead by a process, each in parallel parts


class LocalSource:
    """The files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._is_local = not is_network(file_system(folder))

    def manifest(self) -> Manifest:
        """What the folder holds, or an InputError."""
        return read_manifest(self._folder)

    def index(self, info: ShardInfo) -> bytes:
        """The index file of a shard, or an OSError."""
        return (self._folder / index_name(info.name)).read_bytes()

    def tar(self, info: ShardInfo) -> Tar:
        """The tar of a shard, or an OSError or a ValueError (an empty file)."""
        return open_tar(self._folder / info.name, is_local=self._is_local)


class CachedTar:
    """A tar that is fetched whole when it is read and not there.

    It is opened for each read: 4 microseconds more, and a file that is not in use can always be
    removed, so that the cache keeps to its limit and no process can block another one.
    """

    def __init__(self, source: "RemoteSource", info: ShardInfo) -> None:
        self._source = source
        self._info = info

    def read(self, start: int, size: int) -> Bytes:
        """A copy, or a RemoteError."""
        return np.frombuffer(self._source.read(self._info, start, size), np.uint8)

    def size_bytes(self) -> int:
        """The manifest's, which was compared when the tar was fetched."""
        return self._info.bytes


class RemoteSource:
    """The files below a URL, through the cache of this machine.

    Args:
        url: of the folder.
        cache: where copies are kept.
        policy: of retries.
        counters: told of what is fetched and waited for.
    """

    def __init__(
        self, url: str, cache: ShardCache, policy: RetryPolicy, counters: Counters
    ) -> None:
        self._folder = RemoteFolder(url, policy, counters)
        self._url = url
        self._cache = cache
        self._counters = counters
        self._identity = ""
        self._wanted: deque[ShardInfo] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads: list[threading.Thread] = []
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.share_bytes = cache.limit_bytes // processes

    def manifest(self) -> Manifest:
        """What the folder holds; fetched at every start, so that a changed set is noticed.

        Raises:
            InputError: if there is none or it cannot be had.
        """
        where = f"{self._url}/{MANIFEST_NAME}"
        try:
            return parse_manifest(self._folder.read(MANIFEST_NAME), where)
        except RemoteError as error:
            raise InputError(
                f"{where} cannot be read ({error}): check the URL and the credentials in the "
                "environment"
            ) from error

    def serve(self, manifest: Manifest) -> None:
        """Take note of the set, and see that its shards fit.

        Raises:
            InputError: if the cache is too small for its largest shard.
        """
        self._identity = manifest.sha256
        largest = max((shard.bytes + _index_bytes(shard) for shard in manifest.shards), default=0)
        if 2 * largest > self.share_bytes:
            processes = self._cache.limit_bytes // self.share_bytes
            raise InputError(
                f"--data.cache-gib {self._cache.limit_bytes / GIB:g} is too small for shards of "
                f"{largest / GIB:.3g} GiB: each of {processes} processes needs two at once, so "
                f"give at least {2 * largest * processes / GIB:.3g}"
            )

    def index(self, info: ShardInfo) -> bytes:
        """The index file of a shard.

        Raises:
            RemoteError: if it cannot be had or is not the one of the manifest.
        """
        name, size = index_name(info.name), _index_bytes(info)

        def download(handle: int) -> None:
            self._folder.download(name, size, info.index_sha256, handle)

        key = self._key(name, info.index_sha256, size)
        with self._folder.asking(name):
            return self._timed_fetch(key, size, download, (0, size))

    def tar(self, info: ShardInfo) -> Tar:
        """The tar of a shard; nothing is fetched yet."""
        return CachedTar(self, info)

    def read(self, info: ShardInfo, start: int, size: int) -> bytes:
        """Bytes of a tar, which is fetched where it is not there.

        Raises:
            RemoteError: if it cannot be had.
        """
        key = self._key(info.name, info.sha256, info.bytes)
        found = self._cache.read(key, start, size)
        if found is not None:
            return found

        def download(handle: int) -> None:
            self._folder.download(info.name, info.bytes, info.sha256, handle)

        with self._folder.asking(info.name):
            return self._timed_fetch(key, info.bytes, download, (start, size))

    def fitting(self, shards: Iterable[ShardInfo]) -> list[ShardInfo]:
        """The first of ``shards`` that fit into this process's share of the cache together."""
        total, fitting = 0, []
        for info in shards:
            total += info.bytes + _index_bytes(info)
            if total > self.share_bytes * 0.9:  # the rest is for those that stand in
                break
            fitting.append(info)
        return fitting

    def prefetch(self, shards: list[ShardInfo]) -> None:
        """Fetch these ahead of need, in this order, in place of those that were asked before."""
        for info in reversed(shards):  # so that the first ones count as the last used
            self._cache.holds(self._key(info.name, info.sha256, info.bytes))
        with self._changed:
            self._wanted = deque(shards)
            self._changed.notify_all()
            if not self._threads and not self._is_closed:
                self._threads = [
                    threading.Thread(target=self._fetch_ahead, name="prefetch", daemon=True)
                    for _ in range(SHARDS_AT_ONCE)
                ]
                for thread in self._threads:
                    thread.start()

    def close(self) -> None:
        """Give up what is being fetched; safe to call more than once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._folder.close()
        for thread in self._threads:
            thread.join()

    def _fetch_ahead(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._is_closed)
                if self._is_closed:
                    return
                info = self._wanted.popleft()
            key = self._key(info.name, info.sha256, info.bytes)
            if self._cache.holds(key):
                continue

            def download(handle: int, info: ShardInfo = info) -> None:
                self._folder.download(info.name, info.bytes, info.sha256, handle)

            # What goes wrong here goes wrong again, and is reported, when the shard is read.
            with suppress(NoRoomError, RemoteError, DataError, OSError):
                self._cache.fetch(key, info.bytes, download, may_wait=False)

    def _timed_fetch(
        self, key: str, size: int, download: Callable[[int], None], span: tuple[int, int]
    ) -> bytes:
        if self._is_closed:
            raise RefusedError("closed")
        started = time.monotonic()
        try:
            return self._cache.fetch(key, size, download, may_wait=True, read=span)
        finally:
            self._counters.waited_s += time.monotonic() - started

    def _key(self, name: str, sha256: str, size: int) -> str:
        """By content where the manifest has its hash, else by set, place, name and size."""
        what = sha256 or f"{self._identity} {self._url}/{name}"
        return hashlib.sha256(f"{what} {size}".encode()).hexdigest()


def _index_bytes(info: ShardInfo) -> int:
    return INDEX_HEADER.size + info.samples * INDEX_RECORD.itemsize
