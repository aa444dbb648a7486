"""Each recipe has a card, made from its settings and from what was published about it."""

import runpy
import sys
from pathlib import Path

import pytest

from eval import recipe_card
from eval.recipe_card import card
from eval.recipe_facts import FACTS
from eval.recipes import RECIPES

CARDS = Path(recipe_card.__file__).resolve().parents[1] / "docs" / "recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_the_card_in_the_docs_is_the_one_that_is_made_now(name):
    assert (CARDS / f"{name}.md").read_text() == card(name)


def test_there_is_a_card_for_each_recipe_and_no_other():
    assert list(FACTS) == list(RECIPES)
    assert {path.stem for path in CARDS.glob("*.md")} - {"README"} == set(RECIPES)


def test_every_score_names_its_source_and_nothing_is_said_of_a_gpu_here():
    for facts in FACTS.values():
        assert all(score.source and score.protocol for score in facts.scores)
        assert "http" in facts.published_time or facts.published_time == "" or facts.gpus == 1
    assert "not measured on a GPU yet" in card("moco-v2")


def test_a_card_shows_the_numbers_of_its_recipe():
    text = card("moco-v1")
    for line in (
        "| learning rate | 0.03, x 0.1 after 120 and 160 epochs |",
        "| dictionary | queue of 65,536 keys |",
        "| **60.8** | ± 0.2, five runs |",
        "53 hours on 8 V100, 424 GPU hours",
        "147.9 GB",
        "1,000,800 steps",
        "accelerate launch --num_processes 8 train.py moco-v1 --data.shards TRAIN --output RUN",
    ):
        assert line in text
    assert "none was published" in card("small-data")


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["recipe_card.py", *map(str, words)])
    try:
        runpy.run_path(recipe_card.__file__, run_name="__main__")
    except SystemExit as end:
        return end.code
    return 0


def test_the_program_prints_one(monkeypatch, capsys):
    assert run(monkeypatch, "demo") == 0
    assert capsys.readouterr().out == card("demo")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give the name of a recipe, or --all FOLDER"),
        (["moco-v9"], "there is no recipe 'moco-v9': choose one of moco-v1, "),
        (["demo", "--all", "x"], "give the name of a recipe, or --all FOLDER"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, words, message):
    assert run(monkeypatch, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
