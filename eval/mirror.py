"""Copies of a run's checkpoints in an object store, for a machine that is lost with its disk.

Each checkpoint that stands in the run's folder is copied by a thread, while the run goes on: its
files first, each read back and compared, then the run's logs, then its manifest, without which it
is none. Old copies go by the rule of the old folders, once a new one stands. Where checkpoints come
faster than they can be copied, the newest one is copied next. A store that is down costs a message;
the next checkpoint is tried again.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from eval.remote_checkpoints import LOG_PATTERNS, complete_steps
from eval.run_folder import CONFIG_NAME, ENVIRONMENT_NAME
from model.checkpoint import MANIFEST_NAME, CheckpointError, parse_manifest, step_in
from pipeline.remote_folder import RemoteError, RetryPolicy
from pipeline.writable_folder import WritableFolder

PATIENCE = RetryPolicy()
BESIDE = (CONFIG_NAME, ENVIRONMENT_NAME, *LOG_PATTERNS)


class Mirror:
    """Copies the checkpoints that it is given, one at a time, the newest next.

    Args:
        url: of a folder in an object store, for this run alone.
        keep: copies that stay.
        failed: told of a checkpoint's folder that could not be copied, and why; from the thread.
        awaited: told of folders that ``finish`` waits for.
        policy: of retries, for each checkpoint.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int,
        failed: Callable[[Path, str], None],
        awaited: Callable[[frozenset[Path]], None] = lambda _: None,
        policy: RetryPolicy | None = None,
    ) -> None:
        self.url = url
        self._keep = max(keep, 2)
        self._failed = failed
        self._awaited = awaited
        self._policy = policy or PATIENCE
        self._lock = threading.Lock()
        self._next: Path | None = None
        self._now: Path | None = None
        self._thread: threading.Thread | None = None
        self.uncopied: Path | None = None

    def take(self, folder: Path) -> None:
        """Copy a checkpoint, in this one's own time."""
        with self._lock:
            self._next = folder
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._copy_all, name="mirror")
                self._thread.start()

    def in_hand(self) -> frozenset[Path]:
        """Folders that must stay where they are until they are copied."""
        with self._lock:
            return frozenset(folder for folder in (self._now, self._next) if folder)

    def finish(self) -> None:
        """Wait for the last copy."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            self._awaited(self.in_hand())
            thread.join()

    def _copy_all(self) -> None:
        while True:
            with self._lock:
                self._now, self._next = self._next, None
                if self._now is None:
                    self._thread = None
                    return
                folder = self.uncopied = self._now
            # Anew for each, so that one that failed does not take the next one's patience.
            remote = WritableFolder(self.url, self._policy)
            try:
                copy_checkpoint(folder, remote)
                remove_old(remote, step_in(folder.name) or 0, self._keep)
                self.uncopied = None
            except (RemoteError, OSError, CheckpointError) as error:
                self._failed(folder, str(error))
            finally:
                remote.close()


def copy_checkpoint(folder: Path, remote: WritableFolder) -> None:
    """Put a checkpoint and its run's logs into a store, unless the same one is there.

    Raises:
        RemoteError: if it cannot be written or does not read back as it is here.
        OSError, CheckpointError: if it cannot be read here.
    """
    manifest = (folder / MANIFEST_NAME).read_bytes()
    files = parse_manifest(manifest, str(folder))
    last = f"{folder.name}/{MANIFEST_NAME}"
    if last in remote.tree():
        if remote.read(last) == manifest:
            return
        remote.delete([last])  # of a run that went on from before it; no mixture of both
    for name, entry in files.items():
        remote.write_checked(f"{folder.name}/{name}", folder / name, entry.sha256)
    for pattern in BESIDE:
        for path in sorted(folder.parent.glob(pattern)):
            remote.write(path.name, path.read_bytes())  # read at once: the run writes on
    remote.write(last, manifest)


def remove_old(remote: WritableFolder, step: int, keep: int) -> None:
    """Take away the copies beyond ``keep`` and what uploads that were killed have left.

    Later ones than ``step`` stay: they are damaged, or it would have been resumed from them.

    Raises:
        RemoteError: if that is refused.
    """
    sizes = remote.tree()
    kept = [done for done in complete_steps(sizes) if done <= step][-keep:]
    old = [name for name in sizes if is_old(name, step, kept)]
    is_manifest = [name.endswith(MANIFEST_NAME) for name in old]
    remote.delete([name for name, first in zip(old, is_manifest, strict=True) if first])
    remote.delete([name for name, first in zip(old, is_manifest, strict=True) if not first])


def is_old(name: str, step: int, kept: list[int]) -> bool:
    """Whether a file belongs to a checkpoint up to ``step`` that is not kept."""
    found = step_in(name.split("/")[0]) if "/" in name else None
    return found is not None and found <= step and found not in kept
