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
from model.step_guard import StepGuard
from tests.run_in_processes import run_in_processes


class Training:
    """Steps of MoCo with a queue, on pictures that may be bad."""

    def __init__(self):
        torch.manual_seed(0)
        encoder = EncoderConfig(backbone="test_resnet", dim=8)
        self.moco = MoCo(encoder, MoCoConfig(batch_norm="none"), global_batch=8, seed=0)
        self.queue = KeyQueue(12, 8, 0)
        self.optimizer = torch.optim.SGD(self.moco.parameters(), lr=0.1, momentum=0.9)
        self.guard = StepGuard(self.moco, None)
        is_alone = not torch.distributed.is_initialized()
        self.network = self.moco if is_alone else DistributedDataParallel(
            self.moco, broadcast_buffers=False
        )  # fmt: skip

    def step(self, number, bad_view=None):
        views = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(number))
        if bad_view is not None:
            views[bad_view, 1, 0, 0, 0] = float("nan")
        self.guard.begin()
        pairs = self.network(*views, number)
        loss, _ = self.queue.contrast(pairs, 0.2, range(4), number)
        loss.backward()
        is_good = self.guard.step(self.optimizer)
        self.optimizer.zero_grad()
        return is_good

    def trained(self):
        """What a bad step must not change: f_q, all running statistics, the momentum."""
        query = dict(self.moco.encoder_q.named_parameters())
        statistics = dict(self.moco.named_buffers())
        momentum = self.optimizer.state_dict()["state"]
        floating = {n: t for n, t in (query | statistics).items() if t.is_floating_point()}
        return copy.deepcopy((floating, momentum))


@pytest.mark.parametrize("bad_view", [0, 1], ids=["query", "key"])
def test_a_nan_in_either_view_changes_neither_weights_nor_statistics_nor_momentum(bad_view):
    training = Training()
    assert training.step(0)
    before = training.trained()
    assert not training.step(1, bad_view)
    torch.testing.assert_close(training.trained(), before, rtol=0, atol=0)
    assert training.queue.rows_KD.isfinite().all()
    assert (training.guard.skipped, training.guard.in_a_row) == (1, 1)
    assert training.step(2)
    assert (training.guard.skipped, training.guard.in_a_row) == (1, 0)
    assert training.queue.rows_KD.isfinite().all()


def test_a_gradient_whose_norm_overflows_is_not_finite():
    weight = torch.nn.Parameter(torch.zeros(2))
    network = torch.nn.ParameterList([weight])
    guard = StepGuard(network, None)
    weight.grad = torch.full((2,), 3e38)
    assert not guard.step(torch.optim.SGD([weight], lr=1.0))
    assert weight.tolist() == [0.0, 0.0]


def test_the_scaler_of_float16_lowers_its_scale_after_a_bad_step():
    weight = torch.nn.Parameter(torch.zeros(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    guard = StepGuard(torch.nn.ParameterList([weight]), scaler)
    scaler.scale(weight.sum() * float("inf")).backward()
    assert not guard.step(optimizer)
    assert weight.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 512.0


def one_rank_meets_a_nan():
    """What each step was, and the weights in the end."""
    training = Training()
    taken = [
        training.step(number, 0 if (number, rank()) == (1, 1) else None) for number in range(3)
    ]
    return taken, next(training.moco.encoder_q.parameters()).tolist()


def test_all_ranks_leave_a_step_out_that_is_bad_on_one():
    first, second = run_in_processes(2, one_rank_meets_a_nan)
    assert first[0] == second[0] == [True, False, True]
    assert first[1] == second[1]


def test_a_memory_bank_keeps_the_entry_of_a_key_that_is_not_finite():
    bank = MemoryBank(9, 4, drawn=3)
    before = bank.rows_SD.clone()
    query_ND = torch.full((2, 4), 0.5)
    query_ND[0, 0] = float("nan")
    bank.contrast([(query_ND.clone().requires_grad_(), query_ND)], 0.2, [3, 5], 0)
    torch.testing.assert_close(bank.rows_SD[3], before[3])
    assert not torch.allclose(bank.rows_SD[5], before[5])
