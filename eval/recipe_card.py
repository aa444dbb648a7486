"""Recipe cards: what a recipe is, what to expect of it, what it takes, and the commands.

python eval/recipe_card.py moco-v2          # prints one
python eval/recipe_card.py --all docs/recipes
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import tyro

if not __package__:  # run as a script: import from the repository root, not from eval/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.plan import checkpoint_bytes
from eval.plan_report import as_size
from eval.recipe_facts import FACTS, LINEAR, Facts
from eval.recipes import FITTED, RECIPES
from eval.roofline import figure
from eval.run_config import TrainConfig
from model.encoder import EncoderConfig
from model.moco import MoCoConfig
from model.step_flops import StepFlops, flops_of_step
from model.step_memory import network_of_process
from pipeline.command_line import parse_flags
from pipeline.program import InputError, run_program
from pipeline.shard_format import atomic_file

AFTERWARDS = "`train.py` takes every setting as a flag; several machines: `docs/launch`."
NO_LINEAR = (
    "`eval/knn.py` judges by kNN. The linear classifier of the published scores is not part of "
    "this project yet."
)


@dataclass(frozen=True, kw_only=True)
class CardConfig:
    """Which cards."""

    recipe: Annotated[str | None, tyro.conf.Positional] = None
    """Name of the recipe whose card is printed."""
    all: Path | None = None
    """Write the cards of all recipes into this folder, as NAME.md."""

    def __post_init__(self) -> None:
        if (self.recipe is None) == (self.all is None):
            raise InputError("give the name of a recipe, or --all FOLDER")
        if self.recipe is not None and self.recipe not in RECIPES:
            known = ", ".join(RECIPES)
            raise InputError(f"there is no recipe {self.recipe!r}: choose one of {known}")


def card(name: str) -> str:
    """The card of a recipe, Markdown."""
    config, facts = RECIPES[name], FACTS[name]
    parts = [
        f"# {name}",
        facts.what,
        f"Source: {'; '.join(facts.sources)}.",
        "## Expected",
        table(("protocol", "score", "spread", "source"), expected(facts)),
        "## Settings",
        table(("", ""), settings(config)),
        "## What it takes",
        "\n".join(f"- {line}" for line in demands(config, facts)),
        "## Commands",
        "\n".join(f"    {line}" for line in commands(name, facts)),
    ]
    if not facts.commands:
        parts.append(AFTERWARDS)
    if any(score.protocol == LINEAR for score in facts.scores):
        parts.append(NO_LINEAR)
    if facts.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in facts.notes)]
    made = "<!-- Made by `python eval/recipe_card.py --all docs/recipes`; not to be edited. -->"
    return "\n\n".join([*parts, made]) + "\n"


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def expected(facts: Facts) -> Iterator[tuple[str, ...]]:
    """The published scores."""
    for score in facts.scores:
        yield score.protocol, f"**{score.value}**", score.spread, score.source
    if not facts.scores:
        yield "none was published", "", "", ""


def settings(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """The numbers that make the recipe."""
    encoder, moco, optimiser = config.encoder, config.moco, config.optimiser
    stem = "" if encoder.stem == "imagenet" else f", stem {encoder.stem}"
    yield "backbone, head", f"{encoder.backbone}{stem}, {encoder.head} to {encoder.dim}"
    yield "views", f"{config.data.views}, {config.data.image_px} px"
    by_pictures = " by the number of pictures" if config.recipe in FITTED else ""
    if moco.mechanism == "queue":
        length = by_pictures or f" of {moco.queue:,} keys"
        yield "dictionary", f"queue{length}{', symmetric loss' * moco.symmetric}"
    else:
        yield "dictionary", f"{moco.mechanism}, symmetric loss, predictor"
    to_one = ", rising to 1 on a cosine" * (moco.momentum_schedule == "cosine")
    yield "momentum m", by_pictures.strip() or f"{moco.momentum:g}{to_one}"
    yield "temperature T", f"{moco.temperature:g}"
    groups = f", {moco.batch_norm_groups} groups" * (moco.batch_norm == "shuffle")
    yield "batch, batch norm", f"{config.batch:,}, {moco.batch_norm}{groups}"
    yield "optimiser", f"{optimiser.name}, weight decay {optimiser.weight_decay:g}"
    per = f" for {optimiser.lr_batch} pictures" if optimiser.lr_batch else ""
    yield "learning rate", f"{optimiser.lr:g}{per}, {schedule_of(config)}"
    steps = f"{config.steps:,} steps, about " if config.steps else ""
    yield "length", f"{steps}{config.epochs:g} epochs"
    yield "precision", "float32" if config.precision == "no" else config.precision


def schedule_of(config: TrainConfig) -> str:
    """How the learning rate changes."""
    optimiser = config.optimiser
    warm_up = f"{optimiser.warmup_epochs:g} epochs of warm-up, " if optimiser.warmup_epochs else ""
    if optimiser.schedule == "decay":
        return f"{warm_up}x {optimiser.factor:g} every {optimiser.decay_steps:,} steps"
    if optimiser.schedule == "steps":
        places = " and ".join(f"{place * config.epochs:g}" for place in optimiser.milestones)
        return f"{warm_up}x {optimiser.factor:g} after {places} epochs"
    return f"{warm_up}cosine, changed at each {optimiser.every}"


@cache
def counted(encoder: EncoderConfig, moco: MoCoConfig, image_px: int, batch: int) -> StepFlops:
    """``flops_of_step``, once for recipes that share a network."""
    return flops_of_step(encoder, moco, image_px, batch)


def demands(config: TrainConfig, facts: Facts) -> Iterator[str]:
    """Hours, arithmetic, storage."""
    yield f"GPU hours, published: {facts.published_time or 'none'}."
    yield f"GPU hours, measured with this project: {facts.measured_time}."
    # Momentum, temperature and schedule take no arithmetic.
    moco = replace(config.moco, momentum=0.0, temperature=1.0, batch_norm_groups=1)
    flops = counted(config.encoder, moco, config.data.image_px, config.batch).total
    data = facts.data
    whole = ""
    if data.pictures is not None:
        per_epoch = data.pictures // config.batch
        steps = config.steps or round(config.epochs * per_epoch)
        whole = f", {figure(flops * config.batch * steps / 1e15)} PFLOP in all ({steps:,} steps)"
    yield f"Arithmetic: {flops / 1e9:,.3g} GFLOP a picture{whole}."
    count = "" if data.pictures is None else f", {data.pictures:,} pictures"
    size = f", {data.gigabytes:g} GB ({data.size})" if data.gigabytes is not None else ""
    yield f"Data: {data.name}{count}{size}."
    checkpoint = checkpoint_of(config, facts)
    yield (
        f"Checkpoints: {as_size(checkpoint)} each, at most {config.keep + 1} at a time, "
        f"{as_size((config.keep + 1) * checkpoint)}."
    )


def checkpoint_of(config: TrainConfig, facts: Facts) -> int:
    """Bytes of a checkpoint."""
    image_px, gpus = config.data.image_px, facts.gpus
    network = network_of_process(config.encoder, config.moco, config.batch, gpus, image_px)
    return checkpoint_bytes(config, network, facts.data.pictures or 0, gpus)


def commands(name: str, facts: Facts) -> Iterator[str]:
    """To pack, plan, train and judge."""
    if facts.commands:
        yield from facts.commands
        return
    yield from facts.data.pack
    yield f"python train.py {name} --data.shards TRAIN --plan --plan.processes {facts.gpus}"
    processes = f"--num_processes {facts.gpus} " if facts.gpus > 1 else ""
    yield f"accelerate launch {processes}train.py {name} --data.shards TRAIN --output RUN"
    yield "python eval/knn.py RUN --train TRAIN --test TEST"


def main() -> None:
    """Print a card, or write all."""
    config = parse_flags(CardConfig, __doc__)
    if config.recipe is not None:
        sys.stdout.write(card(config.recipe))
    if config.all is not None:
        config.all.mkdir(parents=True, exist_ok=True)
        for name in RECIPES:
            with atomic_file(config.all / f"{name}.md") as file:
                file.write(card(name).encode())


if __name__ == "__main__":
    run_program(main)
