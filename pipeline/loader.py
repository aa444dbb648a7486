"""One rank's endless stream of paired views, and the evaluation pictures of a folder of shards.

A thread looks up the order, reads and checks the bytes and draws the view parameters, some batches
ahead; DALI decodes and augments ahead of the consumer; batches leave as torch tensors without a
copy. The only state is the step: a loader that starts at step s gives exactly what another one
gives when it arrives there.

A sample that cannot be used is replaced by the next place of a second permutation (``Order.
replacement``) and written to the quarantine log; the rest of its batch is untouched.

Letters in names: N pictures of this rank, H W pixels.
"""

import math
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.order import Ints, Order, Places, default_lanes
from pipeline.program import InputError, available_cores
from pipeline.quarantine import Quarantine
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.torch_views import DecodeError, TorchEngine
from pipeline.view_recipe import PAIRS, PairName, ViewRequest, draw_view

try:
    from pipeline.dali_views import DaliEngine
except ImportError:  # DALI has wheels for Linux only
    DaliEngine = None  # type: ignore[assignment,misc]

Bytes = NDArray[np.uint8]
Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)

READ_AHEAD_BATCHES = 3


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures come from and what views are made of them."""

    shards: Path | None = None
    """Folder that make_shards wrote."""
    views: PairName = "moco-v2"
    """Augmentation recipe of the two views."""
    image_px: int = 224
    """Side of a view, in pixels."""
    mean: Triple = IMAGENET_MEAN
    """Of each channel, for values in [0, 1]."""
    std: Triple = IMAGENET_STD
    """Deviation of each channel, for values in [0, 1]."""
    eval_resize_px: int = 256
    """Shorter side before the evaluation crop, in pixels."""
    lanes: int = 0
    """Canonical lanes of the order; the number of processes must divide it. 0: at most 64."""
    window: int = 131_072
    """Samples of a lane that are shuffled with each other."""
    threads: int = 0
    """CPU threads of each process. 0: all cores, shared by this machine's processes."""
    engine: Literal["auto", "dali", "torchvision"] = "auto"
    """What makes the views: DALI where it is installed, else torchvision."""
    max_bad_share: float = 0.05
    """End the run when more than this share of all samples could not be used."""

    def __post_init__(self) -> None:
        if self.image_px < 1:
            raise InputError(f"--data.image-px {self.image_px}: give a number of at least 1")
        if self.threads < 0:
            raise InputError(f"--data.threads {self.threads}: give 0 (all cores) or a number")
        if not all(0 < value < math.inf for value in self.std):
            raise InputError(f"--data.std {self.std}: give three numbers above 0")


@dataclass(frozen=True)
class PairBatch:
    """Two views of each of N pictures, in [mean, std] units, and where they come from."""

    query_N3HW: Tensor
    key_N3HW: Tensor
    step: int
    sample_N: Ints
    label_N: Ints
    replaced: int


class Engine(Protocol):
    """What makes views of requests: ``dali_views.DaliEngine`` or ``torch_views.TorchEngine``."""

    def take(self) -> tuple[Tensor, ...]: ...  # noqa: D102
    def make(self, request: ViewRequest) -> tuple[Tensor, ...]: ...  # noqa: D102
    def undecodable(self, pictures: list[Bytes]) -> dict[int, str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


@dataclass
class PlannedBatch:
    """A batch on its way: what was read, before any picture is decoded."""

    step: int
    places: Places
    pictures: list[Bytes]
    size_px_N2: Ints
    label_N: Ints
    attempts: dict[int, int] = field(default_factory=dict)
    """Stand-ins that were tried, for each row that needed one."""


class PairLoader:
    """Iterator of ``PairBatch``: query and key views of this rank's part of every global batch.

    Args:
        config: which shards and which views.
        global_batch: pictures of all ranks together.
        seed: of the run; order and views are functions of it.
        device: where views are made and lie.
        rank: of this process.
        world: number of processes.
        start_step: the first step to give, from 0.
        half: float16 views.
        quarantine_path: log of samples that could not be used.

    Raises:
        InputError: if shards, batch and world size do not fit together.
    """

    def __init__(  # noqa: PLR0913 (keywords, each named at the call)
        self,
        config: DataConfig,
        *,
        global_batch: int,
        seed: int,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        half: bool = False,
        quarantine_path: Path | None = None,
    ) -> None:
        self.store = open_store(config)
        self.order = make_order(self.store, config, global_batch, seed)
        self._config = config
        self._seed = seed
        self._rank, self._world = rank, world
        self._recipes = PAIRS[config.views]
        self._batch = len(self.order.batch(start_step, rank, world).sample)
        self._step = start_step
        self.quarantine = Quarantine(quarantine_path, config.max_bad_share)
        self._planned: queue.Queue[PlannedBatch | BaseException] = queue.Queue(READ_AHEAD_BATCHES)
        self._in_flight: deque[PlannedBatch] = deque()
        self._stopping = threading.Event()
        self._engine = make_engine(config, self._next_request, self._batch, device, half=half)
        self._reader = threading.Thread(target=self._read_ahead, name="reader", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        try:
            query_N3HW, key_N3HW = self._engine.take()
            planned = self._in_flight.popleft()
        except DecodeError as error:
            planned = self._in_flight.popleft()
            query_N3HW, key_N3HW = self._repair(planned, error)
        return PairBatch(
            query_N3HW,
            key_N3HW,
            planned.step,
            planned.places.sample,
            planned.label_N,
            len(planned.attempts),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads; safe to call at any time and more than once."""
        self._stopping.set()
        self._reader.join()
        self._engine.close()

    def _read_ahead(self) -> None:
        step = self._step
        item: PlannedBatch | BaseException
        while not self._stopping.is_set():
            try:
                item = self.plan(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not self._stopping.is_set():
                try:
                    self._planned.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def _next_request(self) -> ViewRequest:
        item = self._planned.get()
        if isinstance(item, BaseException):
            self._planned.put(item)  # every later call fails likewise and none waits for ever
            raise item
        self._in_flight.append(item)
        return self._request(item, self.order.epoch_of(item.step))

    def make(self, planned: PlannedBatch, epoch: int) -> tuple[Tensor, ...]:
        """Query and key views, ``[N, 3, H, W]`` each, that a batch has in some epoch."""
        return self._engine.make(self._request(planned, epoch))

    def _request(self, planned: PlannedBatch, epoch: int) -> ViewRequest:
        views = tuple(
            draw_view(recipe, planned.size_px_N2, (self._seed, epoch, view), planned.places.sample)
            for view, recipe in enumerate(self._recipes)
        )
        return ViewRequest(planned.pictures, views)

    def plan(self, step: int) -> PlannedBatch:
        """Read this rank's samples of a step, with stand-ins for those that cannot be read."""
        places = self.order.batch(step, self._rank, self._world)
        count = len(places.sample)
        planned = PlannedBatch(
            step,
            places,
            [np.empty(0, np.uint8)] * count,
            np.empty((count, 2), np.int64),
            np.empty(count, np.int64),
        )
        for row in range(count):
            if not self._read(planned, row):
                self._replace(planned, row)
            self.quarantine.accept()
        return planned

    def _read(self, planned: PlannedBatch, row: int) -> bool:
        shard, index = int(planned.places.shard[row]), int(planned.places.index[row])
        try:
            planned.pictures[row] = self.store.picture(shard, index)
        except BadSampleError as error:
            self._reject(planned, row, str(error))
            return False
        record = self.store.records(shard)[index]
        planned.size_px_N2[row] = record["width"], record["height"]
        planned.label_N[row] = record["label"]
        return True

    def _reject(self, planned: PlannedBatch, row: int, reason: str) -> None:
        shard, index = int(planned.places.shard[row]), int(planned.places.index[row])
        self.quarantine.reject(
            step=planned.step,
            shard=self.store.manifest.shards[shard].name,
            index=index,
            key=self.store.key(shard, index),
            reason=reason,
        )

    def _replace(self, planned: PlannedBatch, row: int) -> None:
        """Put a sample that can be read where ``row`` is; the same one in every rerun."""
        position = planned.places.position[row : row + 1]
        is_read = False
        while not is_read:
            attempt = planned.attempts.get(row, 0) + 1
            planned.attempts[row] = attempt
            stand_in = self.order.replacement(planned.step, position, attempt)
            for name in ("shard", "index", "sample"):
                getattr(planned.places, name)[row] = getattr(stand_in, name)[0]
            is_read = self._read(planned, row)

    def _repair(self, planned: PlannedBatch, error: DecodeError) -> tuple[Tensor, ...]:
        """Replace what cannot be decoded and make the views of this batch again."""
        problems = self._engine.undecodable(planned.pictures)
        if not problems:
            raise RuntimeError(
                f"the views of step {planned.step} failed, yet each picture decodes alone"
            ) from error
        while problems:
            for row, reason in problems.items():
                self._reject(planned, row, f"cannot be decoded: {reason}")
                self._replace(planned, row)
            rows = list(problems)
            again = self._engine.undecodable([planned.pictures[row] for row in rows])
            problems = {rows[place]: reason for place, reason in again.items()}
        return self.make(planned, self.order.epoch_of(planned.step))


def open_store(config: DataConfig) -> ShardStore:
    """The shards of a configuration, or an InputError that says which flag is missing."""
    if config.shards is None:
        raise InputError("no pictures: give the folder that make_shards wrote with --data.shards")
    return ShardStore(config.shards)


def make_order(store: ShardStore, config: DataConfig, global_batch: int, seed: int) -> Order:
    """The order of a run over the shards of ``store``."""
    lanes = config.lanes or default_lanes(global_batch)
    return Order(store.shard_samples, global_batch, seed, lanes, config.window)


def cpu_threads(config: DataConfig) -> int:
    """Threads for one process: its share of this machine's cores unless the setting says."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.threads or max(1, available_cores() // processes)


def make_engine(
    config: DataConfig,
    next_request: Callable[[], ViewRequest],
    batch: int,
    device: torch.device,
    *,
    half: bool,
) -> Engine:
    """DALI where it is installed, else (or on request) Pillow and torchvision.

    Raises:
        InputError: if DALI is asked for and not installed.
    """
    normalisation = (config.mean, config.std)
    threads = cpu_threads(config)
    if config.engine == "torchvision" or (config.engine == "auto" and DaliEngine is None):
        return TorchEngine(
            next_request,
            image_px=config.image_px,
            normalisation=normalisation,
            device=device,
            half=half,
            threads=threads,
        )
    if DaliEngine is None:
        raise InputError(
            "--data.engine dali: DALI is not installed here; install nvidia-dali-cuda130 (or "
            "nvidia-dali-cuda120), or use --data.engine torchvision"
        )
    return DaliEngine(
        next_request,
        PAIRS[config.views],
        batch=batch,
        image_px=config.image_px,
        normalisation=normalisation,
        device=device,
        half=half,
        threads=threads,
    )
