"""Which sample stands at which place of which step: a pure function of a seed and the step.

The shards are put in a new order every epoch and laid end to end; that flat sequence, turned by a
random amount so that the tail left out differs too, is cut into C equal lanes; within a lane the
samples are permuted in windows of W. Step t takes the next G / C places of every lane. Nothing is
stored for a sample and no state is kept: memory is O(shards), any step is reached by arithmetic,
and rank r of any world size that divides C reads C / world lanes of the same global batches.

C trades the number of possible world sizes for how often a shard is opened; W trades mixing for
the number of shards that are in use at once.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pipeline.integer_hash import U64, UInts, hash_of, permute
from pipeline.program import InputError

Ints = NDArray[np.int64]

# What a hash is drawn for; one number per purpose keeps the streams apart.
FOR_SHARDS, FOR_TURN, FOR_WINDOWS, FOR_REPLACEMENTS = 1, 2, 3, 4


def default_lanes(global_batch: int) -> int:
    """The largest divisor of the global batch up to 64: as many world sizes as that allows."""
    return max(lanes for lanes in range(1, 65) if global_batch % lanes == 0)


@dataclass(frozen=True)
class Places:
    """Where samples lie. ``shard`` and ``index`` say where to read, ``sample`` is their identity.

    All ``[N]`` int64. ``sample`` counts through the manifest, whatever the order, and ``position``
    is the place in the epoch's flat sequence, from which a replacement is derived.
    """

    shard: Ints
    index: Ints
    sample: Ints
    position: Ints


@dataclass
class Order:
    """The order of a whole run over shards of the given sizes.

    Args:
        shard_samples: number of samples of each shard, ``[S]``.
        global_batch: samples of all ranks together in one step (G).
        seed: of the run.
        lanes: canonical lanes (C); divides the global batch, and the world size divides it.
        window: samples that are mixed with each other within a lane (W).

    Raises:
        InputError: if the batch is larger than the data or the lanes do not divide it.
    """

    shard_samples: Ints
    global_batch: int
    seed: int
    lanes: int
    window: int
    first_sample: Ints = field(init=False)
    _epoch_cache: dict[int, tuple[UInts, Ints, int]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.first_sample = np.concatenate([[0], np.cumsum(self.shard_samples)]).astype(np.int64)
        lowest = {"--batch": 1, "--data.lanes": 1, "--data.window": 1, "--seed": 0}
        given = (self.global_batch, self.lanes, self.window, self.seed)
        for (flag, least), value in zip(lowest.items(), given, strict=True):
            if value < least:
                raise InputError(f"{flag} {value}: give a number of at least {least}")
        if self.global_batch % self.lanes:
            raise InputError(
                f"a global batch of {self.global_batch} cannot be cut into {self.lanes} lanes: "
                "change --batch or --data.lanes so that one divides the other"
            )
        if self.global_batch > self.samples:
            raise InputError(
                f"a global batch of {self.global_batch} is larger than the data, which has "
                f"{self.samples} pictures: lower --batch or pack more pictures"
            )

    @property
    def samples(self) -> int:
        """Samples in all shards together."""
        return int(self.first_sample[-1])

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the tail is left out, another one each time."""
        return self.samples // self.global_batch

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step ``step``, from 0, belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Places:
        """The places of one rank at step ``step`` (from 0), ``G / world`` of them.

        The batches of all ranks laid end to end are the same sequence for every world size.

        Raises:
            InputError: if the world size does not divide the lanes.
        """
        if self.lanes % world:
            fitting = [size for size in range(1, self.lanes + 1) if self.lanes % size == 0]
            raise InputError(
                f"{world} processes cannot share {self.lanes} lanes of a global batch of "
                f"{self.global_batch}: use one of {fitting} processes, or another --batch"
            )
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        per_lane = self.global_batch // self.lanes
        lane_samples = self.steps_per_epoch * per_lane
        own_lanes = self.lanes // world
        lane = np.repeat(np.arange(rank * own_lanes, (rank + 1) * own_lanes), per_lane)
        place = step_in_epoch * per_lane + np.tile(np.arange(per_lane), own_lanes)

        window = place // self.window
        start = window * self.window
        size = np.minimum(self.window, lane_samples - start)
        key = hash_of(self.seed, FOR_WINDOWS, epoch, lane.astype(U64), window.astype(U64))
        inside = permute((place - start).astype(U64), size.astype(U64), key).astype(np.int64)
        return self._locate(epoch, lane * lane_samples + start + inside)

    def shards_ahead(self, step: int, steps: int, rank: int = 0, world: int = 1) -> Ints:
        """Shards that a rank reads in the ``steps`` steps from ``step`` on, by first use.

        Exact, because it is the order itself that is asked; stand-ins of bad samples may lie
        elsewhere.
        """
        shards = [self.batch(ahead, rank, world).shard for ahead in range(step, step + steps)]
        used, first = np.unique(np.concatenate(shards), return_index=True)
        by_first_use: Ints = used[np.argsort(first)]
        return by_first_use

    def replacement(self, step: int, position: Ints, attempt: int) -> Places:
        """Who stands in for the samples at ``position`` of that step's epoch, ``[N]``.

        A pure function, so a rerun, a resume or another world size puts the same sample there.

        Args:
            step: the step whose batch had the bad samples.
            position: their ``Places.position``.
            attempt: 1 for the first replacement; 2 where that is bad as well, and so on.
        """
        epoch = self.epoch_of(step)
        key = hash_of(self.seed, FOR_REPLACEMENTS, epoch, attempt)
        place = permute(position.astype(U64), self.samples, key)
        return self._locate(epoch, place.astype(np.int64))

    def _locate(self, epoch: int, position: Ints) -> Places:
        shard_order, ends, turn = self._epoch(epoch)
        turned = (position + turn) % self.samples
        rank_of_shard = np.searchsorted(ends, turned, side="right")
        shard = shard_order[rank_of_shard].astype(np.int64)
        index = turned - (ends[rank_of_shard] - self.shard_samples[shard])
        return Places(shard, index, self.first_sample[shard] + index, position)

    def _epoch(self, epoch: int) -> tuple[UInts, Ints, int]:
        """The order of the shards, where each one ends in the flat sequence, and its turn."""
        entry = self._epoch_cache.get(epoch)
        if entry is None:
            count = len(self.shard_samples)
            key = hash_of(self.seed, FOR_SHARDS, epoch)
            shard_order = permute(np.arange(count, dtype=U64), count, key)
            ends = np.cumsum(self.shard_samples[shard_order]).astype(np.int64)
            turn = int(hash_of(self.seed, FOR_TURN, epoch)[0] % U64(self.samples))
            entry = (shard_order, ends, turn)
            self._epoch_cache[epoch] = entry
            for old in sorted(self._epoch_cache)[:-2]:  # a replacement may ask for the one before
                self._epoch_cache.pop(old, None)
        return entry
