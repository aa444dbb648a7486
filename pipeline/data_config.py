"""Settings of the data path, and what follows from them alone: shards, order, threads."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.order import Order, default_lanes
from pipeline.program import InputError, available_cores
from pipeline.shard_cache import CacheConfig
from pipeline.shard_store import ShardStore
from pipeline.validate import Limits
from pipeline.view_recipe import PairName

Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pictures come from and what views are made of them."""

    shards: str | None = None
    """Folder that make_shards wrote, or its s3://, gs://, https://, http:// or hf:// URL."""
    cache: Path | None = None
    """Folder on a local disk for shards behind a URL. None: mocostream in the user's cache."""
    cache_gib: float = 100.0
    """Most that may lie in --data.cache, all processes of this machine together."""
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
    engine: Literal["auto", "dali", "kernels", "torchvision"] = "auto"
    """What makes the views. auto: on a GPU DALI where it is installed, else the kernels, which give
    torchvision's views bit by bit."""
    max_pixels: int = Limits.max_pixels
    """Width times height of a picture; a larger one is replaced and never decoded."""
    max_bad_share: float = 0.05
    """End the run when more than this share of all samples could not be used."""

    def __post_init__(self) -> None:
        if self.image_px < 1:
            raise InputError(f"--data.image-px {self.image_px}: give a number of at least 1")
        if self.max_pixels < 1:
            raise InputError(f"--data.max-pixels {self.max_pixels}: give a number of at least 1")
        if self.threads < 0:
            raise InputError(f"--data.threads {self.threads}: give 0 (all cores) or a number")
        if not all(0 < value < math.inf for value in self.std):
            raise InputError(f"--data.std {self.std}: give three numbers above 0")


def open_store(config: DataConfig) -> ShardStore:
    """The shards of a configuration, or an InputError that says which flag is missing."""
    if config.shards is None:
        raise InputError("no pictures: give the folder that make_shards wrote with --data.shards")
    return ShardStore(config.shards, cache_of(config))


def cache_of(config: DataConfig) -> CacheConfig:
    """Where copies of remote shards lie, and how much of them."""
    return CacheConfig(folder=config.cache, gib=config.cache_gib)


def make_order(store: ShardStore, config: DataConfig, global_batch: int, seed: int) -> Order:
    """The order of a run over the shards of ``store``."""
    lanes = config.lanes or default_lanes(global_batch)
    return Order(store.shard_samples, global_batch, seed, lanes, config.window)


def cpu_threads(config: DataConfig) -> int:
    """Threads for one process: its share of this machine's cores unless the setting says."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return config.threads or max(1, available_cores() // processes)
