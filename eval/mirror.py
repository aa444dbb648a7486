"""Copies of a run's checkpoints in an object store, for a machine that is lost with its disk.

Each checkpoint that stands in the run's folder is copied by a thread, while the run goes on: its
files first, each read back and compared, then what is new in the run's logs, then its manifest,
without which it is none. Old copies go by the rule of the old folders, once a new one stands.

Where checkpoints come faster than they can be copied, the newest one is copied next. A store that
is down costs a message; the checkpoint is tried again until it is copied, a newer one stands, or
the run is at its end.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from eval.log_copies import LogCopies, remove_old_logs
from eval.remote_checkpoints import complete_steps
from eval.run_folder import CONFIG_NAME, ENVIRONMENT_NAME
from eval.tracking import STATE_NAME
from model.checkpoint import (
    MANIFEST_NAME,
    CheckpointError,
    folder_name,
    parse_manifest,
    step_in,
)
from pipeline.remote_folder import RemoteError, RetryPolicy
from pipeline.writable_folder import WritableFolder

PATIENCE = RetryPolicy()
# From a failure, after all that patience, to the next try.
AGAIN_S, LOOK_S = 60.0, 0.5
BESIDE = (CONFIG_NAME, ENVIRONMENT_NAME, STATE_NAME)


class Mirror:
    """Copies the checkpoints that it is given, one at a time, the newest next.

    On a machine of several whose processes write no checkpoints it brings their logs alone.

    Args:
        url: of a folder in an object store, for this run alone.
        keep: copies that stay.
        logs: of this machine.
        say: prints a line; takes ``style``; called from the thread too.
        policy: of retries, for each checkpoint.
    """

    def __init__(
        self,
        url: str,
        *,
        keep: int,
        logs: LogCopies,
        say: Callable[..., None],
        policy: RetryPolicy | None = None,
    ) -> None:
        self.url = url
        self._keep = max(keep, 2)
        self._logs = logs
        self._is_first = logs.machine.first == 0
        self._what = "copy" if self._is_first else "logs"
        self._say = say
        self._policy = policy or PATIENCE
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._now: Path | None = None
        self._is_last = False
        self._thread: threading.Thread | None = None
        self._failed: Path | None = None
        self._copied: Path | None = None
        self._unlisted: frozenset[str] = frozenset()
        self._has_said_later = False

    @property
    def uncopied(self) -> Path | None:
        """The last checkpoint taken, after ``finish``, if it could not be copied."""
        return self._failed if self._is_first else None

    def take(self, folder: Path) -> None:
        """Copy a checkpoint, in this one's own time."""
        with self._changed:
            self._next = folder
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._copy_all, name="mirror")
                self._thread.start()

    def in_hand(self) -> frozenset[Path]:
        """Folders that must stay where they are until they are copied."""
        with self._changed:
            return frozenset(folder for folder in (self._now, self._next) if folder)

    def finish(self) -> None:
        """Wait for the last copy; one that failed is tried once more.

        What the run has logged since goes to that checkpoint too: a last kNN score takes long.
        """
        with self._changed:
            self._is_last = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None:
            names = ", ".join(sorted(folder.name for folder in self.in_hand()))
            if names and self._is_first:
                self._say(f"copying {names} to {self.url} ...")
            thread.join()
        self._is_last = False
        if self._copied is not None and self._failed is None:
            self._copy_last_logs(self._copied)

    def _copy_last_logs(self, folder: Path) -> None:
        remote = WritableFolder(self.url, self._policy)
        try:
            copy_beside(folder, remote, self._logs)
        except (RemoteError, OSError) as error:
            line = (
                f"what was logged after {folder.name} could not be copied to the mirror ({error})"
            )
            self._say(line, style="yellow")
        finally:
            remote.close()

    def _copy_all(self) -> None:
        while True:
            with self._changed:
                if self._next is not None:
                    self._now, self._next = self._next, None
                folder = self._now
                if folder is None:
                    self._thread = None
                    return
            may_help = self._try(folder)
            with self._changed:
                if not may_help or self._is_over():
                    self._now = None
                else:
                    self._wait()

    def _is_over(self) -> bool:
        """Whether the run is at its end, also one that an error ended."""
        return self._is_last or not threading.main_thread().is_alive()

    def _wait(self) -> None:
        """Until a newer checkpoint is there, the run is at its end, or the time is over."""
        for _ in range(round(AGAIN_S / LOOK_S)):
            if self._next is not None or self._is_over():
                return
            self._changed.wait(LOOK_S)

    def _try(self, folder: Path) -> bool:
        """Copy a checkpoint, or say why not; whether to try it again may help."""
        # Anew for each, so that one that failed does not take the next one's patience.
        remote = WritableFolder(self.url, self._policy)
        try:
            if self._is_first:
                self._copy(folder, remote)
            else:
                copy_beside(folder, remote, self._logs)
        except (RemoteError, OSError, CheckpointError) as error:
            self._tell(folder, error)
            return isinstance(error, RemoteError)
        finally:
            remote.close()
        if self._failed is not None:
            self._say(f"{self.url} serves again: it has the {self._what} of {folder.name}")
            self._failed = None
        self._copied = folder
        return False

    def _tell(self, folder: Path, error: Exception) -> None:
        before, self._failed = self._failed, folder
        if self._is_first and before != folder:
            line = f"{folder} could not be copied to the mirror ({error}); it stands here, the run"
            self._say(f"{line} goes on and it or a newer one is tried again", style="yellow")
        if not self._is_first and before is None:
            line = f"logs of this machine could not be copied to the mirror ({error}); the run goes"
            self._say(f"{line} on and they are tried again", style="yellow")

    def _copy(self, folder: Path, remote: WritableFolder) -> None:
        step = step_in(folder.name) or 0
        copy_checkpoint(folder, remote, self._logs)
        sizes = remote.tree()
        steps = complete_steps(sizes)
        if steps[-1:] > [step] and not self._has_said_later:
            self._has_said_later = True
            self._say(
                f"{self.url}/{folder_name(steps[-1])} is of a later step than {folder.name} here: "
                "if another machine has taken this run further, stop, and --resume goes on there",
                style="yellow",
            )
        remove_old(remote, sizes, step, self._keep)
        kept = complete_steps(remote.tree())
        self._unlisted = remove_old_logs(remote, step, kept, self._unlisted)


def copy_checkpoint(folder: Path, remote: WritableFolder, logs: LogCopies) -> None:
    """Put a checkpoint and its run's logs into a store, unless the same one is there.

    Raises:
        RemoteError: if it cannot be written or does not read back as it is here.
        OSError, CheckpointError: if it cannot be read here.
    """
    manifest = (folder / MANIFEST_NAME).read_bytes()
    files = parse_manifest(manifest, str(folder))
    last = f"{folder.name}/{MANIFEST_NAME}"
    present = remote.tree()
    if last in present:
        if remote.read(last) == manifest:
            return
        remote.delete([last])  # of a run that went on from before it; no mixture of both
    for name, entry in files.items():
        remote.write_checked(f"{folder.name}/{name}", folder / name, entry.sha256)
    copy_beside(folder, remote, logs)
    logs.await_others(step_in(folder.name) or 0, remote)
    remote.write(last, manifest)


def copy_beside(folder: Path, remote: WritableFolder, logs: LogCopies) -> None:
    """Put what a run has logged, as belonging to this checkpoint, and its settings into a store.

    Raises:
        RemoteError, OSError: as ``copy_checkpoint``.
    """
    if logs.machine.first == 0:
        for path in (folder.parent / name for name in BESIDE):
            if path.exists():
                remote.write(path.name, path.read_bytes())
    logs.copy(step_in(folder.name) or 0, remote, remote.tree())


def remove_old(remote: WritableFolder, sizes: dict[str, int], step: int, keep: int) -> None:
    """Take away the copies beyond ``keep`` and what uploads that were killed have left.

    Later ones than ``step`` stay: they are damaged, or it would have been resumed from them.

    Args:
        remote: the mirror.
        sizes: what is there.
        step: of the newest copy of this run.
        keep: copies that stay.

    Raises:
        RemoteError: if that is refused.
    """
    kept = [done for done in complete_steps(sizes) if done <= step][-keep:]
    old = [name for name in sizes if is_old(name, step, kept)]
    is_manifest = [name.endswith(MANIFEST_NAME) for name in old]
    remote.delete([name for name, first in zip(old, is_manifest, strict=True) if first])
    remote.delete([name for name, first in zip(old, is_manifest, strict=True) if not first])


def is_old(name: str, step: int, kept: list[int]) -> bool:
    """Whether a file belongs to a checkpoint up to ``step`` that is not kept."""
    found = step_in(name.split("/")[0]) if "/" in name else None
    return found is not None and found <= step and found not in kept
