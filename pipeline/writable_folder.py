"""A folder of an object store that is written to."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore

from pipeline.location import writable_location
from pipeline.program import InputError
from pipeline.remote_folder import (
    PART_BYTES,
    PARTS_AT_ONCE,
    Counters,
    DamagedError,
    RemoteError,
    RemoteFolder,
    RetryPolicy,
    open_store,
)

PART_RETRIES = 2
PROBE_NAME = ".can-be-written"
# For small requests: a start does not wait a minute and a half to say that a name is wrong, and no
# longer than that for a server that is silent, or the other processes would give up.
AT_START = RetryPolicy(attempts=4, connect_s=5, stalled_s=10, request_s=20)


class WritableFolder(RemoteFolder):
    """The files below one URL, to write them too.

    Args:
        url: of a folder; it need not exist.
        policy: of retries.
        counters: told of retries and of what is fetched.

    Raises:
        InputError: if the URL cannot be written to.
    """

    def __init__(self, url: str, policy: RetryPolicy, counters: Counters | None = None) -> None:
        super().__init__(writable_location(url), policy, counters or Counters())
        # Of a large file one part that fails is sent again, and not all of them.
        self._upload_store = open_store(self.url, policy, PART_RETRIES)

    def write(self, name: str, content: Path | bytes) -> None:
        """Put a local file or bytes there under this name; they appear whole or not at all.

        Raises:
            RemoteError: if it cannot be written.
        """
        self._insist(name, lambda: obstore.put(self._upload_store, name, content))

    def write_checked(self, name: str, content: Path | bytes, sha256: str) -> None:
        """Likewise, and read it back.

        Raises:
            RemoteError: if it cannot be written, or what is there then has another SHA-256.
        """
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        for _ in range(3):
            self.write(name, content)
            if self.file(name)[1] == size and self._sha256(name, size) == sha256:
                return
        raise RemoteError(f"{self.url}/{name}: what was written reads back with another sha256")

    def _sha256(self, name: str, size: int) -> str:
        """Of a file there, read in parts, a few of them at once."""
        digest, starts = hashlib.sha256(), range(0, size, PART_BYTES)

        def part(start: int) -> bytes:
            end = min(start + PART_BYTES, size)
            return self._insist(
                name, lambda: bytes(obstore.get_range(self._store, name, start=start, end=end))
            )

        with ThreadPoolExecutor(PARTS_AT_ONCE, thread_name_prefix="parts") as pool:
            for first in range(0, len(starts), PARTS_AT_ONCE):
                for piece in pool.map(part, starts[first : first + PARTS_AT_ONCE]):
                    digest.update(piece)
        return digest.hexdigest()

    def delete(self, names: Sequence[str]) -> None:
        """Take files away; one that is not there is no error.

        Raises:
            RemoteError: if that is refused.
        """
        if names:
            self._insist(names[0], lambda: obstore.delete(self._store, list(names)))


def require_writable(url: str, flag: str, policy: RetryPolicy = AT_START) -> None:
    """See that files can be written and deleted there.

    Args:
        url: of a folder; it need not exist.
        flag: that named it, for the message.
        policy: how long to insist.

    Raises:
        InputError: if they cannot.
    """
    try:
        try_writing(url, policy)
    except RemoteError as error:
        raise not_writable(url, flag, error) from error


def try_writing(url: str, policy: RetryPolicy) -> None:
    """Write a small file and delete it.

    Raises:
        RemoteError: if that cannot be done; a ``DamagedError`` if there is no such bucket.
    """
    folder = WritableFolder(url, policy)
    folder.write(PROBE_NAME, b"")
    folder.delete([PROBE_NAME])


def not_writable(url: str, flag: str, error: RemoteError) -> InputError:
    """The error for a place that this went wrong with."""
    reason = "there is no such bucket" if isinstance(error, DamagedError) else error
    return InputError(
        f"{flag} {url} cannot be written ({reason}): check the URL and the credentials in the "
        "environment"
    )
