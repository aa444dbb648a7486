"""Logs in a mirror: those of a checkpoint come back, and only what is new is uploaded."""

import hashlib

import pytest

from eval import log_copies
from eval.log_copies import (
    LOG_PATTERN,
    LogCopies,
    Machine,
    fetch_logs,
    list_name,
    lists_for,
    remove_old_logs,
)
from pipeline.remote_folder import RemoteError, RetryPolicy
from pipeline.writable_folder import WritableFolder

URL = "s3://bucket/run"
QUICK = RetryPolicy(attempts=2, first_s=0.01, longest_s=0.02, connect_s=1)
EVENTS = "tensorboard/events.out.tfevents.1764000000.host-1.17.0"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(log_copies, "PART_BYTES", 100)


@pytest.fixture
def remote(bucket):  # noqa: ARG001 (the environment leads to it)
    return WritableFolder(URL, QUICK)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    return folder


def fetched(remote, step, folder, machine=None):
    """The logs of a step on a machine without any, by name; and what was said."""
    said = []
    fetch_logs(remote, step, folder, machine or Machine(), said.append)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}, said


def grow(run, *names, size=70):
    for name in names:
        with (run / name).open("ab") as file:
            file.write(hashlib.sha512(name.encode() + bytes([file.tell() % 256])).digest() * 2)
            file.truncate(file.seek(0, 2) - 128 + size)


def test_each_checkpoint_has_its_logs_as_they_were(run, remote, tmp_path):
    names = ("run.jsonl", "samples-0.jsonl", "quarantine-0.jsonl", "hang-0.txt", EVENTS)
    copies, were = LogCopies(run, Machine()), {}
    (run / "notes.txt").write_text("of somebody")
    for step in range(1, 6):
        grow(run, *names[:step])
        were[step] = {name: (run / name).read_bytes() for name in names[:step]}
        copies.copy(step, remote, remote.tree())
    for step, logs in were.items():
        assert fetched(remote, step, tmp_path / str(step)) == (logs, [])


def test_a_checkpoint_costs_what_is_new_and_at_most_one_part(
    run, store_proxy, tmp_path, monkeypatch
):
    remote, bring, brought = WritableFolder(URL, QUICK), log_copies.bring_part, []
    monkeypatch.setattr(log_copies, "bring_part", lambda *a: brought.append(a[2]) or bring(*a))
    copies = LogCopies(run, Machine())
    grow(run, "run.jsonl", size=30)
    for step in range(1, 40):
        with (run / "samples-0.jsonl").open("ab") as file:
            file.write(bytes([step]) * 70)
        store_proxy.writes.clear()
        brought.clear()
        copies.copy(step, remote, remote.tree())
        assert brought.count("samples-0.jsonl") <= 2
        parts = [path for path, _ in store_proxy.writes if "samples" in path]
        assert len(parts) <= 2
        assert step == 1 or not [path for path, _ in store_proxy.writes if "run.jsonl" in path]
    logs, _ = fetched(remote, 39, tmp_path / "new")
    assert logs["samples-0.jsonl"] == (run / "samples-0.jsonl").read_bytes()


def test_a_run_that_went_on_from_before_leaves_the_logs_of_later_checkpoints(run, remote, tmp_path):
    grow(run, "run.jsonl", size=250)
    before = (run / "run.jsonl").read_bytes()
    LogCopies(run, Machine()).copy(9, remote, remote.tree())
    (run / "run.jsonl").write_bytes(before[:120] + b"otherwise" * 20)
    LogCopies(run, Machine()).copy(6, remote, remote.tree())
    assert fetched(remote, 9, tmp_path / "9")[0]["run.jsonl"] == before
    assert fetched(remote, 6, tmp_path / "6")[0]["run.jsonl"] == (run / "run.jsonl").read_bytes()


def test_parts_go_when_no_checkpoint_has_them_and_not_while_a_list_is_made(run, remote):
    copies, unlisted = LogCopies(run, Machine()), frozenset()
    for step in range(1, 8):
        grow(run, "run.jsonl")
        copies.copy(step, remote, remote.tree())
        if step == 5:
            remote.write("logs/run.jsonl/000000-" + "0" * 64, b"of no list")
            remote.write(list_name(8, 2), b'{"version": 1, "logs": {}}')
        unlisted = remove_old_logs(remote, step, [step - 1, step, 9], unlisted)
    lists = [name for name in remote.tree() if name.endswith(".json")]
    assert lists == [list_name(6, 0), list_name(7, 0), list_name(8, 2)]
    assert "logs/run.jsonl/000000-" + "0" * 64 not in remote.tree()
    parts = [name for name in remote.tree() if "-" in name and "run.jsonl" in name]
    assert len(parts) <= 4 + 2 + 1  # full ones, two last ones, one that no list names any more


def test_a_part_is_kept_until_the_second_look(run, remote):
    grow(run, "run.jsonl")
    LogCopies(run, Machine()).copy(1, remote, {})
    place = "logs/run.jsonl/000007-" + "0" * 64
    remote.write(place, b"its list is written next")
    unlisted = remove_old_logs(remote, 1, [1], frozenset())
    assert unlisted == {place} and place in remote.tree()
    remote.write(list_name(1, 0), b"damaged")
    assert remove_old_logs(remote, 1, [1], unlisted) == frozenset() and place in remote.tree()


def test_a_lost_or_damaged_part_ends_its_log_and_is_said(run, remote, bucket, tmp_path):
    grow(run, "run.jsonl", size=10)
    with (run / "samples-0.jsonl").open("wb") as file:
        file.write(bytes(range(250)))
    LogCopies(run, Machine()).copy(1, remote, {})
    [second] = [name for name in bucket.names() if "samples-0.jsonl/000001" in name]
    content = bucket.read(second)
    bucket.write(second, content[:-1] + b"\0")
    logs, [line] = fetched(remote, 1, tmp_path / "a")
    assert logs["samples-0.jsonl"] == bytes(range(100)) and "checksum differs" in line
    bucket.delete(second)
    logs, [line] = fetched(remote, 1, tmp_path / "b")
    assert logs["samples-0.jsonl"] == bytes(range(100)) and "without what came from there" in line
    assert len(logs["run.jsonl"]) == 10


WRONG_LISTS = {
    "no JSON": b"\x80\x04",
    "another version": b'{"version": 2, "logs": {}}',
    "a way out": b'{"version": 1, "logs": {"../run.jsonl": []}}',
    "no log": b'{"version": 1, "logs": {"step-000000001/state.json": []}}',
    "a huge part": b'{"version": 1, "logs": {"run.jsonl": [[99999999999, "%b"]]}}' % (b"0" * 64),
    "no checksum": b'{"version": 1, "logs": {"run.jsonl": [[9, "../../x"]]}}',
}


@pytest.mark.parametrize("what", WRONG_LISTS)
def test_a_list_that_is_none_is_said_and_nothing_written(what, remote, tmp_path):
    remote.write(list_name(1, 0), WRONG_LISTS[what])
    logs, [line] = fetched(remote, 1, tmp_path / "new")
    assert logs == {} and list_name(1, 0) in line


def test_a_store_that_does_not_serve_leaves_no_half_of_a_log(run, store_proxy, tmp_path):
    remote = WritableFolder(URL, QUICK)
    (run / "run.jsonl").write_bytes(bytes(range(250)))
    LogCopies(run, Machine()).copy(1, remote, {})
    store_proxy.fault = lambda _, path: ("status", 503) if "/000001-" in path else None
    with pytest.raises(RemoteError, match="503"):
        fetched(remote, 1, tmp_path / "new")
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]


def test_each_machine_brings_and_gets_the_logs_of_its_own_processes(run, remote, tmp_path):
    machines = [Machine(0, 2, 4), Machine(2, 2, 4)]
    names = ["run.jsonl", EVENTS, *(f"samples-{rank}.jsonl" for rank in range(5))]
    grow(run, *names)  # of rank 4, which is no more
    for machine in machines:
        LogCopies(run, machine).copy(1, remote, remote.tree())
    first, second = (fetched(remote, 1, tmp_path / str(m.first), m)[0] for m in machines)
    assert set(second) == {"samples-2.jsonl", "samples-3.jsonl"}
    assert set(first) == set(names) - set(second)
    alone, _ = fetched(remote, 1, tmp_path / "alone")
    assert set(alone) == set(names)


def test_a_machine_without_a_list_of_the_step_gets_the_next_one():
    names = [list_name(6, 0), list_name(3, 0), list_name(3, 2), list_name(9, 2), list_name(6, 4)]
    assert lists_for(6, names) == [list_name(6, 0), list_name(6, 4), list_name(9, 2)]
    assert lists_for(12, [list_name(3, 0), list_name(9, 0)]) == [list_name(9, 0)]


def test_a_checkpoint_waits_for_the_lists_of_other_machines(run, remote, monkeypatch):
    copies = LogCopies(run, Machine(0, 2, 4), patience_s=60)
    naps = []

    def nap(_):
        naps.append(1)
        if len(naps) == 2:
            remote.write(list_name(1, 2), b"{}")

    monkeypatch.setattr("eval.log_copies.time.sleep", nap)
    copies.await_others(1, remote)
    assert len(naps) == 2
    LogCopies(run, Machine(0, 2, 4), patience_s=0).await_others(2, remote)
    assert len(naps) == 2


@pytest.mark.parametrize(
    "name", ["../run.jsonl", "a/run.jsonl", "samples-x.jsonl", "config.json", "tensorboard/../x"]
)
def test_other_names_are_no_logs(name):
    assert not LOG_PATTERN.fullmatch(name) and not Machine().has(name)
