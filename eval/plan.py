"""What a run will take, before anything of it starts: steps, memory, storage, arithmetic, hours.

Nothing is guessed without being called an estimate: memory and arithmetic are worked out from the
network without data, the speed is one that was measured, or a stated share of a GPU's peak.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.gpu_peaks import PEAKS, peak_of
from eval.plan_config import PlanConfig
from eval.roofline import hours
from eval.run_check import check_order, length_in_steps, micro_batches_of
from eval.run_config import TrainConfig
from model.moco import MoCo, MoCoConfig, QueryEncoder
from model.run_state import statistics_of
from model.step_flops import StepFlops, flops_of_step
from model.step_memory import bytes_of, network_of_process, optimiser_state, peak_of_step
from pipeline.data_config import make_order, open_store
from pipeline.order import Order, default_lanes
from pipeline.program import InputError

FLOAT32_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Length:
    """How much is to be done."""

    pictures: int
    batch: int
    processes: int
    micro_batches: int = 1
    """Of each process in a step."""
    steps_per_epoch: int
    steps: int
    epochs: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process."""

    weights: int
    """Of the query encoder and predictor, which are trained."""
    key_encoder: int
    optimiser: int
    dictionary: int
    views: int
    step: int
    """Activations and gradients, at their peak."""
    buckets: int
    """Copies of the gradients, by which several processes add them up."""

    @property
    def total(self) -> int:
        """Of all of them."""
        return sum(vars(self).values())


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Bytes on disks."""

    shards: int | None
    """None: not packed yet."""
    checkpoint: int
    checkpoints: int
    """Of all that are kept, and the next one, which is whole before the oldest goes."""


@dataclass(frozen=True, kw_only=True)
class Time:
    """How long it takes."""

    images_per_s: float
    """Of one process."""
    source: str
    """Where the speed is from."""
    is_measured: bool
    hours: float
    gpu_hours: float
    cost: float | None
    """In the currency of the price."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All of it."""

    recipe: str
    backbone: str
    precision: str
    shards: str | None
    length: Length
    parameters: int
    """Of the query encoder and predictor."""
    memory: Memory
    storage: Storage
    flops: StepFlops
    time: Time | None
    """None: no speed is known."""


def make_plan(config: TrainConfig, plan: PlanConfig) -> Plan:
    """Work out what a run will take.

    Raises:
        InputError, EncoderError: naming what is wrong.
    """
    processes = plan.processes or int(os.environ.get("WORLD_SIZE", "1"))
    order, shard_bytes = order_of(config, plan)
    check_order(config, order, processes)
    steps = length_in_steps(config, order)
    length = Length(
        pictures=order.samples,
        batch=config.batch,
        processes=processes,
        micro_batches=micro_batches_of(config, processes),
        steps_per_epoch=order.steps_per_epoch,
        steps=steps,
        epochs=steps / order.steps_per_epoch,
    )
    image_px = config.data.image_px
    flops = flops_of_step(config.encoder, config.moco, image_px, config.batch)
    time = time_of(config, plan, length, flops)
    network = network_of_process(
        config.encoder, config.moco, config.batch, processes, image_px, config.micro_batch
    )
    checkpoint = checkpoint_bytes(config, network, order.samples, processes)
    memory = memory_of(config, network, length)
    return Plan(
        recipe=config.recipe,
        backbone=config.encoder.backbone,
        precision=config.precision,
        shards=None if shard_bytes is None else config.data.shards,
        length=length,
        parameters=sum(parameter.numel() for parameter in trained_side(network).parameters()),
        memory=memory,
        storage=Storage(
            shards=shard_bytes,
            checkpoint=checkpoint,
            checkpoints=(config.keep + 1) * checkpoint,
        ),
        flops=flops,
        time=time,
    )


def order_of(config: TrainConfig, plan: PlanConfig) -> tuple[Order, int | None]:
    """The order of a run, and the bytes of its shards; None where there are none yet."""
    if plan.pictures is None:
        if config.data.shards is None:
            raise InputError(
                "no pictures: give --data.shards, or --plan.pictures N for a set not packed yet"
            )
        store = open_store(config.data)
        order = make_order(store, config.data, config.batch, config.seed)
        return order, sum(shard.bytes for shard in store.manifest.shards)
    if config.data.shards is not None:
        raise InputError(
            "--plan.pictures and --data.shards both give the pictures: leave one of them out"
        )
    lanes = config.data.lanes or default_lanes(config.batch)
    sizes = np.array([plan.pictures], dtype=np.int64)
    return Order(sizes, config.batch, config.seed, lanes, config.data.window), None


def trained_side(network: QueryEncoder) -> torch.nn.ModuleList:
    """Query encoder and predictor, where there is one."""
    parts = [network.encoder_q, network.predictor]
    return torch.nn.ModuleList(part for part in parts if part is not None)


def memory_of(config: TrainConfig, network: QueryEncoder, length: Length) -> Memory:
    """Bytes of one process."""
    trained, pictures = trained_side(network), length.batch // length.processes
    key_encoder = network.encoder_k.state_dict().values() if isinstance(network, MoCo) else ()
    gradients = bytes_of(network.trained_parameters())
    return Memory(
        weights=bytes_of(trained.state_dict().values()),
        key_encoder=bytes_of(key_encoder),
        optimiser=optimiser_state(config.optimiser, network),
        dictionary=sum(dictionary_bytes(config.moco, config.encoder.dim, length.pictures)),
        views=2 * pictures * 3 * config.data.image_px**2 * FLOAT32_BYTES,
        # Last, because it takes the network's place.
        step=peak_of_step(network, pictures, config.data.image_px, config.precision),
        buckets=gradients if length.processes > 1 else 0,
    )


def dictionary_bytes(config: MoCoConfig, dim: int, pictures: int) -> tuple[int, int]:
    """Bytes of a dictionary between steps, and what it takes more during one."""
    rows = config.queue * dim
    if config.mechanism == "queue":
        return rows * getattr(torch, config.queue_dtype).itemsize, 0
    if config.mechanism == "memory-bank":
        return pictures * dim * FLOAT32_BYTES, rows * FLOAT32_BYTES
    return 0, 0


def checkpoint_bytes(
    config: TrainConfig, network: QueryEncoder, pictures: int, processes: int
) -> int:
    """Bytes of the tensors of a checkpoint; names and settings are some hundred KiB more."""
    kept, _ = dictionary_bytes(config.moco, config.encoder.dim, pictures)
    # Each process's own running statistics, beside their mean.
    statistics = sum(network.get_buffer(name).numel() for name in statistics_of(network))
    own = processes * statistics * FLOAT32_BYTES if processes > 1 else 0
    encoders = bytes_of(network.state_dict().values())
    return encoders + kept + optimiser_state(config.optimiser, network) + own


def time_of(config: TrainConfig, plan: PlanConfig, length: Length, flops: StepFlops) -> Time | None:
    """Hours and cost, where a speed is given, was measured, or can be estimated."""
    found = speed_of(config, plan, flops)
    if found is None:
        if plan.price is not None:
            raise InputError(
                f"--plan.price {plan.price} needs a speed: give --plan.images-per-s, "
                "--plan.roofline or --plan.gpu"
            )
        return None
    images_per_s, source, is_measured = found
    whole = hours(length.steps * length.batch, images_per_s * length.processes)
    gpu_hours = whole * length.processes
    return Time(
        images_per_s=images_per_s,
        source=source,
        is_measured=is_measured,
        hours=whole,
        gpu_hours=gpu_hours,
        cost=None if plan.price is None else gpu_hours * plan.price,
    )


def speed_of(
    config: TrainConfig, plan: PlanConfig, flops: StepFlops
) -> tuple[float, str, bool] | None:
    """Images per second of one process, where that is from, and whether it was measured."""
    if plan.images_per_s is not None:
        return plan.images_per_s, "given with --plan.images-per-s", True
    if plan.roofline is not None:
        return read_roofline(plan.roofline, config), f"measured, {plan.roofline}", True
    gpu = plan.gpu
    if gpu is None and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        if peak_of(gpu, config.precision) is None:
            return None
    if gpu is None:
        return None
    peak = peak_of(gpu, config.precision)
    if peak is None:
        known = ", ".join(PEAKS)
        raise InputError(
            f"--plan.gpu {gpu}: its peak with --precision {config.precision} is not known; give "
            f"one of {known}, or --plan.images-per-s"
        )
    source = (
        f"an estimate, nothing was measured: {plan.utilisation:.0%} of the {peak / 1e12:,.0f} "
        f"TFLOP/s of {gpu} with --precision {config.precision}"
    )
    return plan.utilisation * peak / flops.total, source, False


def read_roofline(path: Path, config: TrainConfig) -> float:
    """Images per second of one process, as eval/throughput.py measured them.

    Raises:
        InputError: if it is no such file, or of other settings.
    """
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        speed = float(found["images_per_second"]["together"]["median"])
        was = (found["recipe"], found["setting"]["image_px"], found["setting"]["precision"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--plan.roofline {path} is not what eval/throughput.py --json writes ({error!r})"
        ) from error
    now = (config.recipe, config.data.image_px, config.precision)
    if was != now:
        raise InputError(
            f"--plan.roofline {path} was measured with {was[0]} at {was[1]} px, --precision "
            f"{was[2]}; this is {now[0]} at {now[1]} px, --precision {now[2]}: measure that"
        )
    if not speed > 0:
        raise InputError(f"--plan.roofline {path} has a speed of {speed}: measure again")
    return speed
