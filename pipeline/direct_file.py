"""A large file that goes to the disk while it is being made, and not through the page cache.

``fsync`` waits for all pages of a file, and filling them costs a copy. Here a thread hands full
buffers to the disk (``O_DIRECT``) while the next one is filled, so that little is left to wait for
at the end: half a GB costs 0.02 s of processor time, through the page cache 0.12 s and 0.15 s of
waiting (``tests/bench/RESULTS.md``). Where the file system has no such way, or a length does not
fit it, the same bytes go through the page cache.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BUFFER_BYTES = 4 << 20
O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux alone has it


class DirectFile:
    """A file that is appended to. It is on the disk when ``finish`` has returned."""

    def __init__(self, path: Path) -> None:
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._handle = os.open(path, flags | O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._handle = os.open(path, flags, 0o666)
        # One is filled while the other is written.
        self._buffers = [memoryview(_aligned_buffer()) for _ in range(2)]
        self._filled = self._written = 0
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def write(self, data: bytes) -> None:
        """Append.

        Raises:
            OSError: if this or an earlier part cannot be written.
        """
        done = 0
        while done < len(data):
            count = min(len(data) - done, BUFFER_BYTES - self._filled)
            piece = data if count == len(data) else data[done : done + count]
            self._buffers[0][self._filled : self._filled + count] = piece
            self._filled += count
            done += count
            if self._filled == BUFFER_BYTES:
                self._wait()
                self._writing = self._thread.submit(self._write, self._buffers[0], self._written)
                self._buffers.reverse()
                self._written, self._filled = self._written + BUFFER_BYTES, 0

    def finish(self) -> None:
        """Write what is left and wait for the disk.

        Raises:
            OSError: if it cannot be written.
        """
        self._wait()
        self._through_the_cache()  # the end need not be a whole number of blocks
        self._write(self._buffers[0][: self._filled], self._written)
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file, whether or not it is finished."""
        self._thread.shutdown()
        os.close(self._handle)

    def _wait(self) -> None:
        if self._writing:
            self._writing.result()

    def _write(self, data: memoryview, place: int) -> None:
        while data:
            try:
                count = os.pwrite(self._handle, data, place)
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_the_cache():
                    raise
                continue
            data, place = data[count:], place + count

    def _through_the_cache(self) -> bool:
        """From now on; False if it went that way already."""
        flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
        fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~O_DIRECT)
        return bool(flags & O_DIRECT)


def _aligned_buffer() -> mmap.mmap:
    """Memory that begins with a page, as O_DIRECT asks for; large pages are quicker to make."""
    buffer = mmap.mmap(-1, BUFFER_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            buffer.madvise(mmap.MADV_HUGEPAGE)
    return buffer


@contextlib.contextmanager
def direct_file(path: Path) -> Iterator[DirectFile]:
    """A new file of that name, which is on the disk when the body has ended without an error."""
    file = DirectFile(path)
    try:
        yield file
        file.finish()
    finally:
        file.close()
