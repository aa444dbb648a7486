"""The learning rate at each step, as a function of the step alone."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """SGD and its learning rate."""

    lr: float = 0.03
    """At the start, for the recipe's batch."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all parameters, batch norm and biases too, as in the official code."""
    schedule: Literal["cosine", "steps"] = "cosine"
    """cosine: to zero at the end. steps: times --optimiser.factor at each milestone."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """For steps: shares of the whole run."""
    factor: float = 0.1
    """For steps."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = "--optimiser." + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: give a number of at least 0")


def lr_at(config: OptimiserConfig, step: int, total_steps: int, steps_per_epoch: int) -> float:
    """The learning rate of step ``step``, from 0.

    It changes between epochs only, as in the official MoCo v1 and v2; a run shorter than an epoch
    would keep one rate, so there every step counts.
    """
    if total_steps > steps_per_epoch:
        progress = (step // steps_per_epoch) / math.ceil(total_steps / steps_per_epoch)
    else:
        progress = step / total_steps
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
    passed = sum(progress >= milestone for milestone in config.milestones)
    return config.lr * config.factor**passed
