"""A checkpoint is complete or not there."""

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model.checkpoint import (
    CheckpointError,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)

TENSORS = {
    "encoder_q": {
        "weight": torch.linspace(-1, 1, 12).view(3, 4).T,  # not contiguous
        "count": torch.tensor(7),
        "nothing": torch.empty(0, 3),
    },
    "queue": {"rows_KD": torch.tensor([[-0.0, 1e-40], [3.5, float("inf")]])},
    "optimiser": {"0.momentum_buffer": torch.tensor([0.1, 0.2], dtype=torch.bfloat16)},
}
STATE = {"config": {"lr": 0.1}, "queue_place": 3}
FILES = ["encoder_q.safetensors", "queue.safetensors", "optimiser.safetensors", "state.json"]


def save(run, *steps, keep=10):
    for step in steps:
        save_checkpoint(run, step, TENSORS, STATE, keep)
    return run


def steps_in(run):
    return [step for step, _ in checkpoint_folders(run)]


def flip_byte(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_what_is_saved_comes_back_bit_by_bit(tmp_path):
    found = load_checkpoint(save_checkpoint(tmp_path, 12, TENSORS, STATE))
    assert found.step == 12
    assert {"step": 12, **STATE}.items() <= found.state.items()
    for group, named in TENSORS.items():
        assert found.tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            other = found.tensors[group][name]
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert bits(other) == bits(tensor)


def test_the_same_state_gives_the_same_bytes(tmp_path):
    first, second = save(tmp_path / "a", 5), save(tmp_path / "b", 5)
    for path in (first / "step-000000005").iterdir():
        assert path.read_bytes() == (second / "step-000000005" / path.name).read_bytes()


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_nothing_else_lies_beside_the_checkpoints_and_no_file_stays_open(tmp_path):
    save(tmp_path, 1)
    before = open_files()
    save(tmp_path, 2)
    assert open_files() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000002"]
    assert {p.name for p in (tmp_path / "step-000000002").iterdir()} == {*FILES, "manifest.json"}


def test_a_half_written_checkpoint_is_passed_over_and_replaced(tmp_path):
    part = save(tmp_path, 1) / ".step-000000002.part"
    shutil.copytree(tmp_path / "step-000000001", part)
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1
    save(tmp_path, 2)
    assert steps_in(tmp_path) == [1, 2]
    assert not part.exists()


def test_what_a_kill_left_of_another_step_goes_with_the_next_save(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".step-000000002.part").mkdir()
    save(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_flipped_bit_in_any_file_is_detected_and_the_one_before_is_used(tmp_path, name, place):
    damaged = save(tmp_path, 1, 2) / "step-000000002"
    flip_byte(damaged / name, place)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: its checksum differs"):
        load_checkpoint(damaged)
    warnings = []
    assert newest_checkpoint(tmp_path, warnings.append).step == 1
    assert len(warnings) == 1
    assert "step-000000002" in warnings[0]
    assert "falling back" in warnings[0]


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_named_and_the_one_before_is_used(tmp_path, name):
    damaged = save(tmp_path, 1, 2) / "step-000000002"
    (damaged / name).unlink()
    with pytest.raises(CheckpointError, match=f"is not a checkpoint: {name} is missing"):
        load_checkpoint(damaged)
    assert newest_checkpoint(tmp_path, lambda _: None).step == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"version": 1}', '{"files": 3, "version": 1}'])
def test_a_manifest_that_is_none_is_an_error_of_the_checkpoint(tmp_path, content):
    (save(tmp_path, 1) / "step-000000001" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "step-000000001")


def edit_manifest(folder, edit):
    manifest = json.loads((folder / "manifest.json").read_text())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "name", ["optimiser.pkl", "weights.pth", "../queue.safetensors", "/x.json"]
)
def test_a_manifest_with_names_that_are_not_ours_is_refused(tmp_path, name):
    folder = save(tmp_path, 1) / "step-000000001"
    edit_manifest(folder, lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(CheckpointError, match="which no checkpoint of ours has"):
        load_checkpoint(folder)


@pytest.mark.parametrize("name", ["optimiser.pkl", "pytorch_model.bin", "random_states_0.pkl"])
def test_a_checkpoint_with_a_pickle_beside_it_is_refused_and_the_one_before_is_used(tmp_path, name):
    folder = save(tmp_path, 1, 2) / "step-000000002"
    (folder / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=f"holds {name}, which its manifest does not list"):
        load_checkpoint(folder)
    assert newest_checkpoint(tmp_path, lambda _: None).step == 1


def test_a_checkpoint_of_a_later_version_is_refused_and_never_passed_over(tmp_path):
    folder = save(tmp_path, 1, 2) / "step-000000002"
    edit_manifest(folder, lambda manifest: manifest.update(version=99))
    for load in (load_checkpoint, lambda folder: newest_checkpoint(folder.parent, pytest.fail)):
        with pytest.raises(CheckpointError, match=r"has checkpoint version 99, this .* reads 1:"):
            load(folder)


@pytest.mark.parametrize("name", ["encoder_q.safetensors", "manifest.json"])
@pytest.mark.parametrize("kind", ["endless", "pipe"])
def test_what_is_no_plain_file_is_not_read(tmp_path, name, kind):
    file = save(tmp_path, 1, 2) / "step-000000002" / name
    file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    assert newest_checkpoint(tmp_path, lambda _: None).step == 1


def test_a_file_may_be_a_link_and_has_the_size_that_the_manifest_says(tmp_path):
    file = save(tmp_path, 1) / "step-000000001" / "encoder_q.safetensors"
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    load_checkpoint(file.parent)
    with (tmp_path / "moved").open("ab") as moved:
        moved.write(b"more")
    with pytest.raises(CheckpointError, match=r"encoder_q.* is damaged: it has [\d,]+ bytes inst"):
        load_checkpoint(file.parent)


def test_the_newest_is_chosen_by_its_step_and_foreign_folders_are_left_alone(tmp_path):
    save(tmp_path, 900, 1000)
    for name in ("step-final", "step-0000000011", "tensorboard"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000002000").write_text("a file")
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1000


def test_a_run_without_an_intact_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path, pytest.fail)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        newest_checkpoint(tmp_path / "nowhere", pytest.fail)
    for _, folder in checkpoint_folders(save(tmp_path, 1, 2)):
        (folder / "queue.safetensors").unlink()
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints"):
        newest_checkpoint(tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("keep", "left"), [(4, [2, 3, 4, 5]), (2, [4, 5]), (1, [4, 5]), (0, [4, 5])]
)
def test_as_many_are_kept_as_asked_but_never_fewer_than_two(tmp_path, keep, left):
    save(tmp_path, 1, 2, 3, 4, 5, keep=keep)
    assert steps_in(tmp_path) == left


def test_an_old_one_that_cannot_be_removed_fails_no_save(tmp_path):
    save(tmp_path / "other disk", 1)
    run = save(tmp_path / "run", 2)
    (run / "step-000000001").symlink_to(tmp_path / "other disk" / "step-000000001")
    save(run, 3, 4, keep=2)
    assert steps_in(run) == [1, 3, 4]


def test_the_same_step_again_replaces_its_checkpoint(tmp_path):
    save(tmp_path, 1, 2)
    save_checkpoint(tmp_path, 2, TENSORS, {**STATE, "queue_place": 9})
    assert newest_checkpoint(tmp_path, pytest.fail).state["queue_place"] == 9
    assert steps_in(tmp_path) == [1, 2]


def test_the_checkpoint_just_written_outlives_damaged_ones_of_later_steps(tmp_path):
    save(tmp_path, 100, 200, 300)
    for step in (200, 300):
        flip_byte(tmp_path / f"step-{step:09d}" / "queue.safetensors", -1)
    save(tmp_path, 150, keep=2)  # a run that had to go on from step 100
    assert newest_checkpoint(tmp_path, lambda _: None).step == 150


def test_a_full_disk_leaves_the_older_checkpoint_and_no_part(tmp_path):
    save(tmp_path, 1)
    big = {"encoder_q": {"weight": torch.zeros(100_000)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match=r"File too large: .*step-000000002"):
            save_checkpoint(tmp_path, 2, big, STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_not_begun(tmp_path, monkeypatch):
    save(tmp_path, 1)
    needed = sum(tensor.nbytes for named in TENSORS.values() for tensor in named.values())
    for free, steps in ((needed - 1, [1]), (needed, [1, 2])):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with contextlib.suppress(OSError):
            save(tmp_path, 2)
        assert steps_in(tmp_path) == steps
    assert len(list(tmp_path.iterdir())) == 2


def test_all_of_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    happened, replace, sync = [], Path.replace, os.fsync

    def noting(handle):
        happened.append(Path(f"/proc/self/fd/{handle}").resolve())
        sync(handle)

    def renaming(path, target):
        happened.append("renamed")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "replace", renaming)
    save(tmp_path, 1)
    part = tmp_path / ".step-000000001.part"
    before = happened[: happened.index("renamed")]
    assert set(before) == {part, *(part / name for name in [*FILES, "manifest.json"])}
    assert happened[len(before) :] == ["renamed", tmp_path]


def test_a_state_that_cannot_be_written_leaves_the_older_checkpoint_and_no_part(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path, 2, TENSORS, {"a function": print})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def test_a_file_in_the_way_is_an_error_of_the_system(tmp_path):
    (save(tmp_path, 1) / ".step-000000002.part").write_text("not ours")
    with pytest.raises(FileExistsError):
        save(tmp_path, 2)
    assert newest_checkpoint(tmp_path, pytest.fail).step == 1
