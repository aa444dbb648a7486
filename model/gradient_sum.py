"""Gradients of several CPUs, added up in the order of the ranks.

DistributedDataParallel packs gradients into buckets, by the order of the parameters in the first
step of a process and by that of the backward pass in the others. A ring, as gloo's, adds the ranks'
numbers up in an order that depends on an element's place in its bucket. So the first step after a
resume would round otherwise than the same step of a run that was not interrupted, with more than
two processes: of two the order does not matter.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from model.collectives import talks_over_gloo, world_size


def sum_in_rank_order(module: torch.nn.Module) -> None:
    """Let a wrapped module's gradients not depend on their place in a bucket, where they would.

    Args:
        module: as Accelerate prepared it; one without a wrapper is left as it is.
    """
    if isinstance(module, DistributedDataParallel) and talks_over_gloo() and world_size() > 2:
        module.register_comm_hook(None, mean_of_bucket)


def mean_of_bucket(
    _state: object,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[Tensor]:
    """The mean of a bucket over all ranks: each adds up one part of it and sends it to all.

    As many bytes as a ring moves.
    """
    gradient, world = bucket.buffer(), world_size()
    part = -(-len(gradient) // world)
    mine = torch.nn.functional.pad(gradient, (0, part * world - len(gradient)))
    received = torch.empty_like(mine)
    dist.all_to_all_single(received, mine)
    total, *others = received.view(world, part)
    for other in others:
        total += other
    total /= world
    dist.all_gather_into_tensor(mine, total)
    mean: torch.futures.Future[Tensor] = torch.futures.Future()
    mean.set_result(mine[: len(gradient)])
    return mean
