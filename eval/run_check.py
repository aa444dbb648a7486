"""Before the first step: can the run start as it is asked for, and what a person should know."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from eval.features import require_labels
from eval.learning_rate import about_lr
from eval.run_config import TrainConfig
from eval.small_data import about_fit
from eval.tracking import require_trackers
from eval.weights_source import starting_weights
from model.checkpoint import Checkpoint
from model.encoder import make_backbone
from model.moco import count_micro_batches, groups_per_process
from pipeline.data_config import cache_of, make_order, open_store
from pipeline.loader import PairLoader
from pipeline.location import writable_location
from pipeline.order import Order
from pipeline.program import InputError
from pipeline.shard_store import ShardStore


def require_output(config: TrainConfig) -> Path:
    """The folder of the run.

    Raises:
        InputError: if it is not given.
    """
    if config.output is None:
        raise InputError("no folder for the run: give one with --output")
    return config.output


def check(config: TrainConfig) -> str:
    """See that a run can start, before anything is written.

    Returns:
        The identity of its data set, the SHA-256 of the manifest.

    Raises:
        InputError, EncoderError: naming what is wrong.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if config.mirror:
        writable_location(config.mirror)
    store = open_store(config.data)
    order = make_order(store, config.data, config.batch, config.seed)
    check_order(config, order, world)
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise InputError("--precision fp16 needs a GPU, none is there: give bf16 or no")
    if config.data.eval_resize_px < config.data.image_px:
        raise InputError(
            f"--data.eval-resize-px {config.data.eval_resize_px} is smaller than the views of "
            f"{config.data.image_px} px: give at least that"
        )
    with torch.device("meta"):
        make_backbone(config.encoder, config.data.image_px)
    starting_weights(config.encoder, config.data.image_px)
    for shards in (config.knn_train, config.knn_test):
        if shards is not None:
            require_labels(ShardStore(shards, cache_of(config.data)))
    require_trackers(config.trackers)
    return store.manifest.sha256


def check_order(config: TrainConfig, order: Order, world: int) -> None:
    """See that so many processes can share the batches of a set.

    Raises:
        InputError: naming what does not fit.
    """
    order.batch(0, 0, world)
    length_in_steps(config, order)
    try:
        groups_per_process(config.moco, config.batch, world)
        micro_batches_of(config, world)
    except ValueError as error:
        raise InputError(str(error)) from error
    check_queue_fits(config)
    if config.moco.mechanism == "memory-bank" and order.samples <= config.batch:
        raise InputError(
            f"a memory bank needs more pictures than a batch, there are {order.samples} for a "
            f"--batch of {config.batch}: give a smaller one, or another --moco.mechanism"
        )


def check_queue_fits(config: TrainConfig) -> None:
    """See that the keys of a queue are not more than a machine can hold.

    Raises:
        InputError: if they are.
    """
    needed = config.moco.queue * config.encoder.dim * 4  # float32, as they are drawn on the host
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.moco.mechanism == "queue" and needed > memory:
        raise InputError(
            f"--moco.queue {config.moco.queue}: its keys take {needed / 2**30:,.0f} GiB, this "
            f"machine has {memory / 2**30:,.0f} of memory: give a shorter one"
        )


def length_in_steps(config: TrainConfig, order: Order) -> int:
    """Steps of the whole run.

    Raises:
        InputError: if there are none.
    """
    steps = config.length(order.steps_per_epoch)
    if steps < 1:
        raise InputError(
            f"--epochs {config.epochs} of {order.steps_per_epoch} steps is less than a step: give "
            "more"
        )
    return steps


def micro_batches_of(config: TrainConfig, world: int) -> int:
    """Into how many micro-batches each of so many processes cuts its share of the batch."""
    return count_micro_batches(config.moco, config.batch, world, config.micro_batch)


def about_micro_batches(config: TrainConfig, world: int) -> Iterator[str]:
    """That there are some, and what that changes."""
    count, share = micro_batches_of(config, world), config.batch // world
    if count == 1:
        return
    size, batch_norm = share // count, config.moco.batch_norm
    yield f"each process cuts its {share} pictures of a step into {count} micro-batches of {size}"
    if batch_norm in ("sync", "none"):
        seen = size * world if batch_norm == "sync" else size
        yield (
            f"note: with --moco.batch-norm {batch_norm} batch norm sees the {seen} pictures of a "
            f"micro-batch, not {seen * count}, so --micro-batch changes what is learnt; with "
            "shuffle it does not"
        )


def about_queue(config: TrainConfig, pictures: int) -> Iterator[str]:
    """That it is long for so many pictures."""
    queue, longest = config.moco.queue, max(pictures // 4, 1)
    if config.moco.mechanism == "queue" and queue > longest:
        yield (
            f"note: the queue of {queue:,} keys is longer than a quarter of the {pictures:,} "
            "pictures, so a picture may be its own negative; "
            f"--moco.queue {longest} or less avoids that"
        )


def about_leak(config: TrainConfig, groups: int) -> Iterator[str]:
    """That a query and its key may share batch-norm statistics, where the settings let them.

    Args:
        config: of the run.
        groups: of batch norm, all processes together.

    Source: section 3.3 of https://arxiv.org/abs/1911.05722. Where all keys are of the step itself,
    as in MoCo v3, they share the statistics and nothing tells them apart.
    """
    moco, encoder = config.moco, config.encoder
    has_batch_norm = encoder.head == "v3" or not encoder.backbone.startswith("vit")
    is_shared = moco.batch_norm in ("none", "sync") or groups == 1
    if moco.mechanism == "queue" and has_batch_norm and is_shared:
        yield (
            "note: batch norm sees a query and its key among the same pictures, which can tell "
            "which key is its own without looking at the picture; --moco.batch-norm shuffle with "
            "several --moco.batch-norm-groups avoids that"
        )


def introduce(
    config: TrainConfig,
    accelerator: Accelerator,
    loader: PairLoader,
    total_steps: int,
    found: Checkpoint | None,
) -> Iterator[str]:
    """What a person should know before the first step."""
    order, moco = loader.order, config.moco
    world = accelerator.num_processes
    groups = groups_per_process(moco, config.batch, world) * world
    groups = 1 if moco.batch_norm == "sync" else groups
    if moco.batch_norm in ("sync", "none"):
        groups *= micro_batches_of(config, world)
    yield (
        f"{config.recipe}: {config.encoder.backbone}, {order.samples:,} pictures, {total_steps:,} "
        f"steps of {config.batch} ({total_steps / order.steps_per_epoch:.1f} epochs) on {world} x "
        f"{accelerator.device.type}, {groups} batch-norm groups of {config.batch // groups}"
    )
    yield from about_micro_batches(config, world)
    yield from about_leak(config, groups)
    yield from about_lr(config)
    yield from about_fit(config, order.samples)
    if world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        yield (
            "note: `accelerate launch --cpu` starts one process whatever its --num_processes; "
            "several on CPUs: accelerate launch --multi_gpu --num_processes N, or torchrun"
        )
    if moco.queue < order.samples:  # a longer one raises an alarm
        yield from about_queue(config, order.samples)
    if found:
        yield f"resumed after step {found.step} from {found.folder}"
        before = found.state["config"]
        for name in ("steps", "epochs", "precision"):
            if before[name] != (now := getattr(config, name)):
                yield f"note: {name} is {now} and was {before[name]}; the schedule follows it"
