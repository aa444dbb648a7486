"""Features of every picture of a folder of shards.

Letters in names: N images, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.judged import Judged
from pipeline.data_config import DataConfig, cpu_threads
from pipeline.eval_loader import EvalLoader
from pipeline.program import InputError
from pipeline.shard_cache import CacheConfig
from pipeline.shard_format import NO_LABEL
from pipeline.shard_store import ShardStore


@dataclass(frozen=True)
class LabelledFeatures:
    """Features and labels of a set; labels index ``classes``."""

    features_NF: Tensor
    label_N: Tensor
    classes: tuple[str, ...]
    manifest_sha256: str
    skipped: int


def extract(
    judged: Judged,
    shards: str | Path,
    *,
    device: torch.device,
    batch: int = 256,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
    threads: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> LabelledFeatures:
    """Features of all pictures in ``shards``, in their order, in float32.

    Args:
        judged: what makes features.
        shards: a folder or URL of shards with labels.
        device: where it runs and where the features stay.
        batch: pictures at a time.
        cache: for shards behind a URL.
        threads: of the CPU, for decoding; 0: all that this process may use.
        advance: told how many more are done.

    Raises:
        InputError: if the shards have no labels.
    """
    store = ShardStore(shards, cache)
    require_labels(store)
    threads = threads or cpu_threads(DataConfig())
    loader = EvalLoader(store, judged.view, batch=batch, device=device, threads=threads)
    was_training = judged.network.training
    # Not in inference mode: a buffer that is moved in it could never be written again.
    judged.network.to(device).eval()
    features, labels = [], []
    with torch.inference_mode():
        for views_N3HW, label_N in loader:
            features.append(judged.network(views_N3HW).float())
            labels.append(label_N)
            advance(len(label_N))
    store.close()
    judged.network.train(was_training)
    if not labels:
        raise InputError(f"none of the {loader.skipped} pictures of {shards} could be used")
    all_label_N = torch.from_numpy(np.concatenate(labels)).to(device)
    if bool((all_label_N == NO_LABEL).any()):
        raise InputError(
            f"{shards} has pictures without a label: give sets whose pictures all have one"
        )
    return LabelledFeatures(
        torch.cat(features),
        all_label_N,
        store.manifest.classes,
        store.manifest.sha256,
        loader.skipped,
    )


def require_labels(store: ShardStore) -> None:
    """See that a set can judge or vote.

    Raises:
        InputError: if it has no classes.
    """
    if not store.manifest.classes:
        raise InputError(
            f"{store.folder} has no labels, so nothing can be judged with it: pack a folder with "
            "one sub-folder for each class, or index tars that have a .cls or --label-key"
        )


def align_labels(train: LabelledFeatures, test: LabelledFeatures) -> Tensor:
    """The test labels as indices into the training classes, matched by the classes' names.

    Raises:
        InputError: if a test class does not occur in training.
    """
    missing = sorted(set(test.classes) - set(train.classes))
    if missing:
        raise InputError(
            f"the test shards have classes that the training shards lack: {', '.join(missing[:5])}"
            f"{' ...' if len(missing) > 5 else ''}; judge with sets of the same classes"
        )
    place = torch.tensor([train.classes.index(name) for name in test.classes])
    return place.to(test.label_N.device)[test.label_N]
