"""The command line of a run: a recipe, a file of settings, flags.

Order: the recipe's settings, over them those of --config FILE, over them the flags.
"""

import argparse
import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from eval.learning_rate import with_own_lr
from eval.plan_config import PlanConfig
from eval.recipes import RECIPES
from eval.run_config import TrainConfig, read_config
from pipeline.command_line import parse_flags
from pipeline.program import InputError


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """What train.py is asked for."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The settings of the run."""
    only_plan: Annotated[bool, tyro.conf.arg(name="plan")] = False
    """Say what the run will take (steps, memory, storage, hours, cost) and start nothing."""
    plan: PlanConfig = field(default_factory=PlanConfig)

    def __post_init__(self) -> None:
        if not self.only_plan and self.plan != PlanConfig():
            raise InputError("--plan.* without --plan: add --plan, or leave them out to train")


def parse_arguments(arguments: list[str], about: str) -> TrainArguments:
    """Settings: those of the recipe, then those of --config FILE, then the flags.

    The learning rate is that of their batch, so a run's config.json holds the number itself.

    Args:
        arguments: of the command line.
        about: what --help says of the program.

    Raises:
        InputError: if the recipe or a setting in the file is unknown.
    """
    default, rest = recipe_of(arguments)
    asked = parse_flags(
        TrainArguments, about_recipes(about, default), rest, TrainArguments(run=default)
    )
    return replace(asked, run=with_own_lr(asked.run, default, rest))


def about_recipes(about: str, default: TrainConfig) -> str:
    """What --help says of a program whose first word is a recipe."""
    known = ", ".join(RECIPES)
    return f"{about}\nRecipes: {known}. The defaults shown are those of {default.recipe}."


def recipe_of(arguments: list[str]) -> tuple[TrainConfig, list[str]]:
    """The settings that the flags change, and the flags.

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
        default = RECIPES[name]
    if files.config is not None:
        default = read_config(files.config, default)
    if default is None:
        if not {"-h", "--help"} & set(rest):
            raise InputError(f"no recipe: the first word is one of {known}")
        default = RECIPES["moco-v2"]
    return default, rest
