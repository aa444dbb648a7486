"""Put a finished set into an object store; its manifest goes last, so that a half is no set."""

from collections.abc import Iterator
from pathlib import Path

from pipeline.program import InputError
from pipeline.remote_folder import RemoteError, RemoteFolder, RetryPolicy
from pipeline.shard_format import MANIFEST_NAME, index_name, read_manifest
from pipeline.writable_folder import WritableFolder


def upload(folder: Path, url: str) -> Iterator[Path]:
    """Upload the files of a set; gives each when it is there. Begun again, it writes all anew.

    Raises:
        InputError: if there is no set, its tars lie elsewhere, the URL cannot be written to, or
            another set is there.
    """
    manifest = read_manifest(folder)
    if manifest.tars:
        raise InputError(f"{folder}: its tars are at {manifest.tars}: upload them with its files")
    remote = WritableFolder(url, RetryPolicy())
    names = [name for shard in manifest.shards for name in (shard.name, index_name(shard.name))]
    names += sorted(path.name for path in folder.glob("*.jsonl"))
    try:
        _refuse_other(remote, (folder / MANIFEST_NAME).read_bytes())
        for name in (*names, MANIFEST_NAME):
            remote.write(name, folder / name)
            yield folder / name
    except RemoteError as error:
        raise InputError(f"{url} cannot be written: {error}") from error
    finally:
        remote.close()


def _refuse_other(remote: RemoteFolder, manifest: bytes) -> None:
    try:
        there = remote.read(MANIFEST_NAME)
    except RemoteError:  # not there, or the first write will say what is wrong
        return
    if there != manifest:
        raise InputError(f"{remote.url} already holds another set: choose a new folder")
