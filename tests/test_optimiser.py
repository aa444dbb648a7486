"""The optimiser of each recipe, and that a checkpoint's form holds all of its state."""

import json

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from model.lars import Lars
from model.optimiser import make_optimiser
from model.run_state import flatten_optimiser, restore_optimiser
from model.schedule import OptimiserConfig

KINDS = {"sgd": torch.optim.SGD, "lars": Lars, "adamw": torch.optim.AdamW}


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


def advance(model, optimiser, steps):
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        rows = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        model(rows).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()


@pytest.mark.parametrize("name", KINDS)
def test_a_name_gives_its_optimiser_with_the_numbers_of_the_settings(name):
    config = OptimiserConfig(name=name, lr=0.3, momentum=0.8, weight_decay=0.01)
    optimiser = make_optimiser(config, network(0).parameters())
    (group,) = optimiser.param_groups
    assert type(optimiser) is KINDS[name]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.01)
    assert group["betas"] == (0.8, 0.999) if name == "adamw" else group["momentum"] == 0.8


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_optimiser_goes_on_as_if_it_had_not_stopped(name):
    config = OptimiserConfig(name=name, lr=0.05, weight_decay=0.01)
    whole, resumed = network(1), network(2)
    optimiser = make_optimiser(config, whole.parameters())
    advance(whole, optimiser, 5)
    tensors, plain = flatten_optimiser(optimiser)
    tensors, plain = load(save(tensors)), json.loads(json.dumps(plain))
    resumed.load_state_dict(whole.state_dict())
    second = make_optimiser(config, resumed.parameters())
    restore_optimiser(second, tensors, plain)
    advance(whole, optimiser, 3)
    advance(resumed, second, 3)
    assert all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))


def test_frozen_parameters_are_left_out():
    model = network(0)
    model[0].requires_grad_(False)
    (group,) = make_optimiser(OptimiserConfig(), model.parameters()).param_groups
    assert len(group["params"]) == 4


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_optimiser_fits_weights_of_another_memory_layout_and_older_checkpoints(name):
    config = OptimiserConfig(name=name, lr=0.05, weight_decay=0.01)
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=layout)
        optimiser = make_optimiser(config, model.parameters())
        for step in range(4):
            if step == 2:
                tensors, plain = flatten_optimiser(optimiser)
                tensors = {n: t.contiguous().clone() for n, t in tensors.items()}
                for group in plain["groups"]:
                    group |= {"fused": None, "foreach": None}  # as before the kernels were fused
                optimiser = make_optimiser(config, model.parameters())
                restore_optimiser(optimiser, tensors, plain)
            generator = torch.Generator().manual_seed(step)
            picture = torch.randn(2, 4, 8, 8, generator=generator).to(memory_format=layout)
            model(picture).square().mean().backward()
            optimiser.found_inf = torch.zeros(())  # which only fused ones take
            optimiser.step()
            optimiser.zero_grad()
        ends.append(model.weight.detach())
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)
