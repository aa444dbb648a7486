"""Saving beside the training: what the loop waits for, and what a failing disk costs."""

import resource
import signal
import threading
from contextlib import contextmanager

import pytest
import torch

from model import saving
from model.checkpoint import checkpoint_folders, load_checkpoint
from model.run_state import Snapshot
from model.saving import Saver

PATIENCE_S = 60


class OneTensor:
    """A run state that holds a number, copied like a real one: into the same memory each time."""

    def __init__(self, size=1):
        self.now = torch.zeros(size)
        self._host = torch.empty(size)

    def snapshot(self, step, identity):
        self._host.copy_(self.now)
        return Snapshot(step, {"encoder_q": {"weight": self._host}}, identity)


@pytest.fixture
def state():
    return OneTensor()


def saver_of(state, run, minutes=0.0):
    said = []
    saver = Saver(state, run, keep=3, minutes=minutes, failed=lambda *what: said.append(what))
    return saver, said


def saved_value(run, step):
    return load_checkpoint(run / f"step-{step:09d}").tensors["encoder_q"]["weight"][0].item()


@pytest.fixture
def held_writes(monkeypatch):
    """Writes begin only once this event is set."""
    go, write = threading.Event(), saving.save_checkpoint

    def held(*arguments):
        assert go.wait(PATIENCE_S)
        return write(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", held)
    return go


def test_the_loop_goes_on_while_a_checkpoint_is_written(state, tmp_path, held_writes):
    saver, _ = saver_of(state, tmp_path)
    state.now.fill_(1.0)
    saver.save(1, {})
    state.now.fill_(2.0)  # the next step, before anything was written
    assert checkpoint_folders(tmp_path) == []
    held_writes.set()
    saver.finish()
    assert saved_value(tmp_path, 1) == 1.0


def test_a_save_does_not_overwrite_the_copy_of_one_that_is_being_written(
    state, tmp_path, held_writes
):
    saver, _ = saver_of(state, tmp_path)
    state.now.fill_(1.0)
    saver.save(1, {})
    state.now.fill_(2.0)
    threading.Timer(0.2, held_writes.set).start()
    saver.save(2, {})  # waits for the first one
    assert saved_value(tmp_path, 1) == 1.0
    saver.finish()
    assert saved_value(tmp_path, 2) == 2.0


@contextmanager
def largest_file(size_bytes):
    """A disk, as it were, that takes no file above this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGXFSZ, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_costs_one_save_and_is_told(tmp_path):
    saver, said = saver_of(OneTensor(100_000), tmp_path)
    saver.save(1, {})
    saver.finish()
    with largest_file(50_000):
        saver.save(2, {})
        with pytest.raises(OSError, match="File too large"):
            saver.finish()
    assert [step for step, _ in said] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    saver.save(3, {})  # there is room again: nothing is left of the failure
    saver.finish()
    assert [step for step, _ in checkpoint_folders(tmp_path)] == [1, 3]


def test_a_save_that_the_disk_has_no_room_for_writes_nothing(state, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: Full)
    saver, said = saver_of(state, tmp_path)
    saver.save(1, {})
    with pytest.raises(OSError, match="No space left"):
        saver.finish()
    assert len(said) == 1
    assert list(tmp_path.iterdir()) == []


class Full:
    """What ``shutil.disk_usage`` says of a full disk."""

    free = 0


def test_a_defect_in_a_save_ends_the_run_at_the_next_one(state, tmp_path):
    saver, _ = saver_of(state, tmp_path)
    saver.save(1, {"a function": print})
    with pytest.raises(TypeError):
        saver.save(2, {})


def test_the_clock_asks_for_a_save_once_the_minutes_are_over_and_none_is_under_way(
    state, tmp_path, monkeypatch, held_writes
):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    saver, _ = saver_of(state, tmp_path, minutes=0.5)
    never, _ = saver_of(state, tmp_path)
    now[0] += 29
    assert not saver.is_wanted()
    now[0] += 1
    assert saver.is_wanted() and not never.is_wanted()
    saver.save(1, {})
    now[0] += 31
    assert not saver.is_wanted()  # the one before is not written yet
    held_writes.set()
    saver.finish()
    assert saver.is_wanted()
    saver.save(2, {})
    saver.finish()
    now[0] += 29
    assert not saver.is_wanted()
