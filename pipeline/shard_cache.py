"""A folder of whole files that were fetched, never larger than its limit, shared by processes.

A file is ``KEY``; while it is fetched it is ``KEY.part``, which has its full size from the first
moment, so the sizes in the folder are the account: nothing is kept beside them that a crash could
make wrong. Four rules:

- Who makes room and creates a ``.part`` holds the lock of the file ``.lock`` meanwhile.
- Who fetches holds an exclusive lock on the ``.part``. One without a holder is a dead process's
  and is removed by the next who needs room.
- Who reads holds a shared lock on the file, for the length of one read. Only a file that nobody
  holds is removed, because one that is open goes on using the disk after its removal.
- Least recently used is the oldest modification time, which readers set.

The locks are ``flock``: they belong to an open file, so they also hold between threads, and the
kernel drops them when a process dies.
"""

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pipeline.local_tar import file_system, is_network
from pipeline.program import DataError, InputError

GIB = 1 << 30
PART = ".part"
POLL_S = 0.02
TOUCH_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Where copies of remote shards are kept on this machine, and how much of them."""

    folder: Path | None = None
    """On a local disk; None: mocostream in the user's cache folder."""
    gib: float = 100.0
    """Limit of all files in it together."""

    @property
    def place(self) -> Path:
        """The folder, by the rules of the XDG base directory specification."""
        if self.folder is not None:
            return self.folder
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(home) / "mocostream"


class NoRoomError(Exception):
    """The limit does not leave room now; what is there is in use or being fetched."""


class ShardCache:
    """The files of a ``CacheConfig``.

    Args:
        config: folder and limit.
        room_timeout_s: how long ``fetch`` waits for room or for another process's download.

    Raises:
        InputError: if the folder is on a network mount, or the limit is no size.
    """

    def __init__(self, config: CacheConfig, room_timeout_s: float = 1800.0) -> None:
        self.folder = config.place
        self.limit_bytes = int(config.gib * GIB)
        self._room_timeout_s = room_timeout_s
        self._touched: dict[str, float] = {}
        self.evictions = 0
        if self.limit_bytes <= 0:
            raise InputError(f"--data.cache-gib {config.gib}: give a size above 0")
        kind = file_system(self.folder)
        # FUSE is let in here: it is the root of many containers, and locks work there.
        if is_network(kind) and not kind.startswith("fuse"):
            raise InputError(
                f"--data.cache {self.folder} is on a network mount ({kind}): choose a folder on a "
                "local disk"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = self.folder / ".lock"
        with self._bookkeeping():  # also sees that the folder can be written
            self._make_room(0)

    def holds(self, key: str) -> bool:
        """Whether a file is there; it is then as good as used just now."""
        path = self.folder / key
        try:
            self._touch(path)
        except FileNotFoundError:
            return False
        return True

    def read(self, key: str, start: int, size: int) -> bytes | None:
        """Bytes of a file, fewer at its end; None where it is not there.

        Raises:
            OSError: if the disk fails.
        """
        handle = self._open(key)
        if handle is None:
            return None
        try:
            return os.pread(handle, size, start)
        finally:
            os.close(handle)

    def fetch(
        self,
        key: str,
        size: int,
        download: Callable[[int], None],
        *,
        may_wait: bool,
        read: tuple[int, int] = (0, 0),
    ) -> bytes:
        """See that a file is there, and read from it before anybody can remove it again.

        Args:
            key: its name.
            size: its bytes.
            download: fills the open file that it is given, or raises; by one process at a time.
            may_wait: for room; else it is asked for at once or not at all.
            read: start and size of what is read.

        Raises:
            NoRoomError: without ``may_wait``, if there is none.
            DataError: if there is no room for a long time, or the disk is full.
        """
        deadline = time.monotonic() + self._room_timeout_s
        while True:
            handle = self._open(key)
            if handle is None:
                handle = self._begin(key, size)
                if handle is not None:
                    self._fill(key, handle, download)
            if handle is not None:
                try:
                    return os.pread(handle, read[1], read[0])
                finally:
                    os.close(handle)
            is_elsewhere = (self.folder / (key + PART)).exists()
            if not may_wait and not is_elsewhere:
                raise NoRoomError
            if time.monotonic() > deadline:
                raise DataError(
                    f"--data.cache {self.folder}: no room for {size:,} bytes in "
                    f"{self._room_timeout_s:.0f} s, its files are in use or being fetched: raise "
                    "--data.cache-gib"
                )
            time.sleep(POLL_S)

    def _open(self, key: str) -> int | None:
        """The file, open and locked against removal; closing it unlocks it."""
        path = self.folder / key
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle).st_nlink == 0:  # removed between the two lines above
            os.close(handle)
            return None
        with suppress(FileNotFoundError):
            self._touch(path)
        return handle

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path.name, -TOUCH_EVERY_S) < TOUCH_EVERY_S:
            path.stat()
            return
        os.utime(path)
        self._touched[path.name] = now

    def _begin(self, key: str, size: int) -> int | None:
        """An empty ``.part`` of the full size, locked; None if it is being fetched or no room."""
        part = self.folder / (key + PART)
        with self._bookkeeping():
            if (self.folder / key).exists() or self._is_held(part):
                return None
            if not self._make_room(size):
                return None
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX)
            try:
                self._allocate(handle, size)
            except BaseException:
                part.unlink()
                os.close(handle)
                raise
        return handle

    def _allocate(self, handle: int, size: int) -> None:
        """Take the disk space now, so that a full disk shows before anything is fetched."""
        for attempt in (1, 2):
            try:
                if hasattr(os, "posix_fallocate") and size:
                    os.posix_fallocate(handle, 0, size)
                else:
                    os.ftruncate(handle, size)
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                os.ftruncate(handle, 0)
                if attempt == 2 or not self._evict(size):
                    raise self._disk_full(size) from error

    def _disk_full(self, size: int) -> DataError:
        return DataError(
            f"--data.cache {self.folder}: the disk is full, {size:,} bytes are needed: free some "
            "space, choose a folder on another disk, or lower --data.cache-gib"
        )

    def _fill(self, key: str, handle: int, download: Callable[[int], None]) -> None:
        part = self.folder / (key + PART)
        try:
            download(handle)
            with self._bookkeeping():  # else a scan might meet neither name, and count neither
                part.rename(self.folder / key)
        except BaseException as error:
            part.unlink(missing_ok=True)
            size = os.fstat(handle).st_size
            os.close(handle)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._disk_full(size) from error
            raise
        # Not downgraded to a shared lock, which may let go for a moment: whoever wants to read
        # waits for the one read that follows.

    def _make_room(self, need: int) -> bool:
        """Whether so many bytes fit below the limit, after removing what nobody holds."""
        total = 0
        for path, status in self._files():
            if path.suffix == PART and not self._is_held(path):
                continue
            total += status.st_size
        excess = total + need - self.limit_bytes
        return excess <= 0 or (need <= self.limit_bytes and self._evict(excess))

    def _evict(self, excess: int) -> bool:
        """Whether at least so many bytes were removed, the least recently used files first."""
        finished = [(s.st_mtime_ns, s.st_size, p) for p, s in self._files() if p.suffix != PART]
        for _, size, path in sorted(finished):
            if excess <= 0:
                break
            if self._remove_unless_held(path):
                self.evictions += 1
                self._touched.pop(path.name, None)
                excess -= size
        return excess <= 0

    def _is_held(self, part: Path) -> bool:
        """Whether somebody is fetching into it; what a dead process left is removed."""
        return part.exists() and not self._remove_unless_held(part)

    def _remove_unless_held(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):  # a finished .part gets its name meanwhile
                if entry.name != self._lock.name and entry.is_file(follow_symlinks=False):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)

    @contextmanager
    def _bookkeeping(self) -> Iterator[None]:
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
