"""One HTML page about a run, with all pictures in it, that needs nothing else and no network.

    python eval/report.py RUN

Curves, health and kNN history from the run's log; a contact sheet of its views; nearest
neighbours of some pictures by the newest intact checkpoint; settings, environment, and what was
left out. Written to RUN/report.html.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from eval.hardware_watch import describe_hardware
from eval.judged import checkpoint_encoder
from eval.recipes import RECIPES
from eval.report_page import Page, curve_of, shown
from eval.run_folder import ENVIRONMENT_NAME
from eval.run_report import LOG_NAME, duration, step_of
from eval.step_log import logs_of
from eval.weights_source import open_checkpoint
from model.checkpoint import Checkpoint, CheckpointError
from pipeline.command_line import parse_flags, require_at_least_1
from pipeline.data_config import DataConfig, cache_of
from pipeline.loader import PairLoader
from pipeline.program import InputError, run_program
from pipeline.settings import flat, from_plain, to_plain
from pipeline.shard_format import atomic_file
from pipeline.shard_store import BadSampleError, ShardStore
from pipeline.show_views import as_pictures
from pipeline.torch_views import DecodeError, decode, eval_picture, normalise

LISTED_BAD = 20
BATCH = 64
# Sections of curves, and what their values are called.
CURVES = {
    "Curves": {
        "loss": "loss (nats)",
        "pretext_accuracy": "pretext accuracy",
        "knn_top1": "kNN top-1",
        "learning_rate": "learning rate",
        "images_per_second": "images/s",
        "model_flop_utilisation": "model FLOP utilisation",
        "gpu_memory_peak_gib": "most GPU memory (GiB)",
    },
    "Health of the dictionary": {
        "effective_rank": "dimensions that the keys span",
        "positive_similarity": "similarity of a query and its key",
        "negative_similarity": "similarity of different pictures",
        "uniformity": "uniformity",
        "alignment": "alignment",
        "key_age_steps": "mean age of the keys (steps)",
        "encoder_distance": "distance of the encoders",
        "false_negative_share": "false negatives",
    },
    "Data": {
        "data_wait_share": "time waiting for data",
        "reader_wait_share": "reader waits for the views",
        "engine_wait_share": "views wait for the reader",
        "read_images_per_second": "reading, images/s",
        "read_mib_per_second": "reading, MiB/s",
        "views_images_per_second": "views, images/s",
        "bad_samples": "bad samples",
    },
}
SHARES = ("_share", "_accuracy", "_top1", "_utilisation")  # shown in per cent
# They only rise, never change, or follow from another curve; some are facts at the top.
NOT_DRAWN = {
    *("images_seen", "training_seconds", "data_wait_share_so_far", "flops_per_second"),
    *("highest_rank", "chance_loss", "oldest_key_steps", "queue_filled_share", "skipped_steps"),
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the page shows, and where it goes."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    output: Path | None = None
    """HTML file to write. None: report.html in the run's folder."""
    shards: str | None = None
    """Where the run's shards lie now. None: where they lay."""
    pictures: int = 6
    """Rows of the contact sheet and of the nearest neighbours."""
    neighbours: int = 6
    """Nearest neighbours of each picture."""
    searched: int = 1000
    """Pictures, spread evenly over the set, among which neighbours are looked for."""

    def __post_init__(self) -> None:
        require_at_least_1(self, "pictures", "neighbours", "searched")


def logged(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; half-written and damaged ones are left out."""
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(step_of(line))]


def series_of(lines: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Steps and values of everything that was logged as a number, by name."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((line["step"], value))
    return series


def add_curves(page: Page, lines: list[dict[str, Any]]) -> None:
    """Every logged number over the steps, those of training first."""
    series = series_of(lines)
    chance = series["chance_loss"][-1][1] if "chance_loss" in series else None
    rest = {name: name.replace("_", " ") for name in series if name not in NOT_DRAWN}
    for known in CURVES.values():
        rest = {name: title for name, title in rest.items() if name not in known}
    for heading, known in {**CURVES, "What else was logged": rest}.items():
        names = [name for name in known if name in series]
        if names:
            page.heading(heading, chance_text(chance) if "loss" in names else "")
        page.figures(
            curve_of(
                known[name],
                series[name],
                mark=chance if name == "loss" else None,
                is_share=name.endswith(SHARES),
            )
            for name in names
        )
    judged = [line for line in lines if "knn_top1" in line or "knn_error" in line]
    if judged:
        page.heading("kNN history", "of the query encoder as it was after these steps")
        rows = [
            (f"{line['step']:,}", knn_of(line))
            for line in sorted(judged, key=lambda line: float(line["step"]))
        ]
        page.table(("step", "top-1"), rows)


def chance_text(chance: float | None) -> str:
    """What the line in the curve of the loss is."""
    return "" if chance is None else f"dashed: the loss of guessing, log(K + 1) = {chance:.3f}"


def add_alarms(page: Page, lines: list[dict[str, Any]]) -> None:
    """What the run was called sick of, each alarm as often as it was raised."""
    for line in lines:
        if "alarm_text" in line:
            page.note(f"Alarm at step {line['step']:,}: {line['alarm_text']}")


def knn_of(line: dict[str, Any]) -> str:
    """What a logged line says of a kNN score."""
    if "knn_top1" in line:
        return f"{line['knn_top1']:.2%}"
    return f"none: {line['knn_error']}"


def facts_of(lines: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, str]:
    """Figures for the top of the page; what the log of an earlier version lacks is left out."""
    last = {name: value for line in lines for name, value in line.items()}
    facts = {
        "step": f"{max(line['step'] for line in lines):,}",
        "loss": shown(last.get("loss")),
        "kNN top-1": f"{last['knn_top1']:.2%}" if "knn_top1" in last else "not asked for",
        "images/s": shown(last.get("images_per_second")),
    }
    if "images_seen" in last:
        facts |= {
            "images seen": f"{last['images_seen']:,.0f}",
            "time of training": duration(last["training_seconds"]),
            "waiting for data": f"{last['data_wait_share_so_far']:.1%}",
        }
    facts |= dict(describe_hardware(last))
    if "trackers" in settings:
        facts["trackers"] = ", ".join(settings["trackers"]) or "none"
    return facts


def add_views(page: Page, data: DataConfig, config: dict[str, Any], pictures: int) -> None:
    """Originals and the views of two epochs."""
    page.heading("Views", f"{data.views} at {data.image_px} px: originals, and pairs of two epochs")
    data = DataConfig(**{**vars(data), "lanes": 1, "threads": 1})
    with PairLoader(
        data, global_batch=pictures, seed=config["seed"], device=torch.device("cpu")
    ) as loader:
        planned = loader.plan(0)
        columns = [
            as_pictures(views_N3HW, data)
            for epoch in range(2)
            for views_N3HW in loader.make(planned, epoch)
        ]
        rows = [
            [decode(picture), *(Image.fromarray(views[row]) for views in columns)]
            for row, picture in enumerate(planned.pictures)
        ]
    page.sheet(("original", "query", "key", "query", "key"), rows)


def some_pictures(store: ShardStore, count: int) -> list[Image.Image]:
    """As many pictures, spread evenly over the set; those that cannot be used are left out."""
    first_sample = np.concatenate([[0], np.cumsum(store.shard_samples)])
    total = int(first_sample[-1])
    found = []
    for sample in np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)):
        shard = int(np.searchsorted(first_sample, sample, side="right")) - 1
        try:
            found.append(decode(store.picture(shard, int(sample - first_sample[shard]))))
        except (BadSampleError, DecodeError):
            continue
    return found


@torch.inference_mode()
def add_neighbours(page: Page, found: Checkpoint, store: ShardStore, config: ReportConfig) -> None:
    """Pictures, and those that the encoder holds for most alike."""
    judged = checkpoint_encoder(found, "bicubic")
    view = judged.view
    views = [
        eval_picture(picture, view.resize_px, view.crop_px, view.interpolation)
        for picture in some_pictures(store, config.searched)
    ]
    features = [
        judged.network(normalise(views[start : start + BATCH], view.mean, view.std)).float()
        for start in range(0, len(views), BATCH)
    ]
    feature_NF = F.normalize(torch.cat(features), dim=1)
    asked = torch.linspace(0, len(views) - 1, min(config.pictures, len(views))).long()
    similarity_QN = feature_NF[asked] @ feature_NF.T
    similarity_QN[torch.arange(len(asked)), asked] = -2.0  # not itself
    best = similarity_QN.topk(min(config.neighbours, len(views) - 1), dim=1)
    page.heading(
        "Nearest neighbours",
        f"by cosine of the query encoder's features at step {found.step:,}, among {len(views):,} "
        "pictures of the training set; the first of a row is what was asked for",
    )
    rows = [
        [views[int(place)], *(views[int(other)] for other in others)]
        for place, others in zip(asked, best.indices, strict=True)
    ]
    captions = [["", *(f"{value:.2f}" for value in values)] for values in best.values.tolist()]
    page.sheet((), rows, captions)


def add_settings(page: Page, config: dict[str, Any]) -> None:
    """Every setting; those that differ from the recipe stand out."""
    recipe = RECIPES.get(config["recipe"])
    usual = flat(to_plain(recipe)) if recipe else {}
    page.heading("Settings", f"recipe {config['recipe']}; what differs from it is marked")
    rows, marked = [], set()
    for number, (name, value) in enumerate(flat(config).items()):
        rows.append((name, shown(value), shown(usual.get(name))))
        if value != usual.get(name):
            marked.add(number)
    page.table(("setting", "value", "recipe's"), rows, marked)


def add_environment(page: Page, path: Path) -> None:
    """Versions, commit, hardware; what of it cannot be read is no reason for no page."""
    if not path.exists():
        return
    page.heading("Environment")
    try:
        plain = flat(json.loads(path.read_text(errors="replace")))
    except (json.JSONDecodeError, AttributeError):
        page.note(f"{path.name} is damaged")
        return
    page.table(("what", "value"), [(name, shown(value)) for name, value in plain.items()])


def add_left_out(page: Page, run: Path) -> None:
    """Bad samples by reason, and steps without a finite gradient."""
    bad = [line for path in logs_of(run, "quarantine") for line in logged(path)]
    skipped = {line["step"] for path in logs_of(run, "skipped") for line in logged(path)}
    page.heading("Left out", f"{len(bad):,} bad samples, {len(skipped):,} steps")
    reasons = Counter(shown(line.get("reason")) for line in bad)
    if reasons:
        page.table(("reason", "samples"), [(r, f"{n:,}") for r, n in reasons.most_common()])
        rows = [
            tuple(shown(line.get(name)) for name in ("step", "shard", "index", "key", "reason"))
            for line in bad[:LISTED_BAD]
        ]
        page.table(("step", "shard", "index", "key", "reason"), rows)


def write_report(config: ReportConfig) -> Path:
    """Make the page; where it is.

    Raises:
        InputError, CheckpointError: if the run has no log, no intact checkpoint or no shards.
    """
    lines = logged(config.run / LOG_NAME)
    if not lines:
        raise InputError(
            f"{config.run} has no {LOG_NAME} with a finished line: give a run's folder"
        )
    warnings: list[str] = []
    found = open_checkpoint(config.run, warnings.append)
    settings = found.state["config"]
    data = from_plain(DataConfig, settings["data"], f"{found.folder}:data")
    data = DataConfig(**{**vars(data), "shards": config.shards or data.shards})
    store = ShardStore(str(data.shards), cache_of(data))
    was, now = found.state["data"]["manifest_sha256"], store.manifest.sha256
    if was != now:
        raise InputError(
            f"{config.run} was trained on data set {was[:12]}, {data.shards} is {now[:12]}: give "
            "the run's own with --shards"
        )
    page = Page(f"{settings['recipe']}: {config.run.resolve().name}")
    facts = {
        "network": settings["encoder"]["backbone"],
        "pictures": f"{sum(store.shard_samples):,}",
        "checkpoint": found.folder.name,
    }
    page.facts(facts_of(lines, settings) | facts)
    for warning in warnings:
        page.note(warning)
    add_alarms(page, lines)
    add_curves(page, lines)
    add_views(page, data, settings, config.pictures)
    add_neighbours(page, found, store, config)
    add_settings(page, settings)
    add_environment(page, config.run / ENVIRONMENT_NAME)
    add_left_out(page, config.run)
    output = config.output or config.run / "report.html"
    with atomic_file(output) as file:
        file.write(page.html().encode())
    store.close()
    return output


def main() -> None:
    """Parse the command line and write the page."""
    config = parse_flags(ReportConfig, __doc__)
    Console().print(f"wrote {write_report(config)}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    run_program(main, (CheckpointError,))
