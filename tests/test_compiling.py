"""Compiled encoders against plain ones, and the way back."""

import copy

import pytest
import torch

from model.compiling import compile_encoders, or_plain
from model.encoder import EncoderConfig
from model.moco import MoCo, MoCoConfig


def small_moco():
    torch.manual_seed(0)
    encoder = EncoderConfig(backbone="test_resnet", dim=8)
    return MoCo(encoder, MoCoConfig(batch_norm_groups=4), global_batch=16, seed=0)


def assert_steps_are_alike(compiled, plain, atol):
    views = torch.randn(2, 16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        for network in (compiled, plain):
            network.zero_grad()
        found = [network(*views, step)[0] for network in (compiled, plain)]
        torch.testing.assert_close(*found, rtol=0, atol=atol)
        for query_ND, key_ND in found:
            (query_ND * key_ND).sum().backward()
    pairs = zip(compiled.encoder_q.parameters(), plain.encoder_q.parameters(), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=0.02, atol=100 * atol)
    torch.testing.assert_close(compiled.state_dict(), plain.state_dict(), rtol=1e-3, atol=atol)


@pytest.mark.filterwarnings("default")  # PyTorch's own, while it traces
@pytest.mark.parametrize(
    ("backend", "atol"),
    [("eager", 0.0), pytest.param("inductor", 1e-4, marks=pytest.mark.slow)],
)
def test_both_encoders_are_compiled_and_compute_what_the_plain_ones_do(backend, atol):
    moco, said = small_moco(), []
    plain = copy.deepcopy(moco)
    compile_encoders(moco, said.append, backend)
    assert_steps_are_alike(moco, plain, atol)
    assert said == []


def broken_backend(*_):
    raise RuntimeError("no compiler here\nmore")


@pytest.mark.filterwarnings("default")
def test_where_compiling_fails_the_run_goes_on_plain_and_says_so_once():
    moco, said = small_moco(), []
    plain = copy.deepcopy(moco)
    compile_encoders(moco, said.append, broken_backend)
    assert_steps_are_alike(moco, plain, 0.0)
    (line,) = said
    assert line.startswith("--compile is off, torch.compile failed: ")
    assert "no compiler here" in line


@pytest.mark.filterwarnings("default")
def test_a_failure_of_the_function_itself_is_raised_and_later_ones_too():
    said, is_broken = [], [True]

    def function(x):
        if is_broken[0]:
            raise ValueError("of its own")
        return x + 1

    with pytest.raises(ValueError, match="of its own"):
        or_plain(function, said.append, "eager")(torch.ones(2))
    assert said == []
    is_broken[0] = False
    call = or_plain(function, said.append, "eager")
    assert torch.equal(call(torch.ones(2)), torch.full((2,), 2.0))
    is_broken[0] = True
    with pytest.raises(ValueError, match="of its own"):
        call(torch.ones(2))
    assert said == []
