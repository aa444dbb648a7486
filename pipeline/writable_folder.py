"""A folder of an object store that is written to."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import obstore

from pipeline.location import as_location
from pipeline.program import InputError
from pipeline.remote_folder import Counters, RemoteError, RemoteFolder, RetryPolicy, open_store

WRITABLE = ("s3://", "gs://")
PART_RETRIES = 2
PROBE_NAME = ".can-be-written"
# A start does not wait a minute and a half to say that a name is wrong.
AT_START = RetryPolicy(attempts=4, connect_s=5)


def writable_location(url: str) -> str:
    """The URL, without a slash at its end.

    Raises:
        InputError: if it is not of a service that can be written to.
    """
    location = as_location(url)
    if not isinstance(location, str) or not location.startswith(WRITABLE):
        raise InputError(f"{url}: give s3:// or gs://, a bucket and a folder")
    return location


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

    def write_checked(self, name: str, path: Path, sha256: str) -> None:
        """Likewise, and read it back.

        Raises:
            RemoteError: if it cannot be written, or what is there then has another SHA-256.
        """
        for _ in range(3):
            self.write(name, path)
            if self._insist(name, lambda: self._sha256_once(name)) == sha256:
                return
        raise RemoteError(f"{self.url}/{name}: what was written reads back with another sha256")

    def _sha256_once(self, name: str) -> str:
        digest, size = hashlib.sha256(), 0
        answer = obstore.get(self._store, name)
        for piece in answer.stream(min_chunk_size=1 << 20):
            digest.update(piece)
            size += len(piece)
        if size != answer.meta["size"]:
            raise RemoteError(f"{self.url}/{name}: the answer broke off at byte {size}")
        return digest.hexdigest()

    def delete(self, names: Sequence[str]) -> None:
        """Take files away; one that is not there is no error.

        Raises:
            RemoteError: if that is refused.
        """
        for name in names:
            self._insist(name, lambda name=name: obstore.delete(self._store, name))  # type: ignore[misc]


def require_writable(url: str, flag: str, policy: RetryPolicy = AT_START) -> None:
    """See that files can be written and deleted there, by doing it with a small one.

    Args:
        url: of a folder; it need not exist.
        flag: that named it, for the message.
        policy: how long to insist.

    Raises:
        InputError: if they cannot.
    """
    folder = WritableFolder(url, policy)
    try:
        folder.write(PROBE_NAME, b"")
        folder.delete([PROBE_NAME])
    except RemoteError as error:
        raise InputError(
            f"{flag} {url} cannot be written ({error}): check the URL and the credentials in the "
            "environment"
        ) from error
