"""The linear rule: a recipe's learning rate follows the batch, once, and the start says so.

Source: Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 2.1.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

from eval.recipes import RECIPES
from eval.run_config import TrainConfig
from model.schedule import scaled_lr


def with_own_lr(config: TrainConfig, default: TrainConfig, flags: list[str]) -> TrainConfig:
    """Settings whose learning rate is that of their batch.

    Args:
        config: what the flags made of ``default``.
        default: whose rate is for its own ``lr_batch``, or else for its own batch.
        flags: among which a rate, or what it is for, may be given.
    """
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    optimiser = config.optimiser
    lr_batch = optimiser.lr_batch
    if "--optimiser.lr-batch" not in given:
        lr_batch = None if "--optimiser.lr" in given else lr_batch or default.batch
    lr = scaled_lr(optimiser.lr, config.batch, lr_batch)
    return replace(config, optimiser=replace(optimiser, lr=lr, lr_batch=None))


def about_lr(config: TrainConfig) -> Iterator[str]:
    """How the learning rate follows from the recipe's, or that it does not; nothing if they agree.

    Args:
        config: as ``with_own_lr`` makes it, or of a run's config.json.
    """
    lr, recipe = config.optimiser.lr, RECIPES.get(config.recipe)
    if recipe is None:
        return
    lr_batch = recipe.optimiser.lr_batch or recipe.batch
    rule = scaled_lr(recipe.optimiser.lr, config.batch, lr_batch)
    follows = f"{recipe.optimiser.lr:g} x {config.batch}/{lr_batch}"
    if not math.isclose(lr, rule):
        yield f"learning rate {lr:g}; by the linear rule {config.recipe} has {rule:g}, {follows}"
    elif config.batch != lr_batch:
        yield f"learning rate {lr:g}: {follows}, the linear rule"
