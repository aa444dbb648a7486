"""What one rank reads for a step: bytes, sizes and labels, with stand-ins for bad samples.

Letters in names: N pictures of this rank.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.header_check import checked_picture
from pipeline.order import Ints, Order, Places
from pipeline.quarantine import BadSample, Quarantine
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.validate import Limits

Bytes = NDArray[np.uint8]


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


class BatchPlanner:
    """Reads the samples of one rank, step by step.

    Args:
        store: the shards.
        order: of the run.
        quarantine: told of every good and bad sample.
        limits: of a picture that may be decoded.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        store: ShardStore,
        order: Order,
        quarantine: Quarantine,
        limits: Limits,
        *,
        rank: int,
        world: int,
    ) -> None:
        self._store = store
        self._order = order
        self._quarantine = quarantine
        self._limits = limits
        self._rank, self._world = rank, world

    def plan(self, step: int) -> PlannedBatch:
        """Read this rank's samples of a step, with stand-ins for those that cannot be read."""
        places = self._order.batch(step, self._rank, self._world)
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
                self.replace(planned, row)
            self._quarantine.accept()
        return planned

    def _read(self, planned: PlannedBatch, row: int) -> bool:
        shard, index = int(planned.places.shard[row]), int(planned.places.index[row])
        try:
            picture, width, height = checked_picture(self._store, shard, index, self._limits)
        except BadSampleError as error:
            self.reject(planned, row, str(error))
            return False
        planned.pictures[row] = picture
        planned.size_px_N2[row] = width, height
        planned.label_N[row] = self._store.records(shard)[index]["label"]
        return True

    def reject(self, planned: PlannedBatch, row: int, reason: str) -> None:
        """Log that the sample at ``row`` cannot be used."""
        shard, index = int(planned.places.shard[row]), int(planned.places.index[row])
        self._quarantine.reject(
            BadSample(
                step=planned.step,
                shard=self._store.manifest.shards[shard].name,
                index=index,
                key=self._store.key(shard, index),
                reason=reason,
            )
        )

    def replace(self, planned: PlannedBatch, row: int) -> None:
        """Put a sample that can be read where ``row`` is; the same one in every rerun."""
        position = planned.places.position[row : row + 1]
        is_read = False
        while not is_read:
            attempt = planned.attempts.get(row, 0) + 1
            planned.attempts[row] = attempt
            stand_in = self._order.replacement(planned.step, position, attempt)
            for name in ("shard", "index", "sample"):
                getattr(planned.places, name)[row] = getattr(stand_in, name)[0]
            is_read = self._read(planned, row)
