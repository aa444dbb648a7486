"""One rank's endless stream of paired views.

A thread looks up the order, reads and checks the bytes and draws the view parameters, some batches
ahead; DALI decodes and augments ahead of the consumer; batches leave as torch tensors without a
copy. The only state is the step: a loader that starts at step s gives exactly what another one
gives when it arrives there.

A sample that cannot be used is replaced by the next place of a second permutation (``Order.
replacement``) and written to the quarantine log; the rest of its batch is untouched.

Letters in names: N pictures of this rank, H W pixels.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeline.batch_plan import BatchPlanner, PlannedBatch
from pipeline.data_config import DataConfig, make_order, open_store
from pipeline.engines import make_engine
from pipeline.loader_meter import LoaderFigures, LoaderMeter
from pipeline.order import Ints
from pipeline.quarantine import Quarantine
from pipeline.torch_views import DecodeError
from pipeline.validate import Limits
from pipeline.view_recipe import PAIRS, ViewRequest, draw_view

READ_AHEAD_BATCHES = 3
# Half of it apart, the shards to come are asked for: 32 steps of a lane meet most of a window's.
LOOK_AHEAD_STEPS = 32
# A read that never returns, from a dead mount, is left to its thread: nothing can end it.
READER_END_S = 10.0


@dataclass(frozen=True)
class PairBatch:
    """Two views of each of N pictures, in [mean, std] units, and where they come from."""

    query_N3HW: Tensor
    key_N3HW: Tensor
    step: int
    sample_N: Ints
    label_N: Ints
    replaced: int


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
        self._recipes = PAIRS[config.views]
        self._batch = len(self.order.batch(start_step, rank, world).sample)
        self._step = start_step
        self._rank, self._world = rank, world
        if self.store.is_remote:
            shards = self.order.shards_ahead(start_step, LOOK_AHEAD_STEPS, rank, world)
            self.store.require_room(shards, LOOK_AHEAD_STEPS)
        self.quarantine = Quarantine(quarantine_path, config.max_bad_share)
        self._planner = BatchPlanner(
            self.store,
            self.order,
            self.quarantine,
            Limits(max_pixels=config.max_pixels),
            rank=rank,
            world=world,
        )
        self._planned: queue.Queue[PlannedBatch | BaseException] = queue.Queue(READ_AHEAD_BATCHES)
        self._in_flight: deque[PlannedBatch] = deque()
        self._stopping = threading.Event()
        self._meter = LoaderMeter()
        self._engine = make_engine(config, self._next_request, self._batch, device, half=half)
        self._reader = threading.Thread(target=self._read_ahead, name="reader", daemon=True)
        self._reader.start()

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        asked = time.perf_counter()
        self._require_open()
        try:
            query_N3HW, key_N3HW = self._engine.take()
            planned = self._in_flight.popleft()
        except DecodeError as error:
            planned = self._in_flight.popleft()
            query_N3HW, key_N3HW = self._repair(planned, error)
        self._meter.given(len(planned.pictures), asked)
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

    def figures(self) -> LoaderFigures:
        """What was measured since the beginning; for a stretch of time see ``since``."""
        counters = self.store.counters
        return self._meter.figures(
            bad_samples=self.quarantine.bad,
            fetched_bytes=counters.fetched_bytes,
            retries=counters.retries,
            fetch_waited_s=counters.waited_s,
        )

    def close(self) -> None:
        """Stop the threads; safe to call at any time and more than once."""
        self._stopping.set()
        self.store.close()  # a reader that waits for a shard stops waiting
        self._reader.join(READER_END_S)
        self._engine.close()

    def _read_ahead(self) -> None:
        step = self._step
        item: PlannedBatch | BaseException
        while not self._stopping.is_set():
            try:
                if self.store.is_remote and (step - self._step) % (LOOK_AHEAD_STEPS // 2) == 0:
                    self._prefetch(step)
                item = self._read(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            self._hand_on(item)
            if isinstance(item, BaseException):
                return
            step += 1

    def _read(self, step: int) -> PlannedBatch:
        with self._meter.clock("read_s"):
            planned = self.plan(step)
        count, size = len(planned.pictures), sum(len(picture) for picture in planned.pictures)
        self._meter.add(read_images=count, read_bytes=size)
        return planned

    def _hand_on(self, item: PlannedBatch | BaseException) -> None:
        while not self._stopping.is_set():
            with self._meter.clock("blocked_s"), suppress(queue.Full):
                self._planned.put(item, timeout=0.1)
                return

    def _prefetch(self, step: int) -> None:
        """Fetch what the coming steps read, and then what the lanes' next windows begin with."""
        per_lane = self.order.global_batch // self.order.lanes
        epoch_step = step % self.order.steps_per_epoch
        window = -(-self.order.window // per_lane)
        next_window = (
            step - epoch_step + min((epoch_step // window + 1) * window, self.order.steps_per_epoch)
        )
        ahead = [
            self.order.shards_ahead(first, LOOK_AHEAD_STEPS, self._rank, self._world)
            for first in (step, next_window)
        ]
        # A dict keeps the order of first use and one of each.
        self.store.prefetch(list(dict.fromkeys(int(s) for part in ahead for s in part)))

    def _next_request(self) -> ViewRequest:
        with self._meter.clock("starved_s"):
            item = self._next_planned()
        if isinstance(item, BaseException):
            self._planned.put(item)  # every later call fails likewise and none waits for ever
            raise item
        self._in_flight.append(item)
        return self._request(item, self.order.epoch_of(item.step))

    def _next_planned(self) -> PlannedBatch | BaseException:
        while True:
            self._require_open()  # another thread may close while this one waits
            try:
                return self._planned.get(timeout=0.1)
            except queue.Empty:
                continue

    def _require_open(self) -> None:
        if self._stopping.is_set():
            raise RuntimeError("this loader is closed")

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
        """What this rank reads at a step; for programs that show it."""
        return self._planner.plan(step)

    def _repair(self, planned: PlannedBatch, error: DecodeError) -> tuple[Tensor, ...]:
        """Replace what cannot be decoded and make the views of this batch again."""
        problems = self._engine.undecodable(planned.pictures)
        if not problems:
            raise RuntimeError(
                f"the views of step {planned.step} failed, yet each picture decodes alone"
            ) from error
        while problems:
            for row, reason in problems.items():
                self._planner.reject(planned, row, f"cannot be decoded: {reason}")
                self._planner.replace(planned, row)
            rows = list(problems)
            again = self._engine.undecodable([planned.pictures[row] for row in rows])
            problems = {rows[place]: reason for place, reason in again.items()}
        return self.make(planned, self.order.epoch_of(planned.step))
