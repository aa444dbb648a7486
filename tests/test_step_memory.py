"""Planned memory against what PyTorch's allocator hands out in a real step."""

from dataclasses import replace

import pytest
import torch

from eval.recipes import RECIPES
from model.encoder import EncoderConfig
from model.key_queue import KeyQueue
from model.mechanism import ENCODERS
from model.micro_batches import MicroBatches
from model.optimiser import make_optimiser
from model.run_state import flatten_optimiser
from model.schedule import OptimiserConfig
from model.step_memory import (
    AUTOCAST,
    bytes_of,
    network_of_process,
    optimiser_state,
    peak_of_step,
)
from tests.allocated import allocated_at_most

CIFAR = RECIPES["cifar10"]


def step(network, views, precision):
    dtype = AUTOCAST.get(precision)
    if network.micro_batches > 1:
        MicroBatches(network, network, KeyQueue(64, 128, 0), 0.2).run(views, None, 0)
        return
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        pairs = network(*views, 0)
    results = [out_ND for pair in pairs for out_ND in pair if out_ND.requires_grad]
    torch.autograd.backward(results, [torch.ones_like(out_ND) for out_ND in results])


@pytest.mark.parametrize(
    ("precision", "changes", "micro_batch"),
    [
        ("no", {}, None),
        ("no", {"batch_norm": "none"}, 32),
        ("bf16", {"symmetric": True}, None),
        ("bf16", {"mechanism": "end-to-end"}, None),
    ],
)
def test_the_planned_peak_is_that_of_the_allocator(precision, changes, micro_batch):
    encoder = replace(CIFAR.encoder, layers=(1, 1, 1, 1))
    moco = replace(CIFAR.moco, batch_norm_groups=2, **changes)
    pictures = 16 if micro_batch is None else 2 * micro_batch
    planned = peak_of_step(
        network_of_process(encoder, moco, 2 * pictures, 2, 32, micro_batch),
        pictures,
        32,
        precision,
    )
    one = replace(moco, batch_norm="none")
    network = ENCODERS[moco.mechanism](encoder, one, pictures, 0, 32, micro_batch)
    views = [torch.randn(pictures, 3, 32, 32) for _ in range(2)]
    step(network, views, precision)  # kernels keep memory of their own from the first call on
    network.zero_grad()
    allocated = allocated_at_most(lambda: step(network, views, precision))
    assert planned == pytest.approx(allocated, rel=0.1)  # scratch memory is real and not planned


def test_a_step_takes_the_activations_of_one_micro_batch():
    encoder = replace(CIFAR.encoder, layers=(1, 1, 1, 1))
    peak = {}
    for size in (None, 128):
        network = network_of_process(encoder, CIFAR.moco, 512, 1, 32, size)
        peak[size] = peak_of_step(network, 512, 32, "no") - bytes_of(network.trained_parameters())
    assert 1 / 4 < peak[128] / peak[None] < 1 / 4 + 0.02


def test_groups_of_batch_norm_are_those_of_one_process():
    network = network_of_process(CIFAR.encoder, CIFAR.moco, 512, 4, 32)
    assert {m.groups for m in network.modules() if hasattr(m, "groups") and "Split" in str(m)} == {
        2
    }
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_the_state_of_the_optimiser_is_that_after_a_real_step(name):
    config = OptimiserConfig(name=name, lr=0.01)
    encoder = EncoderConfig(backbone="test_resnet", head="v3", dim=16, hidden=32)
    planned = optimiser_state(config, network_of_process(encoder, CIFAR.moco, 16, 1, 32))
    network = ENCODERS["queue"](encoder, replace(CIFAR.moco, batch_norm="none"), 16, 0, 32)
    optimizer = make_optimiser(config, network.parameters())
    step(network, [torch.randn(16, 3, 32, 32) for _ in range(2)], "no")
    optimizer.step()
    assert planned == bytes_of(flatten_optimiser(optimizer)[0].values())
