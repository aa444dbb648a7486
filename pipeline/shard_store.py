"""The bytes of any sample of a folder of shards, by shard number and index; no copy, no parsing.

A local shard is mapped into memory and a picture is a view of the map: 264,000 pictures/s against
8,700 with ``tarfile``. Maps and indexes of the shards in use are kept, the least recently used go
first. Every read is checked against the index: bounds first, because touching a map past the end
of a truncated file kills the process, then the CRC, because a flipped bit decodes to garbage
without an error.
"""

import tarfile
import threading
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.program import InputError
from pipeline.shard_format import (
    BLOCK_BYTES,
    FLAG_DROPPED,
    Manifest,
    index_name,
    read_index,
    read_manifest,
)

Bytes = NDArray[np.uint8]

# Shards of a rank that are in use at once: about 17 a lane with the default window, few lanes.
OPEN_SHARDS = 512


class BadSampleError(Exception):
    """A sample that cannot be used; the message is the reason, for the quarantine log."""


@dataclass(frozen=True)
class OpenShard:
    """A shard in use: its records and its bytes (None where the tar could not be opened)."""

    records: NDArray[np.void]
    data: Bytes | None
    problem: str


class ShardStore:
    """Read access to the shards of one folder.

    Raises:
        InputError: if the folder is no finished set of shards or lacks an index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: Manifest = read_manifest(folder)
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        present = {path.name for path in folder.iterdir()}
        for shard in self.manifest.shards:
            index = index_name(shard.name)
            if index not in present:
                raise InputError(
                    f"{folder / index} is missing, so {shard.name} cannot be read: copy it "
                    "from where the shards were made, or pack again"
                )

    @property
    def shard_samples(self) -> NDArray[np.int64]:
        """Samples of each shard, ``[S]``."""
        return np.array([shard.samples for shard in self.manifest.shards], dtype=np.int64)

    def records(self, shard: int) -> NDArray[np.void]:
        """The index of a shard (``shard_format.INDEX_RECORD``), one record for each sample."""
        return self._shard(shard).records

    def picture(self, shard: int, index: int) -> Bytes:
        """The encoded bytes of a sample, a read-only view.

        Raises:
            BadSampleError: if the bytes are not the ones that were packed.
        """
        opened = self._shard(shard)
        record = opened.records[index]
        if opened.data is None:
            raise BadSampleError(opened.problem)
        if record["flags"] & FLAG_DROPPED:
            raise BadSampleError("dropped by its owner")
        start, size = int(record["block"]) * BLOCK_BYTES, int(record["size"])
        if start + size > len(opened.data):
            raise BadSampleError(f"truncated shard: {len(opened.data)} bytes, needs {start + size}")
        picture = opened.data[start : start + size]
        crc32 = zlib.crc32(picture.data)
        if crc32 != record["crc32"]:
            raise BadSampleError(f"crc32 {crc32:08x}, packed as {int(record['crc32']):08x}")
        return picture

    def key(self, shard: int, index: int) -> str:
        """The sample's key in the tar, for messages; empty where it cannot be read."""
        opened = self._shard(shard)
        if opened.data is None:
            return ""
        end = int(opened.records[index]["block"]) * BLOCK_BYTES
        try:
            header = tarfile.TarInfo.frombuf(
                opened.data[end - BLOCK_BYTES : end].tobytes(), "utf-8", "replace"
            )
        except tarfile.HeaderError:
            return ""
        return header.name.rpartition(".")[0]

    def _shard(self, shard: int) -> OpenShard:
        with self._lock:  # the reading thread and the repair of a failed batch share the maps
            return self._open_shard(shard)

    def _open_shard(self, shard: int) -> OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        info = self.manifest.shards[shard]
        path = self.folder / info.name
        index = path.with_name(index_name(info.name))
        records = read_index(index)
        if len(records) != info.samples:
            raise InputError(
                f"{index} has {len(records)} samples, the manifest says "
                f"{info.samples}: it belongs to another packing, copy the set again"
            )
        try:
            data, problem = np.memmap(path, dtype=np.uint8, mode="r"), ""
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            data, problem = None, f"unreadable shard: {error}"
        self._open[shard] = OpenShard(records, data, problem)
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[shard]
