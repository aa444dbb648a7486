"""A step without a finite gradient is left out on all ranks and changes nothing."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from model.collectives import rank
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.memory_bank import MemoryBank
from model.moco import MoCo, MoCoConfig
from model.optimiser import make_optimiser
from model.schedule import OptimiserConfig
from model.step_guard import LeftOut, StepGuard, summary
from tests.run_in_processes import run_in_processes


class Training:
    """Steps of MoCo with a queue, on pictures that may be bad."""

    def __init__(self, optimiser="sgd", device="cpu"):
        torch.manual_seed(0)
        self.device = torch.device(device)
        encoder = EncoderConfig(backbone="test_resnet", dim=8)
        config = MoCoConfig(batch_norm="shuffle", batch_norm_groups=2)
        self.moco = MoCo(encoder, config, global_batch=8, seed=0).to(self.device)
        self.queue = KeyQueue(12, 8, 0).to(self.device)
        config = OptimiserConfig(name=optimiser, lr=0.1, weight_decay=1e-4)
        self.optimizer = make_optimiser(config, self.moco.parameters())
        self.guard = StepGuard(self.moco, None)
        is_alone = not torch.distributed.is_initialized()
        self.network = self.moco if is_alone else DistributedDataParallel(
            self.moco, broadcast_buffers=False
        )  # fmt: skip

    def views(self, number):
        generator = torch.Generator().manual_seed(number)
        return torch.randn(2, 4, 3, 32, 32, generator=generator).to(self.device)

    def run(self, number, bad_view=None):
        views = self.views(number)
        if bad_view is not None:
            views[bad_view, 1, 0, 0, 0] = float("nan")
        self.advance(number, views)

    def advance(self, number, views):
        self.guard.begin()
        pairs = self.network(*views, number)
        loss, _ = self.queue.contrast(pairs, 0.2, range(4), number)
        loss.backward()
        self.guard.step(self.optimizer, number + 1, [number])
        self.optimizer.zero_grad()

    def trained(self):
        """What a bad step must not change: f_q, all running statistics, the optimiser's state."""
        query = dict(self.moco.encoder_q.named_parameters())
        statistics = dict(self.moco.named_buffers())
        state = self.optimizer.state_dict()["state"]
        floating = {n: t for n, t in (query | statistics).items() if t.is_floating_point()}
        return copy.deepcopy((floating, state))


@pytest.mark.parametrize("bad_view", [0, 1], ids=["query", "key"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars"])
def test_a_nan_in_either_view_changes_neither_weights_nor_statistics_nor_state(optimiser, bad_view):
    training = Training(optimiser)
    training.run(0)
    before = training.trained()
    training.run(1, bad_view)
    torch.testing.assert_close(training.trained(), before, rtol=0, atol=0)
    assert training.queue.rows_KD.isfinite().all()
    assert (training.guard.skipped, training.guard.in_a_row) == (1, 1)
    training.run(2)
    assert (training.guard.skipped, training.guard.in_a_row) == (1, 0)
    assert training.queue.rows_KD.isfinite().all()
    assert not torch.equal(
        next(iter(training.trained()[0].values())), next(iter(before[0].values()))
    )


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars"])
def test_a_first_step_that_is_left_out_was_never_there(optimiser):
    training, clean = Training(optimiser), Training(optimiser)
    training.run(0, bad_view=0)
    for network in (training, clean):  # the key encoder has not moved: both are equal still
        network.queue.rows_KD.copy_(Training().queue.rows_KD)
        network.run(1)
    torch.testing.assert_close(training.trained(), clean.trained(), rtol=0, atol=0)


def test_the_host_hears_of_a_step_at_the_next_one_unless_it_waits():
    training = Training()
    training.run(0, bad_view=0)
    assert training.guard.left_out(wait=False) == []
    training.run(1, bad_view=0)
    assert training.guard.left_out(wait=False) == [LeftOut(1, [0], 1, 1)]
    assert training.guard.left_out(wait=True) == [LeftOut(2, [1], 2, 2)]
    training.run(2)
    training.run(3, bad_view=1)
    assert training.guard.skipped == 3
    assert training.guard.left_out(wait=False) == [LeftOut(4, [3], 3, 1)]
    assert training.guard.left_out(wait=True) == []


def plain_guard(weight, scaler=None):
    """A guard of one parameter, and its optimiser."""
    optimizer = make_optimiser(OptimiserConfig(lr=1.0, weight_decay=0.0), [weight])
    return StepGuard(torch.nn.ParameterList([weight]), scaler), optimizer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_bad_number_anywhere_shows_in_the_summary(device, layout):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    good = [torch.randn(8, 3, 3, 3).to(memory_format=layout), torch.randn(5), torch.randn(())]
    good = [gradient.to(device) for gradient in good]
    assert torch.isfinite(summary(good))
    for bad in ([float("nan")], [float("inf")], [-float("inf")], [float("inf"), -float("inf")]):
        for number in range(2):
            gradients = [gradient.clone() for gradient in good]
            for place, value in enumerate(bad):
                gradients[number][place] = value
            assert not torch.isfinite(summary(gradients))
    assert not torch.isfinite(summary([*good, torch.tensor(float("nan"), device=device)]))


def test_a_gradient_whose_summary_overflows_is_not_finite():
    weight = torch.nn.Parameter(torch.zeros(2))
    guard, optimizer = plain_guard(weight)
    weight.grad = torch.full((2,), 3e38)
    guard.step(optimizer, 1, [])
    assert guard.skipped == 1
    assert weight.tolist() == [0.0, 0.0]


def test_the_scaler_of_float16_lowers_its_scale_after_a_bad_step():
    weight = torch.nn.Parameter(torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard, optimizer = plain_guard(weight, scaler)
    scaler.scale(weight.sum() * float("inf")).backward()
    guard.step(optimizer, 1, [])
    assert guard.skipped == 1
    assert weight.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 512.0
    weight.grad = None
    scaler.scale(weight.sum()).backward()
    guard.step(optimizer, 2, [])
    assert guard.in_a_row == 0
    assert weight.tolist() == [-1.0, -1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "lars"])
def test_no_part_of_a_step_waits_for_the_gpu(optimiser):
    training = Training(optimiser, "cuda")
    views = [training.views(number) for number in range(4)]
    training.advance(0, views[0])  # makes kernels and memory
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(1, 4):
            training.advance(number, views[number])
            training.guard.left_out(wait=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert training.guard.skipped == 0


def one_rank_meets_a_nan():
    """Steps left out, and the weights in the end."""
    training = Training()
    for number in range(3):
        training.run(number, 0 if (number, rank()) == (1, 1) else None)
    skipped = [left.step for left in training.guard.left_out(wait=True)]
    return skipped, next(training.moco.encoder_q.parameters()).tolist()


def test_all_ranks_leave_a_step_out_that_is_bad_on_one():
    first, second = run_in_processes(2, one_rank_meets_a_nan)
    assert first[0] == second[0] == [2]
    assert first[1] == second[1]


def test_a_memory_bank_keeps_the_entry_of_a_key_that_is_not_finite():
    bank = MemoryBank(9, 4, drawn=3)
    before = bank.rows_SD.clone()
    query_ND = torch.full((2, 4), 0.5)
    query_ND[0, 0] = float("nan")
    bank.contrast([(query_ND.clone().requires_grad_(), query_ND)], 0.2, [3, 5], 0)
    torch.testing.assert_close(bank.rows_SD[3], before[3])
    assert not torch.allclose(bank.rows_SD[5], before[5])
