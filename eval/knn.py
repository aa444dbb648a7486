"""Weighted k-nearest-neighbour score of an encoder: how well do its features group the classes?

    python eval/knn.py RUN --train TRAIN_SHARDS --test TEST_SHARDS

RUN is a run or one of its checkpoints; --weights FILE judges the checkpoint of another project,
--timm NAME a random timm network, --pixels the pictures themselves. The default is DINO's protocol
(eval_knn.py of https://arxiv.org/abs/2104.14294): pooled backbone features of unit length, cosine
similarity, each of the k nearest training pictures votes with exp(similarity / 0.07), 256 bicubic
and the middle 224. A kNN figure means nothing without its protocol, so the result carries all of
it.

Letters in names: N test images, M training images, F features, C classes, K neighbours.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval.features import LabelledFeatures, align_labels, extract
from eval.judged import Judged, checkpoint_encoder, foreign_encoder, pixels, timm_encoder
from eval.weights_source import Choice, open_checkpoint
from model.checkpoint import CheckpointError
from model.encoder import EncoderConfig, EncoderError
from model.network_shape import WeightsError
from model.weights import Which
from pipeline.command_line import parse_flags
from pipeline.data_config import IMAGENET_MEAN, IMAGENET_STD
from pipeline.eval_loader import EvalView, Interpolation
from pipeline.program import InputError, run_program
from pipeline.shard_cache import CacheConfig
from pipeline.shard_format import atomic_file
from pipeline.shard_store import ShardStore

# Test pictures at a time, fewer where there are many training pictures: 1 GiB of similarities.
CHUNK_ROWS, CHUNK_SIMILARITIES = 1024, 1 << 28
TOP5 = 5


@dataclass(frozen=True, kw_only=True)
class KnnProtocol:
    """The rule of the vote."""

    k: tuple[int, ...] = (20, 10, 100, 200)
    """Numbers of neighbours; the first one gives the headline figure."""
    temperature: float = 0.07
    """A neighbour votes with exp(similarity / temperature)."""
    weights: Literal["exp", "equal"] = "exp"
    """equal: every neighbour has one vote."""
    normalise: bool = True
    """Unit-length features, so that the similarity is the cosine."""
    interpolation: Interpolation = "bicubic"
    """Of the resize."""

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise InputError(f"--protocol.k {self.k}: give numbers of neighbours of at least 1")
        if self.temperature <= 0:
            raise InputError(f"--protocol.temperature {self.temperature}: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class KnnConfig:
    """What is judged, on which pictures, by which rule."""

    run: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a run or of one checkpoint."""
    train: str
    """Labelled shards that vote: a folder or a URL."""
    test: str
    """Labelled shards that are judged: a folder or a URL."""
    cache: Path | None = None
    """Folder on a local disk for shards behind a URL. None: mocostream in the user's cache."""
    cache_gib: float = 100.0
    """Most that may lie in --cache."""
    timm: str | None = None
    """Judge this timm network with random weights; with --weights, the network they are for."""
    weights: Path | None = None
    """Judge the backbone in another project's checkpoint file, or in a folder as from the hub."""
    pixels: bool = False
    """Judge the pixels of the evaluation view, without an encoder."""
    untrained: bool = False
    """Judge the run's network with the weights that it started with."""
    key_encoder: bool = False
    """Judge the key encoder instead of the query encoder."""
    resize_px: int | None = None
    """Shorter side before the crop; by default the run's, 256 without a run."""
    crop_px: int | None = None
    """Side of the middle crop; by default the run's, 224 without a run."""
    batch: int = 256
    """Pictures at a time."""
    device: str = "auto"
    """auto: cuda where there is one, else cpu."""
    json: Path | None = None
    """File for the result."""
    protocol: KnnProtocol = KnnProtocol()
    """The rule of the vote."""

    def __post_init__(self) -> None:
        foreign = self.timm is not None or self.weights is not None
        if self.run is None and not foreign and not self.pixels:
            raise InputError(
                "nothing to judge: give a run, --weights FILE, --timm NAME or --pixels"
            )
        if foreign and (self.run is not None or self.pixels):
            raise InputError(
                "--timm and --weights are judged alone: leave out the run and --pixels"
            )
        for name in ("batch", "resize_px", "crop_px"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: give a number of at least 1")
        if self.json is not None and self.json.is_dir():
            raise InputError(f"--json {self.json} is a folder: give a file in it")
        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise InputError(f"--json {self.json}: its folder does not exist, make it first")


def knn_scores(
    train_MF: Tensor,
    train_label_M: Tensor,
    test_NF: Tensor,
    classes: int,
    protocol: KnnProtocol,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[int, Tensor]:
    """For each k the classes' summed votes for every test picture, ``[N, C]`` float32.

    A k above the number of training pictures counts as that number.
    """
    if protocol.normalise:
        train_MF, test_NF = F.normalize(train_MF, dim=1), F.normalize(test_NF, dim=1)
    most = min(max(protocol.k), len(train_MF))
    scores: dict[int, list[Tensor]] = {k: [] for k in protocol.k}
    rows = max(1, min(CHUNK_ROWS, CHUNK_SIMILARITIES // len(train_MF)))
    for rows_RF in test_NF.split(rows):
        advance(0)
        similarity_RK, nearest_RK = (rows_RF @ train_MF.T).topk(most, dim=1)
        label_RK = train_label_M[nearest_RK]
        if protocol.weights == "exp":
            # Over the nearest one's weight, which changes no vote and cannot overflow.
            vote_RK = ((similarity_RK - similarity_RK[:, :1]) / protocol.temperature).exp()
        else:
            vote_RK = torch.ones_like(similarity_RK)
        for k, found in scores.items():
            score_RC = rows_RF.new_zeros(len(rows_RF), classes)
            found.append(score_RC.scatter_add_(1, label_RK[:, :k], vote_RK[:, :k]))
    return {k: torch.cat(found) for k, found in scores.items()}


def judge(
    train: LabelledFeatures,
    test: LabelledFeatures,
    protocol: KnnProtocol,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Top-1 and top-5 for each k, and the headline's top-1 of each class, all in [0, 1]."""
    label_N = align_labels(train, test)
    count = len(train.classes)
    scores = knn_scores(
        train.features_NF, train.label_N, test.features_NF, count, protocol, advance
    )
    by_k = {}
    first_by_k = {}
    for k, score_NC in scores.items():
        # Not topk, which leaves open who wins where votes are even.
        best_N5 = score_NC.argsort(dim=1, descending=True, stable=True)[:, :TOP5]
        first_by_k[k] = best_N5[:, 0]
        hits_N5 = best_N5 == label_N[:, None]
        by_k[k] = {
            "top1": hits_N5[:, 0].float().mean().item(),
            "top5": hits_N5.any(dim=1).float().mean().item(),
        }
    headline = protocol.k[0]
    right_N = (first_by_k[headline] == label_N).float()
    per_class = {
        name: {"top1": right_N[label_N == number].mean().item(), "images": int(images)}
        for number, name in enumerate(train.classes)
        if (images := (label_N == number).sum())
    }
    return {**by_k[headline], "k": headline, "by_k": by_k, "per_class": per_class}


def knn_of_shards(  # noqa: PLR0913 (keywords, each named at the call)
    judged: Judged,
    train: str | Path,
    test: str | Path,
    protocol: KnnProtocol,
    *,
    device: torch.device,
    batch: int = 256,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (frozen)
    threads: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """The whole evaluation, and its protocol beside the figures.

    Args:
        judged: what makes features.
        train: labelled shards that vote.
        test: labelled shards that are judged.
        protocol: of the vote.
        device: where all is computed.
        batch: pictures at a time.
        cache: for shards behind a URL.
        threads: of the CPU, for decoding; 0: all that this process may use.
        advance: told how many more pictures have features, or that so far all is well with 0.

    Raises:
        InputError: if the shards lack labels or their classes differ.
    """
    features_of = partial(
        extract,
        judged,
        device=device,
        batch=batch,
        cache=cache,
        threads=threads,
        advance=advance,
    )
    train_set, test_set = features_of(train), features_of(test)
    result = judge(train_set, test_set, protocol, advance)
    return {
        **result,
        "judged": judged.about,
        "train_images": len(train_set.label_N),
        "test_images": len(test_set.label_N),
        "skipped_images": train_set.skipped + test_set.skipped,
        "protocol": {
            "rule": "weighted kNN on frozen features",
            "layer": "pixels" if isinstance(judged.network, nn.Flatten) else "pooled backbone",
            "similarity": "cosine" if protocol.normalise else "dot product",
            **{name: getattr(protocol, name) for name in ("temperature", "weights", "normalise")},
            "k": list(protocol.k),
            "view": vars(judged.view),
            "feature_dim": train_set.features_NF.shape[1],
            "dtype": "float32",
            "train_manifest_sha256": train_set.manifest_sha256,
            "test_manifest_sha256": test_set.manifest_sha256,
        },
    }


def choose(config: KnnConfig, warn: Callable[[str], None]) -> Judged:
    """What the command line asks to judge.

    Raises:
        InputError, CheckpointError, EncoderError: if it cannot be had.
    """
    interpolation = config.protocol.interpolation
    view = EvalView(
        resize_px=256,
        crop_px=224,
        interpolation=interpolation,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    judged = pixels(view)
    if config.run is not None:
        judged = checkpoint_encoder(
            open_checkpoint(config.run, warn),
            interpolation,
            key_encoder=config.key_encoder,
            untrained=config.untrained,
        )
    if config.weights is not None:
        encoder: Which = "key" if config.key_encoder else "query"
        network = EncoderConfig(backbone=config.timm) if config.timm else None
        choice = Choice(encoder=encoder, network=network, interpolation=interpolation)
        judged = foreign_encoder(config.weights, choice, warn)
    elif config.timm is not None:
        judged = timm_encoder(config.timm, view)
    resize_px = config.resize_px or judged.view.resize_px
    crop_px = config.crop_px or judged.view.crop_px
    if crop_px > resize_px:
        raise InputError(f"--crop-px {crop_px} is larger than --resize-px {resize_px}: lower it")
    view = replace(judged.view, resize_px=resize_px, crop_px=crop_px)
    return pixels(view) if config.pixels else Judged(judged.network, view, judged.about)


def choose_device(name: str) -> torch.device:
    """The device of that name; for auto a GPU where there is one.

    Raises:
        InputError: if there is none of that name.
    """
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    names = ["cpu", *(["cuda"] if gpus else []), *gpus]
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if name not in names:
        raise InputError(f"--device {name}: this machine has {', '.join(names)}")
    return torch.device(name)


def print_result(console: Console, result: dict[str, Any]) -> None:
    """The figures as two tables."""
    by_k = Table("k", "top-1", "top-5", title="kNN", title_justify="left")
    for k, scores in result["by_k"].items():
        by_k.add_row(str(k), f"{scores['top1']:.2%}", f"{scores['top5']:.2%}")
    console.print(by_k)
    per_class = Table(
        "class", "top-1", "pictures", title=f"k = {result['k']}", title_justify="left"
    )
    for name, row in result["per_class"].items():
        per_class.add_row(name, f"{row['top1']:.1%}", f"{row['images']:,}")
    console.print(per_class)
    what = " ".join(f"{key} {value}" for key, value in result["judged"].items())
    console.print(
        f"{what}: top-1 {result['top1']:.2%} with {result['train_images']:,} training and "
        f"{result['test_images']:,} test pictures",
        soft_wrap=True,
    )


def main() -> None:
    """Parse the command line, judge, print, write."""
    config = parse_flags(KnnConfig, __doc__)
    console = Console()
    judged = choose(config, lambda message: console.print(message, style="yellow", markup=False))
    device = choose_device(config.device)
    cache = CacheConfig(folder=config.cache, gib=config.cache_gib)
    total = sum(ShardStore(s, cache).manifest.samples for s in (config.train, config.test))
    columns = (
        TextColumn("features"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("pictures"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("features", total=total)
        result = knn_of_shards(
            judged,
            config.train,
            config.test,
            config.protocol,
            device=device,
            batch=config.batch,
            cache=cache,
            advance=lambda count: progress.advance(bar, count),
        )
    print_result(console, result)
    if config.json is not None:
        with atomic_file(config.json) as file:
            file.write(json.dumps(result, indent=1).encode() + b"\n")


if __name__ == "__main__":
    run_program(main, (CheckpointError, EncoderError, WeightsError))
