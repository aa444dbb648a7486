"""Queue and momentum that suit the number of pictures, for recipes without numbers of their own.

The published ones come from two sets: ImageNet (65,536 keys for 1.28 million pictures, momentum
0.999 at 5,004 steps an epoch) and CIFAR-10 (4,096 for 50,000, where a longer queue gains nothing,
0.99 at 97 steps). Here:

- K is a twelfth of the pictures, as on CIFAR-10, in whole batches, at most 65,536; in small sets a
  batch, as long as that is no more than a quarter. Ours, CIFAR-10's first 10,000 pictures, 8 epochs
  (README): 128 and 512 keys are alike, 2,048 are 2 points worse.
- m is 1 - 1/(steps of an epoch), so that the key encoder forgets within an epoch, kept from 0.99 to
  0.999. Ours, at 78 steps: 0.99 is best, 0.999 is 2 points worse, 0.9 six, 0 learns nothing.
"""

from collections.abc import Iterator
from dataclasses import replace

from eval.recipes import FITTED
from eval.run_config import TrainConfig

PICTURES_PER_KEY = 12
FEWEST_PICTURES_PER_KEY = 4
LONGEST_QUEUE = 65_536
LOWEST_MOMENTUM, HIGHEST_MOMENTUM = 0.99, 0.999


def queue_for(pictures: int, batch: int) -> int:
    """Length of the queue (K).

    Args:
        pictures: of the data set.
        batch: of a step, all processes together.
    """
    longest = min(pictures // PICTURES_PER_KEY, LONGEST_QUEUE)
    one_batch = min(batch, pictures // FEWEST_PICTURES_PER_KEY, LONGEST_QUEUE)
    return max(longest // batch * batch, one_batch, 1)


def momentum_for(pictures: int, batch: int) -> float:
    """Momentum of the key encoder (m), to four places."""
    steps_per_epoch = max(pictures // batch, 1)
    forgets_in_an_epoch = 1 - 1 / steps_per_epoch
    return round(min(max(forgets_in_an_epoch, LOWEST_MOMENTUM), HIGHEST_MOMENTUM), 4)


def fitted(recipe: TrainConfig, pictures: int, batch: int) -> TrainConfig:
    """A recipe with the queue and momentum that suit a set; others stay as they are."""
    if recipe.recipe not in FITTED:
        return recipe
    queue, momentum = queue_for(pictures, batch), momentum_for(pictures, batch)
    return replace(recipe, moco=replace(recipe.moco, queue=queue, momentum=momentum))


def about_fit(config: TrainConfig, pictures: int) -> Iterator[str]:
    """What was chosen for a set, and where the settings differ from that."""
    if config.recipe not in FITTED:
        return
    chosen = fitted(config, pictures, config.batch).moco
    for what, now, rule in (
        ("queue", config.moco.queue, chosen.queue),
        ("momentum", config.moco.momentum, chosen.momentum),
    ):
        if now == rule:
            yield f"{what} {now:,}: chosen for {pictures:,} pictures in steps of {config.batch:,}"
        else:
            yield f"{what} {now:,}: given; for {pictures:,} pictures it would be {rule:,}"
