"""A kNN score beside the training: of which weights, at most one, and what stops it."""

import copy
import dataclasses
import io
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from eval import online_knn
from eval.alarms import Alarms
from eval.judged import Judged
from eval.knn import KnnProtocol, knn_of_shards
from eval.online_knn import OnlineKnn
from eval.recipes import RECIPES
from eval.run_report import RunReport
from eval.weights_source import eval_view_of
from model.encoder import Encoder, EncoderConfig
from model.stopping import Agreement
from tests.run_in_processes import run_in_processes

CPU = torch.device("cpu")


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Encoder(EncoderConfig(backbone="test_resnet", dim=8), image_px=32).backbone


@pytest.fixture
def config(shard_set):
    judged = {"knn_train": str(shard_set), "knn_test": str(shard_set), "knn_every": 2}
    data = dataclasses.replace(RECIPES["demo"].data, threads=1)
    return dataclasses.replace(RECIPES["demo"], data=data, **judged)


@pytest.fixture
def told(tmp_path):
    """A report, and what it prints and tracks."""
    out, tracked = io.StringIO(), []
    alarms = Alarms(chance_loss=5.0, queue=0, samples=40, settled_step=0)
    report = RunReport(
        tmp_path,
        "title",
        total_steps=8,
        first_step=0,
        track=lambda values, step: tracked.append((step, values)),
        alarms=alarms,
        console=Console(file=out),
    )
    report.printed, report.tracked = out.getvalue, tracked
    return report


def score_of(backbone, config):
    view = eval_view_of(config.data, "bicubic")
    sets = (config.knn_train, config.knn_test)
    return knn_of_shards(Judged(backbone, view, {}), *sets, KnnProtocol(), device=CPU)["top1"]


@pytest.fixture
def gate(monkeypatch):
    """Scores that begin once the gate is set."""
    opened, real = threading.Event(), online_knn.knn_of_shards

    def wait_then_judge(*words, advance, **rest):
        while not opened.wait(0.01):
            advance(0)
        return real(*words, advance=advance, **rest)

    monkeypatch.setattr(online_knn, "knn_of_shards", wait_then_judge)
    return opened


def test_the_score_is_that_of_the_weights_at_its_step(backbone, config, told, gate):
    expected = score_of(copy.deepcopy(backbone), config)
    with OnlineKnn(config, backbone, CPU, told, is_judge=True) as judge:
        judge.after(1, is_last=False)
        judge.after(2, is_last=False)
        with torch.no_grad():
            for tensor in backbone.state_dict().values():
                tensor.zero_()
        gate.set()
        judge.finish(Agreement(2), lambda: 0)
    assert told.tracked == [(2, {"knn_top1": expected})]
    assert score_of(backbone, config) != expected


def test_a_second_copy_holds_the_weights_of_the_second_step(backbone, config, told):
    # As Accelerate names it among several processes; to PyTorch it is another device.
    judge = OnlineKnn(config, backbone, torch.device("cpu", 0), told, is_judge=True)
    judge.after(2, is_last=False)
    judge.finish(Agreement(2), lambda: 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter))
    judge.after(3, is_last=True)
    judge.finish(Agreement(2), lambda: 0)
    assert told.tracked[1] == (3, {"knn_top1": score_of(backbone, config)})


def test_what_falls_due_during_a_score_is_left_out_and_said_but_for_the_last(
    backbone, config, told, gate
):
    with OnlineKnn(config, backbone, CPU, told, is_judge=True) as judge:
        for step in range(1, 6):
            judge.after(step, is_last=step == 5)
        gate.set()
        judge.finish(Agreement(2), lambda: 0)
    assert "step 4: no kNN score, that of step 2 is being computed still" in told.printed()
    assert [step for step, _ in told.tracked] == [2, 5]


@pytest.mark.parametrize("way", ["signal", "error"])
def test_a_run_that_stops_does_not_wait_for_the_score_and_says_so(
    way, backbone, config, told, gate
):
    judge = OnlineKnn(config, backbone, CPU, told, is_judge=True)
    judge.after(2, is_last=False)
    if way == "signal":
        judge.finish(Agreement(2), lambda: 15)
    else:
        with pytest.raises(KeyError), judge:
            raise KeyError
    assert not gate.is_set()
    assert "the kNN score of step 2 was not finished and is dropped" in told.printed()
    assert told.tracked == []
    assert "online-knn" not in [thread.name for thread in threading.enumerate()]


def test_an_error_of_a_score_is_said_and_the_next_one_is_computed(
    backbone, config, told, monkeypatch
):
    real = online_knn.knn_of_shards
    with OnlineKnn(config, backbone, CPU, told, is_judge=True) as judge:
        monkeypatch.setattr(online_knn, "knn_of_shards", lambda *_, **__: 1 / 0)
        judge.after(2, is_last=False)
        judge.finish(Agreement(2), lambda: 0)
        monkeypatch.setattr(online_knn, "knn_of_shards", real)
        judge.after(4, is_last=False)
        judge.finish(Agreement(2), lambda: 0)
    assert "step 2: no kNN score, the run goes on: division by zero" in told.printed()
    assert [step for step, values in told.tracked if "knn_top1" in values] == [4]


def test_training_keeps_its_threads_random_numbers_and_modes(backbone, config, told, monkeypatch):
    seen, real, threads = {}, online_knn.knn_of_shards, torch.get_num_threads()

    def look(*words, **rest):
        seen.update(threads=torch.get_num_threads())
        return real(*words, **rest)

    def anew():
        numbers = []
        thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return numbers[0]

    monkeypatch.setattr(online_knn, "knn_of_shards", look)
    torch.set_num_threads(3)
    random = torch.get_rng_state()
    before = copy.deepcopy(backbone.state_dict())
    try:
        backbone.train()
        judge = OnlineKnn(config, backbone, CPU, told, is_judge=True)
        judge.after(2, is_last=False)
        # Of this thread, and what one that begins now would have.
        assert (torch.get_num_threads(), anew()) == (3, 3)
        judge.finish(Agreement(2), lambda: 0)
        assert (torch.get_num_threads(), anew()) == (3, 3)
    finally:
        torch.set_num_threads(threads)
    assert seen["threads"] == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in backbone.modules())
    assert not torch.is_inference_mode_enabled()
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)


def waits_for_the_judge():
    """Seconds that a process took to finish, and what it reported."""
    rank, told = dist.get_rank(), []
    report = SimpleNamespace(knn=lambda *words: told.append(words))
    config = dataclasses.replace(RECIPES["demo"], knn_train="train", knn_test="test")
    judge = OnlineKnn(config, nn.Linear(2, 2), CPU, report, is_judge=rank == 0)
    judge.after(3, is_last=True)
    started = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        slow = lambda *_, **__: time.sleep(1) or {"top1": 0.5}  # noqa: E731
        patch.setattr(online_knn, "knn_of_shards", slow)
        judge.finish(Agreement(2), lambda: 0)
    return time.monotonic() - started, told


def test_the_other_processes_wait_for_the_last_score_in_short_collectives():
    (judge_s, scores), (other_s, none) = run_in_processes(2, waits_for_the_judge)
    assert scores == [(3, 0.5)] and none == []
    assert judge_s >= 1 and other_s >= 1


def test_who_does_not_judge_waits_for_nothing(backbone, config, told):
    judge = OnlineKnn(config, backbone, CPU, told, is_judge=False)
    judge.after(2, is_last=True)
    started = time.monotonic()
    judge.finish(Agreement(2), lambda: 0)
    assert time.monotonic() - started < 1
    assert told.tracked == []
