"""The command line of a run: a recipe, a file of settings, flags.

Order: the recipe's settings, over them those of --config FILE, over them the flags.
"""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from eval.learning_rate import with_own_lr
from eval.plan_config import PlanConfig
from eval.recipes import FITTED, RECIPES
from eval.run_config import TrainConfig, read_config
from eval.small_data import fitted
from pipeline.command_line import parse_flags
from pipeline.data_config import open_store
from pipeline.program import InputError


@dataclass(frozen=True, kw_only=True)
class WithRun:
    """What a program is asked for whose first word is a recipe."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The settings of train.py."""


A = TypeVar("A", bound=WithRun)


@dataclass(frozen=True, kw_only=True)
class TrainArguments(WithRun):
    """What train.py is asked for."""

    only_plan: Annotated[bool, tyro.conf.arg(name="plan")] = False
    """Say what the run will take (steps, memory, storage, hours, cost) and start nothing."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if not self.only_plan and self.plan != PlanConfig():
            raise InputError("--plan.* without --plan: add --plan, or leave them out to train")


def parse_arguments(arguments: list[str], about: str) -> TrainArguments:
    """What train.py is asked for; ``parse_with_recipe`` says how."""
    return parse_with_recipe(TrainArguments, arguments, about, lambda asked: asked.plan.pictures)


def parse_with_recipe(
    kind: type[A],
    arguments: list[str],
    about: str,
    pictures_of: Callable[[A], int | None] = lambda _: None,
) -> A:
    """Settings: those of the recipe, then those of --config FILE, then the flags.

    The learning rate is that of their batch, and queue and momentum of some recipes are those of
    their pictures, so a run's config.json holds the numbers themselves.

    Args:
        kind: what the program is asked for.
        arguments: of the command line.
        about: what --help says of the program.
        pictures_of: their number where no shards say it.

    Raises:
        InputError: if the recipe or a setting in the file is unknown.
    """
    default, rest = recipe_of(arguments)
    asked = parse_flags(kind, about_recipes(about, default), rest, kind(run=default))
    data = asked.run.data
    if default.recipe in FITTED and (pictures_of(asked) or data.shards):
        pictures = pictures_of(asked) or open_store(data).manifest.samples
        fit = partial(fitted, pictures=pictures, batch=asked.run.batch)
        default, rest = recipe_of(arguments, fit)
        asked = parse_flags(kind, about_recipes(about, default), rest, kind(run=default))
    run = with_own_length(with_own_lr(asked.run, default, rest), rest)
    return replace(asked, run=run)


def with_own_length(config: TrainConfig, flags: list[str]) -> TrainConfig:
    """Settings where --epochs wins over the steps of a recipe or a file, as every flag does."""
    given = {flag.partition("=")[0] for flag in flags}
    if "--epochs" in given and "--steps" not in given:
        return replace(config, steps=None)
    return config


def about_recipes(about: str, default: TrainConfig) -> str:
    """What --help says of a program whose first word is a recipe."""
    known = ", ".join(RECIPES)
    return f"{about}\nRecipes: {known}. The defaults shown are those of {default.recipe}."


def recipe_of(
    arguments: list[str], fit: Callable[[TrainConfig], TrainConfig] = lambda recipe: recipe
) -> tuple[TrainConfig, list[str]]:
    """The settings that the flags change, and the flags.

    Args:
        arguments: of the command line.
        fit: changes the recipe, before a file changes it further.

    Raises:
        InputError: if the recipe or a setting in the file is unknown.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--resume", nargs="?", const="newest")  # tyro's flags have a value or none
    files, rest = parser.parse_known_args(arguments)
    if files.resume is not None:
        rest += ["--resume", files.resume]
    known = ", ".join(RECIPES)
    default = None
    if rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in RECIPES:
            near = difflib.get_close_matches(name, RECIPES, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InputError(f"there is no recipe {name!r}: choose one of {known}.{hint}")
        default = fit(RECIPES[name])
    if files.config is not None:
        default = read_config(files.config, default)
    if default is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError(f"no recipe: the first word is one of {known}")
        default = RECIPES["moco-v2"]
    return default, rest
