"""The bytes of any sample of a set of shards, by shard number and index; no parsing.

A shard on a local disk is mapped into memory and a picture is a view of the map; on a network
mount it is read (``local_tar``), behind a URL it is fetched whole into a cache (``shard_source``).
The most recently used indexes and tars stay open. Every read is checked against the index, bounds
first and then the CRC, because a flipped bit decodes to garbage without an error. Whatever is
wrong with one shard is wrong with its samples only.
"""

import tarfile
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.local_tar import Tar
from pipeline.location import as_location, tars_location
from pipeline.program import DataError, InputError
from pipeline.remote_folder import Counters, RemoteError, RetryPolicy
from pipeline.shard_cache import GIB, CacheConfig, ShardCache
from pipeline.shard_format import (
    BLOCK_BYTES,
    FLAG_DROPPED,
    Manifest,
    ShardInfo,
    index_name,
    parse_index,
)
from pipeline.shard_source import LocalSource, RemoteSource
from pipeline.tar_members import split_name

Bytes = NDArray[np.uint8]

# Shards of a rank that are in use at once: about 17 a lane with the default window, few lanes.
OPEN_SHARDS = 512
# A shard that cannot be had is not asked for again so soon: each of its samples would cost a wait.
RETRY_AFTER_S = 60.0


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason, for the quarantine log."""


@dataclass(frozen=True)
class OpenShard:
    """A shard in use: its records and its tar, or what is wrong with one of them."""

    records: NDArray[np.void] | None
    tar: Tar | None
    problem: str = ""
    opened_s: float = 0.0


class ShardStore:
    """Read access to the shards of a folder or URL; any number of threads may use it.

    Args:
        location: of the manifest and the indexes.
        cache: for what lies behind a URL.
        policy: of retries, likewise.

    Raises:
        InputError: if there is no finished set of shards, or no room for it in the cache.
    """

    def __init__(
        self,
        location: str | Path,
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
        policy: RetryPolicy = RetryPolicy(),  # noqa: B008 (frozen)
    ) -> None:
        self.folder = as_location(location)
        self.counters = Counters()
        self._cache: ShardCache | None = None
        self._settings = cache, policy
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._indexes = self._source(self.folder)
        self.manifest: Manifest = self._indexes.manifest()
        tars = tars_location(self.folder, self.manifest.tars)
        self._tars = self._indexes if tars == self.folder else self._source(tars)
        for source in self._remote_sources():
            source.serve(self.manifest)

    def _source(self, place: Path | str) -> LocalSource | RemoteSource:
        if isinstance(place, Path):
            return LocalSource(place)
        cache, policy = self._settings
        if self._cache is None:
            self._cache = ShardCache(cache)
        return RemoteSource(place, self._cache, policy, self.counters)

    def _remote_sources(self) -> list[RemoteSource]:
        sources = {id(source): source for source in (self._indexes, self._tars)}
        return [source for source in sources.values() if isinstance(source, RemoteSource)]

    @property
    def is_remote(self) -> bool:
        """Whether tars are fetched, so that ``prefetch`` does something."""
        return isinstance(self._tars, RemoteSource)

    @property
    def evictions(self) -> int:
        """Files that this process removed from the cache to make room."""
        return self._cache.evictions if self._cache else 0

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Samples of each shard, ``[S]``."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    def prefetch(self, shards: Sequence[int] | NDArray[np.int64]) -> None:
        """Fetch these shards ahead of need, in the order of their first use; returns at once.

        As many as fit into this process's share of the cache; they replace what was asked before.
        """
        if isinstance(self._tars, RemoteSource):
            infos = (self.manifest.shards[shard] for shard in shards)
            self._tars.prefetch(self._tars.fitting(infos))

    def require_room(self, shards: Sequence[int] | NDArray[np.int64], steps: int) -> None:
        """See that shards which are used together fit into the cache together.

        Raises:
            InputError: if they do not, so that each would be fetched again and again.
        """
        if not isinstance(self._tars, RemoteSource):
            return
        infos = [self.manifest.shards[shard] for shard in shards]
        fitting = len(self._tars.fitting(infos))
        if fitting < len(infos):
            needed = sum(info.bytes for info in infos) / GIB
            share = self._tars.share_bytes / GIB
            raise InputError(
                f"{steps} steps read from {len(infos)} shards of together {needed:.3g} GiB, and "
                f"only {fitting} fit into this process's {share:.3g} GiB of the cache: raise "
                "--data.cache-gib, or lower --data.window or --data.lanes"
            )

    def close(self) -> None:
        """Stop fetching; safe to call more than once. What was given stays valid."""
        for source in self._remote_sources():
            source.close()

    def records(self, shard: int) -> NDArray[np.void]:
        """The index of a shard (``shard_format.INDEX_RECORD``), one record for each sample.

        Raises:
            BadSampleError: if it cannot be had or is not the index of this shard.
        """
        opened = self._shard(shard)
        if opened.records is None:
            raise BadSampleError(opened.problem)
        return opened.records

    def picture(self, shard: int, index: int) -> Bytes:
        """The encoded bytes of a sample, read-only.

        Raises:
            BadSampleError: if the bytes are not the ones that were packed.
        """
        opened = self._shard(shard)
        if opened.records is None or opened.tar is None:
            raise BadSampleError(opened.problem)
        record = opened.records[index]
        if record["flags"] & FLAG_DROPPED:
            raise BadSampleError("dropped by its owner")
        start, size = int(record["block"]) * BLOCK_BYTES, int(record["size"])
        if start + size > self.manifest.shards[shard].bytes:
            raise BadSampleError(f"index points past the shard's end, to byte {start + size}")
        picture = self._bytes(shard, opened.tar, start, size)
        if len(picture) < size:
            here = opened.tar.size_bytes()
            raise BadSampleError(f"truncated shard: {here} bytes, needs {start + size}")
        crc32 = zlib.crc32(picture.data)
        if crc32 != record["crc32"]:
            raise BadSampleError(f"crc32 {crc32:08x}, packed as {int(record['crc32']):08x}")
        return picture

    def key(self, shard: int, index: int) -> str:
        """The sample's key in the tar, for messages; empty where it cannot be read."""
        opened = self._shard(shard)
        if opened.records is None or opened.tar is None:
            return ""
        end = int(opened.records[index]["block"]) * BLOCK_BYTES
        try:
            header = self._bytes(shard, opened.tar, end - BLOCK_BYTES, BLOCK_BYTES)
            member = tarfile.TarInfo.frombuf(header.tobytes(), "utf-8", "replace")
        except (tarfile.HeaderError, BadSampleError):
            return ""
        parts = split_name(member.name)
        return parts[0] if parts else member.name

    def _bytes(self, shard: int, tar: Tar, start: int, size: int) -> Bytes:
        try:
            return tar.read(start, size)
        except (OSError, RemoteError) as error:
            problem = f"unreadable shard: {error}"
            with self._lock:
                failed = OpenShard(self._open[shard].records if shard in self._open else None, None)
                self._open[shard] = OpenShard(failed.records, None, problem, time.monotonic())
            raise BadSampleError(problem) from error

    def _shard(self, shard: int) -> OpenShard:
        with self._lock:  # the reading thread and the repair of a failed batch share these
            opened = self._open.get(shard)
            if opened is not None:
                is_due = opened.problem and time.monotonic() - opened.opened_s > RETRY_AFTER_S
                if not is_due:
                    self._open.move_to_end(shard)
                    return opened
        opened = self._open_shard(self.manifest.shards[shard])  # may take long: without the lock
        with self._lock:
            self._open[shard] = opened
            self._open.move_to_end(shard)
            while len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def _open_shard(self, info: ShardInfo) -> OpenShard:
        now = time.monotonic()
        name = index_name(info.name)
        try:
            records = parse_index(self._indexes.index(info), name)
        except DataError:  # a full disk is no matter of one shard
            raise
        except (OSError, RemoteError, InputError) as error:
            return OpenShard(None, None, f"unreadable index: {error}", now)
        if len(records) != info.samples:
            problem = f"{name} has {len(records)} samples, the manifest says {info.samples}"
            return OpenShard(None, None, problem, now)
        try:
            return OpenShard(records, self._tars.tar(info))
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            return OpenShard(records, None, f"unreadable shard: {error}", now)
