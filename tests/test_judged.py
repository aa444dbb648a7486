"""What is judged: a run, one of its checkpoints, a timm network, other projects'."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from eval.judged import checkpoint_encoder, foreign_encoder, timm_encoder
from eval.weights_source import Choice, eval_view_of, open_checkpoint
from model.checkpoint import CheckpointError, save_checkpoint
from model.encoder import EncoderConfig, EncoderError
from model.key_queue import KeyQueue
from model.moco import MoCo, MoCoConfig
from model.network_shape import WeightsError
from model.run_state import RunState
from pipeline.data_config import DataConfig
from pipeline.program import InputError
from pipeline.settings import to_plain

ENCODER = EncoderConfig(backbone="test_resnet", dim=8)
DATA = DataConfig(image_px=32, eval_resize_px=40, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
VIEW = eval_view_of(DATA, "bicubic")
SEED = 11


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints after 3 and 6 steps, and its network at step 0."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(SEED)
    moco = MoCo(ENCODER, MoCoConfig(batch_norm_groups=4), global_batch=16, seed=SEED)
    start = {name: tensor.clone() for name, tensor in moco.encoder_q.state_dict().items()}
    optimizer = torch.optim.SGD(moco.encoder_q.parameters(), lr=0.1)
    state = RunState(moco, KeyQueue(8, 8, SEED), optimizer, None)
    config = {"encoder": ENCODER, "data": DATA}
    plain = {name: to_plain(value) for name, value in config.items()}
    for step in (3, 6):
        for parameter in moco.encoder_q.parameters():
            parameter.data.add_(step)
        for parameter in moco.encoder_k.parameters():
            parameter.data.sub_(step)
        taken = state.snapshot(step, {"config": {**plain, "seed": SEED, "recipe": "x"}})
        save_checkpoint(folder, step, taken.tensors, taken.state)
    return folder, moco, start


def backbone_of(state):
    return {n.removeprefix("backbone."): t for n, t in state.items() if n.startswith("backbone.")}


def assert_same(network, state):
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)


def test_the_query_encoder_of_the_newest_checkpoint_is_judged(run):
    folder, moco, _ = run
    judged = checkpoint_encoder(open_checkpoint(folder, pytest.fail), "bicubic")
    assert_same(judged.network, backbone_of(moco.encoder_q.state_dict()))
    assert not judged.network.training
    assert judged.about == {
        "checkpoint": "step-000000006",
        "recipe": "x",
        "backbone": "test_resnet",
        "encoder": "encoder_q",
        "step": 6,
    }


def test_the_key_encoder_is_judged_on_request(run):
    folder, moco, _ = run
    found = open_checkpoint(folder, pytest.fail)
    judged = checkpoint_encoder(found, "bicubic", key_encoder=True)
    assert_same(judged.network, backbone_of(moco.encoder_k.state_dict()))
    assert judged.about["encoder"] == "encoder_k"


def test_the_untrained_encoder_is_the_runs_own_at_step_0(run):
    folder, _, start = run
    found = open_checkpoint(folder, pytest.fail)
    judged = checkpoint_encoder(found, "bicubic", untrained=True)
    assert_same(judged.network, backbone_of(start))
    assert (judged.about["encoder"], judged.about["step"]) == ("untrained", 0)


def test_a_checkpoint_may_be_named_itself(run, monkeypatch):
    folder, *_ = run
    assert open_checkpoint(folder / "step-000000003", pytest.fail).step == 3
    monkeypatch.chdir(folder / "step-000000003")
    assert open_checkpoint(type(folder)(), pytest.fail).step == 3


def test_the_view_is_that_of_the_run(run):
    folder, *_ = run
    view = checkpoint_encoder(open_checkpoint(folder, pytest.fail), "bilinear").view
    assert (view.resize_px, view.crop_px, view.interpolation) == (40, 32, "bilinear")
    assert (view.mean, view.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_place_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a folder: give a run or one of its"):
        open_checkpoint(tmp_path / "nowhere", pytest.fail)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        open_checkpoint(tmp_path, pytest.fail)
    (tmp_path / "step-000000003").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        open_checkpoint(tmp_path / "step-000000003", pytest.fail)


def test_a_timm_network_is_random_but_the_same_every_time():
    first, second = (timm_encoder("test_resnet", VIEW) for _ in range(2))
    assert_same(first.network, second.network.state_dict())
    assert first.about == {"backbone": "test_resnet", "encoder": "timm", "weights": "random"}


@pytest.mark.parametrize("which", ["query", "key"])
def test_the_checkpoint_of_another_project_is_judged_by_its_own_view(which, tmp_path):
    theirs = {name: timm.create_model("resnet18", num_classes=10) for name in ("query", "key")}
    state = {f"module.encoder_{which[0]}.{name}": tensor for which, network in theirs.items()
             for name, tensor in network.state_dict().items()}  # fmt: skip
    path = tmp_path / "moco.pth"
    torch.save({"epoch": 7, "state_dict": state}, path)
    judged = foreign_encoder(path, Choice(encoder=which), pytest.fail)
    state = theirs[which].state_dict()
    assert_same(judged.network, {n: t for n, t in state.items() if not n.startswith("fc.")})
    assert not judged.network.training
    assert (judged.view.resize_px, judged.view.crop_px) == (256, 224)
    assert judged.about["encoder"] == f"official MoCo v1 or v2, {which} encoder, resnet18"
    assert (judged.about["epoch"], len(judged.about["weights_sha256"])) == (7, 64)


def test_a_network_that_the_shapes_do_not_tell_is_named(tmp_path):
    theirs = timm.create_model("test_resnet", num_classes=10)
    path = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), path)
    with pytest.raises(WeightsError, match="name the network with"):
        foreign_encoder(path, Choice(), pytest.fail)
    judged = foreign_encoder(
        path, Choice(network=EncoderConfig(backbone="test_resnet")), pytest.fail
    )
    assert_same(judged.network, {n: t for n, t in theirs.state_dict().items() if n[:3] != "fc."})
    with pytest.raises(WeightsError, match="not a whole resnet50"):
        foreign_encoder(path, Choice(network=EncoderConfig()), pytest.fail)


def test_the_untrained_encoder_of_a_run_that_had_weights_to_start_from_has_them(run, tmp_path):
    found = open_checkpoint(run[0], pytest.fail)
    theirs = timm.create_model("resnet18", num_classes=0)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    start = to_plain(EncoderConfig(backbone="resnet18", weights=tmp_path / "w.safetensors"))
    state = {**found.state, "config": {**found.state["config"], "encoder": start}}
    judged = checkpoint_encoder(replace(found, state=state), "bicubic", untrained=True)
    assert_same(judged.network, theirs.state_dict())


def test_an_unknown_timm_name_is_an_error_of_the_encoder():
    with pytest.raises(EncoderError, match="timm has no backbone 'resnt'"):
        timm_encoder("resnt", VIEW)
