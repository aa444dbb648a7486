"""LARS as MoCo v3 uses it: each weight moves by a share of its own length."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose gradient is scaled, per weight, by trust |w| / |g + wd w|.

    Parameters of at most one dimension (batch norm, biases) are plain SGD without weight decay.
    A weight or gradient of length zero is not scaled. All parameters move in a handful of
    multi-tensor calls, and nothing waits for the device. As PyTorch's fused optimisers it does
    nothing where a tensor ``found_inf``, set on it, is 1.

    Args:
        params: as for every optimiser.
        lr: learning rate.
        momentum: of the scaled gradient.
        weight_decay: on parameters of two dimensions and more.
        trust: the trust coefficient.

    Source: https://arxiv.org/abs/1708.03888; the official MoCo v3 for what is left out.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        numbers = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {**numbers, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            weights = [p for p in moved if p.ndim > 1]
            rest = [p for p in moved if p.ndim <= 1]
            directions = scaled_gradients(weights, group) + [p.grad for p in rest]
            ordered = weights + rest
            velocities: list[Tensor | None] = [self._velocity(p) for p in ordered]
            sgd(
                ordered,
                directions,
                velocities,
                fused=group["fused"],
                found_inf=getattr(self, "found_inf", None),
                weight_decay=0.0,
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=0.0,
                nesterov=False,
                maximize=False,
            )
        return loss

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        return velocity


def scaled_gradients(weights: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """Gradients with weight decay, each times its trust ratio."""
    if not weights:
        return []
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    decayed = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    weight_norm = torch.stack(torch._foreach_norm(weights))
    update_norm = torch.stack(torch._foreach_norm(decayed))
    ratio = group["trust"] * weight_norm / update_norm
    is_scaled = (weight_norm > 0) & (update_norm > 0)
    ratio = torch.where(is_scaled, ratio, torch.ones_like(ratio))
    torch._foreach_mul_(decayed, list(ratio.unbind()))
    return decayed
