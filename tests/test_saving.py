"""Saving beside the training: what the loop waits for, and what a failing disk costs."""

import resource
import signal
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

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


def test_saves_that_come_faster_than_the_disk_writes_are_all_written_one_at_a_time(
    state, tmp_path, monkeypatch
):
    write, alive = saving.save_checkpoint, []

    def slow(run, step, tensors, *rest):
        alive.append([thread.name for thread in threading.enumerate()].count("saver"))
        time.sleep(0.02)
        return write(run, step, tensors, *rest)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    saver = Saver(state, tmp_path, keep=9, minutes=0, failed=pytest.fail)
    for step in range(1, 7):
        state.now.fill_(step)
        saver.save(step, {})
    saver.finish()
    assert alive == [1] * 6
    assert [saved_value(tmp_path, step) for step in range(1, 7)] == [1, 2, 3, 4, 5, 6]


def test_waiting_for_the_disk_is_said_and_again_at_ten_times_as_much(state, tmp_path, monkeypatch):
    now, told = [0.0], []

    class ASecondToWrite:
        """A thread that writes when it is waited for, and no sooner."""

        def __init__(self, target, args, **_):
            self.work = lambda: target(*args)

        def start(self):
            pass

        def join(self):
            now[0] += 1
            self.work()

    monkeypatch.setattr(saving, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(saving, "threading", SimpleNamespace(Thread=ASecondToWrite))
    waited = lambda *what: told.append(what)  # noqa: E731
    saver = Saver(state, tmp_path, keep=3, minutes=0, failed=pytest.fail, waited=waited)
    for step in range(1, 13):
        saver.save(step, {})
        now[0] += 100  # between two saves the loop waits for nothing
    saver.finish()
    assert told == [(2, 1.0), (11, 10.0)]


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
