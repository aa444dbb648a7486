"""Learning rate and key encoder's momentum at each step, as functions of the step alone."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """What moves the query encoder, and its learning rate."""

    name: Literal["sgd", "lars", "adamw"] = "sgd"
    """sgd: MoCo v1 and v2. lars: v3 on a ResNet. adamw: v3 on a ViT."""
    lr: float = 0.03
    """The highest. A recipe's own follows --batch in proportion, from what it was published for;
    one that is given is taken as it is."""
    lr_batch: int | None = None
    """Pictures in a step that --optimiser.lr is for, where that is not --batch: it is scaled by
    --batch over this number. MoCo v3 gives its rates per 256."""
    momentum: float = 0.9
    """Of SGD and LARS; AdamW's first beta."""
    weight_decay: float = 1e-4
    """On all parameters, batch norm and biases too, as in the official code; LARS: on weights."""
    schedule: Literal["cosine", "steps", "decay"] = "cosine"
    """cosine: to zero at the end. steps, decay: times --optimiser.factor at each milestone, or
    after each --optimiser.decay-steps."""
    every: Literal["epoch", "step"] = "epoch"
    """When cosine and steps change the rate: v1 and v2 between epochs, v3 at each step."""
    warmup_epochs: float = 0.0
    """Linear from zero, at each step, before the rest; MoCo v3: 10 on a ResNet, 40 on a ViT."""
    milestones: tuple[float, ...] = (0.6, 0.8)
    """For steps: shares of the whole run."""
    factor: float = 0.1
    """For steps and decay."""
    decay_steps: int = 62_500
    """For decay; MoCo v1 on a billion pictures: x 0.9 after each 62,500 steps of 1024."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "warmup_epochs", "factor"):
            if not 0 <= getattr(self, name) < math.inf:
                flag = "--optimiser." + name.replace("_", "-")
                raise ValueError(f"{flag} {getattr(self, name)}: give a number of at least 0")
        places = self.milestones
        if list(places) != sorted(places) or not all(0 <= place <= 1 for place in places):
            given = " ".join(map(str, places))
            raise ValueError(
                f"--optimiser.milestones {given}: give shares of the run, from 0 to 1 and rising"
            )
        for name in ("lr_batch", "decay_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                flag = "--optimiser." + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: give a number of at least 1")


def scaled_lr(lr: float, batch: int, lr_batch: int | None) -> float:
    """The linear scaling rule: a rate given for ``lr_batch`` pictures, at ``batch`` pictures.

    Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.1; MoCo v3 uses it with
    256 for LARS and AdamW alike.
    """
    return lr if lr_batch is None else lr * (batch / lr_batch)  # a ratio of 1 changes no bit


def lr_at(
    config: OptimiserConfig, step: int, total_steps: int, steps_per_epoch: int, batch: int
) -> float:
    """The learning rate of step ``step``, from 0.

    The official v1 and v2 change it between epochs only; a run shorter than an epoch would keep
    one rate, so there every step counts. The cosine of v3 begins where the warm-up ends.

    Args:
        config: of the optimiser.
        step: from 0.
        total_steps: of the whole run.
        steps_per_epoch: full batches in a pass over the pictures.
        batch: pictures in a step, all processes together.
    """
    highest = scaled_lr(config.lr, batch, config.lr_batch)
    warmup_steps = config.warmup_epochs * steps_per_epoch
    if step < warmup_steps:
        return highest * step / warmup_steps
    if config.schedule == "decay":
        return highest * config.factor ** (step // config.decay_steps)
    epochs = math.ceil(total_steps / steps_per_epoch)
    if config.every == "epoch" and epochs > 1:
        whole_epochs = step // steps_per_epoch
        done, length = max(whole_epochs - config.warmup_epochs, 0), epochs - config.warmup_epochs
    else:
        done, length = step - warmup_steps, total_steps - warmup_steps
    progress = done / length
    if config.schedule == "cosine":
        return highest * 0.5 * (1 + math.cos(math.pi * progress))
    return highest * config.factor ** sum(progress >= place for place in config.milestones)


def momentum_at(
    start: float, step: int, total_steps: int, schedule: Literal["constant", "cosine"]
) -> float:
    """The key encoder's momentum m at step ``step``, from 0.

    Args:
        start: m at the first step.
        step: from 0.
        total_steps: of the whole run.
        schedule: constant: MoCo v1 and v2. cosine: MoCo v3, from ``start`` towards 1 at the end.
    """
    if schedule == "constant":
        return start
    return 1 - 0.5 * (1 + math.cos(math.pi * step / total_steps)) * (1 - start)
