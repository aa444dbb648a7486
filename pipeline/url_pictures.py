"""Single pictures behind URLs, for packing them; training never asks for one at a time."""

import functools

from pipeline.remote_folder import Counters, RemoteError, RemoteFolder, RetryPolicy
from pipeline.validate import RefusedError

FOLDERS_AT_ONCE = 64  # whose connections are kept


def fetch(url: str) -> bytes:
    """The bytes of a picture, with the retries of all remote reading.

    Raises:
        RefusedError: if it cannot be had.
    """
    folder, _, name = url.rpartition("/")
    try:
        return _remote(folder).read(name)
    except RemoteError as error:
        raise RefusedError(f"cannot be fetched: {error}") from None


@functools.lru_cache(maxsize=FOLDERS_AT_ONCE)
def _remote(folder: str) -> RemoteFolder:
    return RemoteFolder(folder, RetryPolicy(), Counters())
