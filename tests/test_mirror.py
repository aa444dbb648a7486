"""Copies of checkpoints in an object store: whole or not there, and good to go on from."""

import json
import os
import threading
import time

import pytest
import torch

from eval import mirror
from eval.log_copies import LogCopies, Machine
from eval.mirror import Mirror
from eval.remote_checkpoints import RemoteCheckpoints
from model.checkpoint import CheckpointError, folder_name, load_checkpoint, save_checkpoint
from model.run_state import Snapshot
from model.saving import Saver
from pipeline.program import InputError
from pipeline.remote_folder import RetryPolicy
from pipeline.writable_folder import require_writable

URL = "s3://bucket/runs/one"
QUICK = RetryPolicy(attempts=4, first_s=0.01, longest_s=0.05, connect_s=1, stalled_s=1, request_s=5)
IMPATIENT = RetryPolicy(attempts=1, connect_s=1)


def saved(run, step, size=2000):
    """A checkpoint with two files of tensors, and a log that has come as far."""
    weight = torch.arange(size, dtype=torch.float32) + step
    groups = {"encoder_q": {"weight": weight}, "queue": {"rows": -weight}}
    folder = save_checkpoint(run, step, groups, {"data": {}, "config": {}})
    lines = "".join(json.dumps({"step": n, "loss": 1.0}) + "\n" for n in range(1, step + 1))
    (run / "run.jsonl").write_text(lines)
    return folder


def mirror_for(run, said, keep=3, policy=QUICK, machine=Machine()):  # noqa: B008 (it is frozen)
    """A mirror of the run in this folder; what it says goes into ``said``."""
    logs = LogCopies(run, machine)

    def say(line, **_):
        said.append(line)

    return Mirror(URL, keep=keep, logs=logs, say=say, policy=policy)


@pytest.fixture
def copying():
    """``copying(*folders)`` copies these, one after the other; gives what went wrong."""

    def copy(*folders, keep=3, policy=QUICK):
        said = []
        for folder in folders:
            copies = mirror_for(folder.parent, said, keep, policy)
            copies.take(folder)
            copies.finish()
        wrong = [line for line in said if "could not be copied" in line]
        assert copies.uncopied == (folders[-1] if wrong else None)
        return wrong

    return copy


def steps_there():
    return RemoteCheckpoints(URL, QUICK).steps()


def fetched(step, run):
    remote = RemoteCheckpoints(URL, QUICK)
    return load_checkpoint(remote.fetch(remote.head(step), run))


def same_files(folder, other):
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.usefixtures("bucket")
def test_a_copy_comes_back_as_it_was_with_the_log(tmp_path, copying, monkeypatch):
    monkeypatch.setattr("pipeline.writable_folder.PART_BYTES", 700)  # more parts than at once
    folder, trackers = saved(tmp_path / "run", 7), '{"id": "0123abcd", "steps": {"loss": 7}}'
    (tmp_path / "run/trackers.json").write_text(trackers)
    assert copying(folder) == []
    assert fetched(7, tmp_path / "new").step == 7
    assert same_files(folder, tmp_path / "new" / folder.name)
    remote = RemoteCheckpoints(URL, QUICK)
    remote.fetch_beside(7, tmp_path / "new", Machine(), pytest.fail)
    assert same_files(tmp_path / "run" / folder.name, tmp_path / "new" / folder.name)
    assert (tmp_path / "new/run.jsonl").read_text() == (tmp_path / "run/run.jsonl").read_text()
    assert (tmp_path / "new/trackers.json").read_text() == trackers


def test_the_manifest_goes_last_and_without_it_nothing_is_there(
    bucket, store_proxy, tmp_path, copying
):
    first, second = (saved(tmp_path, step) for step in (1, 2))
    copying(first)
    one = len(store_proxy.writes)
    assert store_proxy.writes[-1] == (f"/bucket/runs/one/{first.name}/manifest.json", "PUT")
    for allowed in range(one - 1):
        store_proxy.writes.clear()
        store_proxy.write_fault = lambda number, _, last=allowed: (
            ("status", 403) if number >= last else None
        )
        assert len(copying(second)) == 1
        assert steps_there() == [1]
    assert bucket.names(f"runs/one/{second.name}/")
    store_proxy.write_fault = lambda *_: None
    assert copying(second) == []
    assert steps_there() == [1, 2]


def test_failing_answers_and_broken_connections_are_tried_again(store_proxy, tmp_path, copying):
    faults = [("status", 503), None, ("drop",), None, ("status", 500), None]
    store_proxy.write_fault = lambda number, _: faults[number % len(faults)]
    store_proxy.fault = lambda number, _: [("status", 503), None, ("cut", 100), None][number % 4]
    folder = saved(tmp_path / "run", 3)
    assert copying(folder, policy=RetryPolicy(**{**vars(QUICK), "attempts": 12})) == []
    assert len(store_proxy.writes) > 6
    store_proxy.fault = lambda *_: None
    fetched(3, tmp_path / "new")
    assert same_files(folder, tmp_path / "new" / folder.name)


def test_a_file_that_reads_back_otherwise_is_written_again(store_proxy, tmp_path, copying):
    folder = saved(tmp_path / "run", 3)
    store_proxy.write_fault = lambda number, _: ("flip",) if number == 0 else None
    assert copying(folder) == []
    fetched(3, tmp_path / "new")
    store_proxy.write_fault = lambda _, path: ("flip",) if "queue" in path else None
    [reason] = copying(saved(tmp_path / "run", 4))
    assert "reads back with another sha256" in reason
    assert steps_there() == [3]


def test_a_store_that_is_down_is_told_and_the_next_checkpoint_tried(store_proxy, tmp_path, copying):
    first, second = (saved(tmp_path, step) for step in (1, 2))
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    [line] = copying(first)
    assert line.startswith(f"{first} could not") and "503" in line and "tried 4 times" in line
    store_proxy.write_fault = store_proxy.fault = lambda *_: None
    assert copying(second) == []
    assert steps_there() == [2]


def test_as_many_copies_stay_as_checkpoints_and_none_of_what_a_kill_left(bucket, tmp_path, copying):
    bucket.write("runs/one/step-000000002/queue.safetensors", b"half of it")
    bucket.write("runs/one/step-000000009/queue.safetensors", b"of a later one")
    bucket.write("runs/one/notes/step-000000001", b"of somebody else")
    for step in (1, 3, 4, 5):
        copying(saved(tmp_path, step), keep=2)
    assert steps_there() == [4, 5]
    left = {name.split("/")[2] for name in bucket.names()}
    assert left == {"step-000000004", "step-000000005", "step-000000009", "notes", "logs"}


@pytest.mark.usefixtures("bucket")
def test_the_same_step_of_a_run_that_went_on_from_before_it_replaces_the_copy(tmp_path, copying):
    old, new = saved(tmp_path / "old", 2, size=10), saved(tmp_path / "new", 2, size=20)
    copying(old, new)
    fetched(2, tmp_path / "back")
    assert same_files(new, tmp_path / "back" / new.name)


def test_a_copy_that_is_there_is_not_made_again(store_proxy, tmp_path, copying):
    folder = saved(tmp_path, 2)
    copying(folder)
    store_proxy.writes.clear()
    copying(folder)
    assert not [path for path, _ in store_proxy.writes if f"/{folder.name}/" in path]


@pytest.mark.usefixtures("bucket")
def test_what_is_logged_after_the_last_checkpoint_was_copied_comes_too(tmp_path):
    said, folder = [], saved(tmp_path / "run", 2)
    copies = mirror_for(tmp_path / "run", said)
    copies.take(folder)
    deadline = time.monotonic() + 60
    while copies.in_hand() and time.monotonic() < deadline:
        time.sleep(0.01)
    with (tmp_path / "run/run.jsonl").open("a") as file:
        file.write('{"step": 2, "knn_top1": 0.9}\n')
    copies.finish()
    remote = RemoteCheckpoints(URL, QUICK)
    remote.fetch_beside(2, tmp_path / "new", Machine(), pytest.fail)
    assert (tmp_path / "new/run.jsonl").read_text() == (tmp_path / "run/run.jsonl").read_text()


class OneTensor:
    """A run state that holds a number."""

    def snapshot(self, step, identity):
        return Snapshot(step, {"encoder_q": {"weight": torch.full((4,), step)}}, identity)


@pytest.mark.usefixtures("bucket")
def test_the_loop_does_not_wait_for_copies_and_what_is_copied_stays(tmp_path, monkeypatch):
    go, copy, begun = threading.Event(), mirror.copy_checkpoint, []

    def held(folder, remote, logs):
        begun.append(folder.name)
        assert go.wait(60)
        copy(folder, remote, logs)

    monkeypatch.setattr(mirror, "copy_checkpoint", held)
    said = []

    def let_go(line):
        said.append(line)
        go.set()

    logs = LogCopies(tmp_path, Machine())
    copies = Mirror(URL, keep=2, logs=logs, say=let_go, policy=QUICK)
    saver = Saver(OneTensor(), tmp_path, keep=2, minutes=0, failed=pytest.fail, copies=copies)
    for step in range(1, 6):
        saver.save(step, {})
    saver._join()
    here = sorted(path.name for path in tmp_path.iterdir())
    assert here == [folder_name(step) for step in (1, 4, 5)]  # the first is in hand
    saver.finish()
    assert said == [f"copying {folder_name(1)}, {folder_name(5)} to {URL} ..."]
    assert begun == [folder_name(1), folder_name(5)]  # those between were overtaken
    assert steps_there() == [1, 5] and saver.uncopied is None


@pytest.mark.usefixtures("bucket")
def test_a_checkpoint_is_tried_again_until_the_store_is_back(store_proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "LOOK_S", 0.01)
    monkeypatch.setattr(mirror, "AGAIN_S", 0.02)
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    said, folder = [], saved(tmp_path, 1)
    copies = mirror_for(tmp_path, said)
    copies.take(folder)
    deadline = time.monotonic() + 60
    while len(store_proxy.requests) < 3 * QUICK.attempts and time.monotonic() < deadline:
        time.sleep(0.01)
    assert copies.in_hand() == {folder} and len(said) == 1  # told once, however often it is tried
    store_proxy.write_fault = store_proxy.fault = lambda *_: None
    while copies.in_hand() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps_there() == [1] and copies.uncopied is None
    assert said[1:] == [f"{URL} serves again: it has the copy of {folder.name}"]


def test_a_newer_checkpoint_takes_the_place_of_one_that_is_tried_again(store_proxy, tmp_path):
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    said, folders = [], [saved(tmp_path, step) for step in (1, 2)]
    copies = mirror_for(tmp_path, said)
    copies.take(folders[0])
    deadline = time.monotonic() + 60
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    store_proxy.write_fault = store_proxy.fault = lambda *_: None
    copies.take(folders[1])
    deadline = time.monotonic() + mirror.AGAIN_S / 3  # long before the first would be tried again
    while copies.in_hand() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert steps_there() == [2] and copies.uncopied is None


def test_a_machine_without_checkpoints_brings_its_logs_and_says_once_that_it_cannot(
    store_proxy, bucket, tmp_path
):
    (tmp_path / "samples-2.jsonl").write_text('{"step": 1}\n')
    said = []
    copies = mirror_for(tmp_path, said, machine=Machine(2, 2, 4))
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    for step in (1, 2, 3):
        if step == 3:
            store_proxy.write_fault = store_proxy.fault = lambda *_: None
        copies.take(tmp_path / folder_name(step))
        copies.finish()
    assert "logs of this machine could not" in said[0] and copies.uncopied is None
    assert said[1:] == [f"{URL} serves again: it has the logs of {folder_name(3)}"]
    names = [name.removeprefix("runs/one/logs/").split("-")[0] for name in bucket.names()]
    assert names == ["samples", "step"] and steps_there() == []


def test_a_run_that_an_error_ends_copies_what_it_has_saved(bucket, tmp_path):
    said = []
    saver = Saver(
        OneTensor(),
        tmp_path,
        keep=2,
        minutes=0,
        failed=pytest.fail,
        copies=mirror_for(tmp_path, said),
    )
    with pytest.raises(KeyError), saver:
        saver.save(1, {})
        raise KeyError
    assert bucket.read(f"runs/one/{folder_name(1)}/manifest.json")


@pytest.mark.usefixtures("bucket")
def test_a_later_copy_of_another_machine_is_told_and_stays(tmp_path, copying):
    later = saved(tmp_path / "there", 9)
    copying(later)
    said = []
    copies = mirror_for(tmp_path / "here", said, keep=2)
    for step in (1, 2, 3):
        copies.take(saved(tmp_path / "here", step))
        copies.finish()
    [line] = [line for line in said if "later step" in line]
    assert line.startswith(f"{URL}/{later.name} is of a later step than step-000000001")
    assert steps_there() == [2, 3, 9]


# What is fetched is checked ----------------------------------------------------------------------


def damaged(bucket, name, content):
    bucket.write(f"runs/one/{folder_name(3)}/{name}", content)


def flipped(bucket):
    content = bytearray(bucket.read(f"runs/one/{folder_name(3)}/queue.safetensors"))
    content[-5] ^= 1
    damaged(bucket, "queue.safetensors", bytes(content))


def with_manifest(change):
    def damage(bucket):
        manifest = json.loads(bucket.read(f"runs/one/{folder_name(3)}/manifest.json"))
        change(manifest)
        damaged(bucket, "manifest.json", json.dumps(manifest).encode())

    return damage


DAMAGES = {
    "a flipped bit": (flipped, "sha256"),
    "cut off": (lambda b: damaged(b, "queue.safetensors", b"cut off"), "has 7 bytes"),
    "gone": (lambda b: b.delete(f"runs/one/{folder_name(3)}/queue.safetensors"), "queue"),
    "another state": (lambda b: damaged(b, "state.json", b'{"step": 3}'), "checksum differs"),
    "no JSON": (lambda b: damaged(b, "manifest.json", b"\x80\x04"), "not a checkpoint"),
    "a manifest without end": (
        lambda b: damaged(b, "manifest.json", b" " * (1 << 20) + b"{}"),
        "more than 1048576",
    ),
    "a pickle": (
        with_manifest(lambda m: m["files"].update({"x.pkl": {"bytes": 1, "sha256": ""}})),
        "x.pkl",
    ),
    "a way out": (
        with_manifest(lambda m: m["files"].update({"../x.json": {"bytes": 1, "sha256": ""}})),
        "../x.json",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_copy_is_refused_and_leaves_nothing(what, bucket, tmp_path, copying):
    copying(saved(tmp_path / "run", 3))
    damage, message = DAMAGES[what]
    damage(bucket)
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        fetched(3, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(bucket, tmp_path, copying):
    copying(saved(tmp_path / "run", 3))
    with_manifest(lambda m: m["files"]["queue.safetensors"].update(bytes=1 << 60))(bucket)
    with pytest.raises(InputError, match="has not so much room"):
        fetched(3, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_a_killed_fetch_left_goes_with_the_next_one(bucket, tmp_path, copying):
    folder = saved(tmp_path / "run", 3)
    copying(folder)
    left = tmp_path / "new" / f".{folder.name}.{os.uname().nodename}-1.part"
    left.mkdir(parents=True)
    (tmp_path / "new" / folder.name).mkdir()  # a damaged one
    fetched(3, tmp_path / "new")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [folder.name]
    assert bucket.names()


@pytest.mark.usefixtures("bucket")
def test_a_place_that_cannot_be_written_is_named_with_its_flag(monkeypatch):
    with pytest.raises(InputError, match=r"--mirror s3://nowhere/run .* no such bucket"):
        require_writable("s3://nowhere/run", "--mirror", IMPATIENT)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"\(no credentials: .*\): check the URL and the"):
        require_writable("s3://bucket/run", "--mirror", IMPATIENT)
