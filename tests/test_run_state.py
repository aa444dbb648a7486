"""What a resume puts back."""

import json
from types import SimpleNamespace

import pytest
import torch

from model.checkpoint import (
    CheckpointError,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.run_state import RunState, flatten_optimiser, restore_optimiser
from tests.run_in_processes import run_in_processes

OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


def two_parameters():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(3, n, generator=generator)) for n in (2, 5)]


def descend(parameters, optimizer, steps):
    for step in range(steps):
        for parameter in parameters:
            parameter.grad = torch.sin(parameter.detach() * (step + 1))
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMISERS)
def test_an_optimiser_goes_on_bit_by_bit_from_its_flattened_state(kind):
    parameters = two_parameters()
    optimizer = OPTIMISERS[kind](parameters)
    descend(parameters, optimizer, 3)
    tensors, plain = flatten_optimiser(optimizer)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    others = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    resumed = OPTIMISERS[kind](others)
    restore_optimiser(resumed, tensors, json.loads(json.dumps(plain)))
    descend(parameters, optimizer, 3)
    descend(others, resumed, 3)
    torch.testing.assert_close(others, parameters, rtol=0, atol=0)


def test_a_restored_optimiser_lies_in_memory_as_its_parameters_do():
    parameter = torch.nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = OPTIMISERS["sgd"]([parameter])
    descend([parameter], optimizer, 1)
    tensors, plain = flatten_optimiser(optimizer)
    saved = {name: tensor.contiguous() for name, tensor in tensors.items()}  # as a file has it
    restore_optimiser(optimizer, saved, plain)
    restored = optimizer.state[parameter]["momentum_buffer"]
    assert restored.stride() == parameter.stride() != saved["0.momentum_buffer"].stride()
    assert torch.equal(restored, saved["0.momentum_buffer"])


def pieces(seed, *, backbone="test_resnet", queue=8, scaler=None):
    """All that a run state holds, and the run state."""
    torch.manual_seed(seed)
    encoder = EncoderConfig(backbone=backbone, dim=4)
    moco = MoCo(encoder, MoCoConfig(batch_norm="none"), global_batch=4, seed=0)
    keys = KeyQueue(queue, 4, seed)
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1, momentum=0.9)
    state = RunState(moco, keys, optimizer, scaler)
    return SimpleNamespace(moco=moco, queue=keys, optimizer=optimizer, scaler=scaler, state=state)


def save(run, folder, step, identity):
    """What ``Saver`` does, without its thread."""
    snapshot = run.state.snapshot(step, identity)
    if snapshot is not None:
        save_checkpoint(folder, snapshot.step, snapshot.tensors, snapshot.state)


def train_a_step(run):
    run.moco(*torch.randn(2, 4, 3, 32, 32), step=0)[0][0].sum().backward()
    run.optimizer.step()
    run.queue.push(torch.ones(3, 4))


def all_tensors(run):
    optimiser, _ = flatten_optimiser(run.optimizer)
    return {**run.moco.state_dict(), "queue": run.queue.rows_KD, **optimiser}


def test_another_process_goes_on_with_the_same_encoders_queue_and_optimiser(tmp_path):
    saved, other = pieces(seed=1), pieces(seed=2)
    train_a_step(saved)
    save(saved, tmp_path, 7, {"recipe": "x"})
    found = newest_checkpoint(tmp_path, pytest.fail)
    other.state.load(found)
    assert (found.step, found.state["recipe"]) == (7, "x")
    assert "rank_statistics" not in found.tensors  # there is one rank: they are the encoders' own
    assert other.queue.place == 3
    torch.testing.assert_close(all_tensors(other), all_tensors(saved), rtol=0, atol=0)


def test_the_loss_scaler_goes_on_with_its_scale(tmp_path):
    saved = pieces(1, scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    other = pieces(2, scaler=torch.amp.GradScaler("cpu", init_scale=2.0))
    saved.scaler.scale(torch.ones(()))
    other.scaler.scale(torch.ones(()))
    save(saved, tmp_path, 1, {})
    other.state.load(newest_checkpoint(tmp_path, pytest.fail))
    assert other.scaler.get_scale() == 8.0


@pytest.mark.parametrize("other", [{"backbone": "resnet18"}, {"queue": 9}], ids=str)
def test_a_checkpoint_of_another_network_or_queue_is_refused(tmp_path, other):
    save(pieces(1), tmp_path, 1, {})
    with pytest.raises(
        CheckpointError, match="step-000000001 does not fit this run: size mismatch for"
    ):
        pieces(1, **other).state.load(load_checkpoint(tmp_path / "step-000000001"))


def save_unlike_ranks(folder, what):
    """Save where one rank's tensors are its own; the message of the error, if there is one."""
    run, rank = pieces(seed=1), torch.distributed.get_rank()
    for name, buffer in run.moco.named_buffers():
        if what == "statistics" and name.endswith("running_mean"):
            buffer.fill_(rank)
    if what == "a key":
        run.queue.rows_KD[0, 0] += rank
    try:
        save(run, folder, 3, {})
    except RuntimeError as error:
        return str(error)
    return running_mean(run)


def running_mean(run):
    """The first one's values."""
    return run.moco.encoder_k.backbone.bn1.running_mean.tolist()


def resumed_running_mean(folder):
    """What a rank goes on with."""
    run = pieces(seed=2)
    run.state.load(load_checkpoint(folder / "step-000000003"))
    return running_mean(run)


def test_saved_running_statistics_are_the_ranks_mean_and_each_rank_goes_on_with_its_own(tmp_path):
    for rank, mean in enumerate(run_in_processes(2, save_unlike_ranks, tmp_path, "statistics")):
        assert set(mean) == {rank}  # a save changes nothing of the run
    tensors = load_checkpoint(tmp_path / "step-000000003").tensors
    for encoder in ("encoder_q", "encoder_k"):
        assert set(tensors[encoder]["backbone.bn1.running_mean"].tolist()) == {0.5}
        assert set(tensors[encoder]["backbone.bn1.running_var"].tolist()) == {1.0}
    for rank, mean in enumerate(run_in_processes(2, resumed_running_mean, tmp_path)):
        assert set(mean) == {rank}
    assert set(resumed_running_mean(tmp_path)) == {0.5}  # one process: as another number would


def test_a_snapshot_does_not_follow_the_run():
    run = pieces(seed=1)
    train_a_step(run)
    snapshot = run.state.snapshot(1, {})
    before = {name: tensor.clone() for name, tensor in snapshot.tensors["encoder_k"].items()}
    train_a_step(run)
    torch.testing.assert_close(snapshot.tensors["encoder_k"], before, rtol=0, atol=0)
    again = run.state.snapshot(2, {})
    held = [snap.tensors["queue"]["rows_KD"].data_ptr() for snap in (snapshot, again)]
    assert held[0] == held[1]  # the second one is written over the first


def test_a_queue_that_differs_between_the_ranks_ends_the_run_and_is_not_saved(tmp_path):
    for message in run_in_processes(2, save_unlike_ranks, tmp_path, "a key"):
        assert "differ between the processes at step 3" in message
    assert not list(tmp_path.iterdir())
