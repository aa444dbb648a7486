"""Runs with copies in an object store: on a fresh machine they go on as if nothing had happened."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eval.log_copies import Machine
from eval.recipes import RECIPES
from eval.remote_checkpoints import RemoteCheckpoints
from eval.run_folder import Asked
from eval.run_start import all_or_none, describe, share, start_here
from eval.step_log import global_batches
from model.checkpoint import file_sha256, load_checkpoint, save_checkpoint, write_json
from model.collectives import rank
from model.stopping import RESTART_CODE
from pipeline.program import DataError, InputError
from pipeline.remote_folder import RetryPolicy
from tests.run_in_processes import run_in_processes
from tests.test_train import TINY, command, logged

MIRROR = "s3://bucket/run"
QUICK = RetryPolicy(attempts=2, first_s=0.01, longest_s=0.02, connect_s=1, stalled_s=2)
SIX = ("--steps", "6", "--save-every", "3")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, so that sums are the same in every run, and less patience with a server."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("run_start.AT_START", "mirror_at_start.AT_START", "mirror.PATIENCE"):
        monkeypatch.setattr(f"eval.{name}", QUICK)
    assert torch.get_num_threads() == 1


@pytest.fixture
def run_it(shard_set, tmp_path):
    """``run_it(name, *words)`` trains into this folder with the mirror."""

    def run(name, *words, mirror=MIRROR):
        output = tmp_path / name
        flags = ("--data.shards", shard_set, "--output", output, "--mirror", mirror)
        done = command(*TINY, *flags, *words)
        return SimpleNamespace(folder=output, **vars(done))

    return run


def assert_same(run, other, step):
    first, second = (load_checkpoint(folder / f"step-{step:09d}") for folder in (run, other))
    torch.testing.assert_close(first.tensors, second.tensors, rtol=0, atol=0)
    assert first.state["optimiser"] == second.state["optimiser"]
    assert logged(run, "loss") == logged(other, "loss")


def lose_newest(bucket):
    """As if the machine had been lost before step 6 was copied."""
    for name in bucket.names("run/step-000000006/"):
        bucket.delete(name)


def test_a_machine_without_the_folder_goes_on_bit_by_bit_from_the_mirror(bucket, run_it):
    whole = run_it("whole", *SIX, "--log-samples")
    assert (whole.code, whole.err) == (0, "")
    assert {"run/config.json", "run/environment.json"} <= set(bucket.names())
    lose_newest(bucket)
    for name, resume in (
        ("newest", ()),
        ("url", (f"{MIRROR}/step-000000003",)),
    ):
        done = run_it(name, *SIX, "--log-samples", "--resume", *resume)
        assert (done.code, done.err) == (0, ""), name
        assert f"fetching {MIRROR}/step-000000003" in done.out
        assert_same(done.folder, whole.folder, 6)
        assert global_batches(done.folder) == global_batches(whole.folder)
        events = EventAccumulator(str(done.folder / "tensorboard")).Reload()
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
        assert bucket.read("run/step-000000006/manifest.json")
        lose_newest(bucket)


def test_a_damaged_copy_costs_one_interval_and_is_said(bucket, run_it):
    whole = run_it("whole", *SIX)
    bucket.write("run/step-000000006/queue.safetensors", b"half of it")
    done = run_it("fresh", *SIX, "--resume")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"step-000000006/queue\S+ has 10 bytes.* falling back", done.out)
    assert "resumed after step 3" in done.out
    assert_same(done.folder, whole.folder, 6)


def test_a_damaged_folder_is_replaced_by_its_copy_and_a_newer_folder_wins(bucket, run_it):
    whole = run_it("whole", *SIX)
    folder = shutil.copytree(whole.folder, whole.folder.with_name("here"))
    (folder / "step-000000006/queue.safetensors").write_bytes(b"")
    done = run_it("here", *SIX, "--resume")
    assert done.code == 0 and "resumed after step 6" in done.out
    assert_same(folder, whole.folder, 6)
    lose_newest(bucket)
    done = run_it("here", *SIX, "--resume")
    assert done.code == 0 and "fetching" not in done.out
    assert bucket.read("run/step-000000006/manifest.json")  # was copied at the start


@pytest.mark.usefixtures("bucket")
def test_a_run_goes_on_elsewhere_from_a_url_without_copies_of_its_own(run_it, shard_set, tmp_path):
    whole = run_it("whole", *SIX)
    flags = ("--data.shards", shard_set, "--output", tmp_path / "other", *SIX)
    done = command(*TINY, *flags, "--resume", MIRROR)
    assert (done.code, done.err) == (0, "") and "resumed after step 6" in done.out
    first, second = (
        load_checkpoint(f / "step-000000006") for f in (whole.folder, tmp_path / "other")
    )
    torch.testing.assert_close(first.tensors, second.tensors, rtol=0, atol=0)


def test_a_store_that_goes_away_costs_messages_and_in_the_end_says_so(store_proxy, run_it):
    store_proxy.write_fault = lambda _, path: ("status", 503) if "step-" in path else None
    done = run_it("run", *SIX)
    assert done.code == 2
    assert len(re.findall(r"could not be copied to the mirror \(.*503", done.out)) >= 1
    assert re.search(r"error: the run is done, but .*step-000000006 could not be copied", done.err)
    assert len(done.err.splitlines()) == 1
    load_checkpoint(done.folder / "step-000000006")
    store_proxy.write_fault = lambda *_: None
    done = run_it("run", *SIX, "--resume")
    assert (done.code, done.err) == (0, "")
    assert run_it("fresh", *SIX, "--resume").code == 0


def test_a_store_that_is_away_at_the_start_does_not_keep_a_run_from_its_folder(
    bucket, store_proxy, run_it, monkeypatch
):
    whole = run_it("whole", *SIX)
    folder = shutil.copytree(whole.folder, whole.folder.with_name("here"))
    shutil.rmtree(folder / "step-000000006")
    lose_newest(bucket)
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    done = run_it("here", *SIX)
    assert re.search(r"503.*going on from the checkpoints in .*here.*\n", done.out)
    assert "resumed after step 3" in done.out
    assert done.code == 2 and "step-000000006 could not be copied" in done.err
    assert_same(folder, whole.folder, 6)
    for step in (3, 6):
        (folder / f"step-00000000{step}/queue.safetensors").write_bytes(b"")
    for name in ("here", "fresh"):
        done = run_it(name, *SIX)
        assert done.code == RESTART_CODE and len(done.err.splitlines()) == 1
        assert re.search(r"503.*no intact checkpoint.* start again when it serves", done.err)
    assert not done.folder.exists()
    store_proxy.write_fault = store_proxy.fault = lambda *_: None
    done = run_it("fresh", *SIX)
    assert (done.code, done.err) == (0, "") and "resumed after step 3" in done.out


def test_a_checkpoint_is_brought_to_other_machines_or_it_is_said_why_not(
    bucket, store_proxy, first_run
):
    mirror = RemoteCheckpoints(MIRROR)
    asked = SimpleNamespace(output=first_run, mirror=mirror, machine=Machine(0, 1, 2))
    said = []
    store_proxy.write_fault = store_proxy.fault = lambda *_: ("status", 503)
    share(first_run / "step-000000006", asked, said.append)
    assert len(said) == 1 and "machines without it" in said[0] and "503" in said[0]
    store_proxy.write_fault = store_proxy.fault = lambda *_: None
    share(first_run / "step-000000006", asked, said.append)  # no machine is waited for
    assert len(said) == 1 and bucket.read("run/step-000000006/manifest.json")
    assert {"logs", "step-000000006"} <= {name.split("/")[1] for name in bucket.names()}


WRONG = {
    "no such bucket": (("s3://nowhere/run",), (), r"--mirror s3://nowhere/run cannot be written"),
    "not of a service": (("https://host/run",), (), r"https://host/run: give s3:// or gs://"),
    "a folder": (("copies",), (), r"copies: give s3:// or gs://"),
    "another run": ((MIRROR,), ("--resume", "--optimiser.lr", "0.5"), r"optimiser.lr = 0.01, now"),
    "taken": ((MIRROR,), (), r"s3://bucket/run holds a run already: add --resume"),
    "an older one": ((MIRROR,), ("--resume", f"{MIRROR}/step-000000003"), r"is older than s3://"),
    "none": ((MIRROR + "2",), ("--resume",), r"new holds no checkpoint"),
}


@pytest.fixture(scope="module")
def first_run(shard_set, tmp_path_factory):
    """A run of six steps without a mirror."""
    folder = tmp_path_factory.mktemp("first") / "run"
    assert command(*TINY, "--data.shards", shard_set, "--output", folder, *SIX).code == 0
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_mirror_is_one_line_before_anything_is_written(what, bucket, first_run, run_it):
    for path in first_run.rglob("*"):
        if path.is_file() and (path.parent != first_run or path.name == "config.json"):
            bucket.write(f"run/{path.relative_to(first_run)}", path.read_bytes())
    before = bucket.names()
    mirror, words, message = WRONG[what]
    done = run_it("new", *SIX, *words, mirror=mirror[0])
    assert done.code == 2
    assert re.search(f"error: .*{message}", done.err) and len(done.err.splitlines()) == 1
    assert not done.folder.exists() and bucket.names() == before


def test_a_state_that_says_nothing_of_its_run_is_no_checkpoint(bucket, run_it, first_run):
    step = shutil.copytree(
        first_run / "step-000000006", first_run.parent / "copy", dirs_exist_ok=True
    )
    (step / "state.json").write_text(json.dumps({"step": 6, "version": 1}))
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in step.iterdir()
        if path.name != "manifest.json"
    }
    write_json(step / "manifest.json", {"version": 1, "files": files})
    for path in step.iterdir():
        bucket.write(f"run/step-000000006/{path.name}", path.read_bytes())
    done = run_it("new", *SIX, "--resume")
    assert done.code == 2 and "none of the 1 checkpoints in" in done.err


# Several machines, as far as one can tell without them -------------------------------------------


def outcome(codes):
    """What this process leaves ``all_or_none`` with, where these are the exit codes of errors."""

    def work():
        if code := codes[rank()]:
            error = InputError("my own line")
            error.exit_code = code
            raise error
        return rank()

    try:
        return all_or_none(torch.device("cpu"), work)
    except InputError as error:
        return str(error), error.exit_code


def test_what_one_process_cannot_do_ends_all_with_its_exit_code():
    assert run_in_processes(2, outcome, (0, 0)) == [0, 1]
    other = "another process of this run cannot start; its own line says why"
    ends = run_in_processes(2, outcome, (0, RESTART_CODE))
    assert ends == [(other, RESTART_CODE), ("my own line", RESTART_CODE)]


def saved(run, value, step=3):
    weight = torch.full((4,), value)
    state = {"data": {"manifest_sha256": ""}, "config": {}}
    return load_checkpoint(save_checkpoint(run, step, {"encoder_q": {"weight": weight}}, state))


def asked(run, mirror=None):
    return Asked(RECIPES["demo"], run, "", mirror and RemoteCheckpoints(mirror, QUICK))


def said(*_, **__):
    """What is printed does not matter here."""


def test_a_machine_goes_on_from_the_first_ones_checkpoint_and_from_no_other(tmp_path):
    first, same, _ = (saved(tmp_path / n, v) for n, v in (("1", 1.0), ("same", 1.0), ("2", 2.0)))
    start = json.loads(describe(first, tmp_path / "1"))
    assert start_here(asked(tmp_path / "same"), start, said).folder == same.folder
    for name in ("2", "nothing"):
        with pytest.raises(DataError, match="is not the checkpoint that process 0 goes on from: "):
            start_here(asked(tmp_path / name), start, said)
    # One that is named with its folder is looked for there.
    named = json.loads(describe(first, tmp_path / "2"))
    assert start_here(asked(tmp_path / "2"), named, said).folder == first.folder
    assert describe(None, tmp_path) == ""


def test_machines_without_it_have_it_from_the_mirror(bucket, tmp_path):
    first = saved(tmp_path / "1", 1.0)
    (tmp_path / "1" / "run.jsonl").write_text("")
    share(first.folder, asked(tmp_path / "1"), pytest.fail)
    share(first.folder, asked(tmp_path / "2", MIRROR), pytest.fail)  # is another run's
    assert bucket.names() == []
    share(first.folder, asked(tmp_path / "1", MIRROR), pytest.fail)
    assert "run/step-000000003/manifest.json" in bucket.names()
    start = json.loads(describe(first, tmp_path / "1"))
    saved(tmp_path / "2", 2.0)  # of the same step
    found = start_here(asked(tmp_path / "2", MIRROR), start, said)
    assert found.folder == tmp_path / "2" / first.folder.name
    torch.testing.assert_close(found.tensors, first.tensors, rtol=0, atol=0)
    with pytest.raises(DataError, match=f"{MIRROR}/step-000000003 is not the checkpoint that"):
        start_here(asked(tmp_path / "3", MIRROR), {**start, "manifest": "another"}, said)
    bucket.write("run/step-000000003/encoder_q.safetensors", b"")
    with pytest.raises(DataError, match="encoder_q"):
        start_here(asked(tmp_path / "3", MIRROR), start, said)
