"""LARS in multi-tensor form against the plain loop, and the rules that MoCo v3 adds."""

import pytest
import torch

from model.lars import Lars

SHAPES = [(4, 3), (4,), (5, 4, 3, 3), (), (1, 7)]


def plain_step(weights, gradients, velocities, lr, momentum, decay, trust):
    """The definition, one parameter at a time."""
    for weight, gradient, velocity in zip(weights, gradients, velocities, strict=True):
        direction = gradient.clone()
        if weight.ndim > 1:
            direction += decay * weight
            length, update = weight.norm(), direction.norm()
            if length > 0 and update > 0:
                direction *= trust * length / update
        velocity.mul_(momentum).add_(direction)
        weight.sub_(lr * velocity)


def parameters(seed=0):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in SHAPES]


def test_ten_steps_equal_the_plain_loop():
    ours = parameters()
    plain = [p.detach().clone() for p in ours]
    velocities = [torch.zeros_like(p) for p in plain]
    optimiser = Lars(ours, lr=0.7, momentum=0.9, weight_decay=0.05, trust=0.01)
    for _ in range(10):
        for p in ours:
            p.grad = torch.randn_like(p)
        plain_step(plain, [p.grad for p in ours], velocities, 0.7, 0.9, 0.05, 0.01)
        optimiser.step()
    for mine, truth in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.detach(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_weight_moves_by_the_trust_share_of_its_length_whatever_the_gradient(scale):
    weight = torch.randn(8, 8).requires_grad_()
    before = weight.detach().clone()
    weight.grad = scale * torch.randn(8, 8)
    Lars([weight], lr=2.0).step()
    moved = (weight.detach() - before).norm()
    torch.testing.assert_close(moved, 2.0 * 0.001 * before.norm(), rtol=1e-4, atol=0)


def test_biases_and_norms_are_neither_scaled_nor_decayed():
    bias = torch.ones(5).requires_grad_()
    bias.grad = torch.full((5,), 0.5)
    Lars([bias], lr=0.1, weight_decay=10.0).step()
    torch.testing.assert_close(bias.detach(), torch.full((5,), 1 - 0.1 * 0.5))


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_a_length_of_zero_gives_no_infinite_step(zero):
    weight = (torch.zeros(3, 3) if zero == "weight" else torch.ones(3, 3)).requires_grad_()
    weight.grad = torch.zeros(3, 3) if zero == "gradient" else torch.ones(3, 3)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    Lars([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), before - 0.1 * gradient)


def test_a_parameter_without_gradient_stays():
    weights = [torch.ones(2, 2).requires_grad_() for _ in range(2)]
    weights[0].grad = torch.ones(2, 2)
    optimiser = Lars(weights, lr=0.1)
    optimiser.step()
    assert torch.equal(weights[1], torch.ones(2, 2))
    assert not torch.equal(weights[0], torch.ones(2, 2))
    assert weights[1] not in optimiser.state
