"""Queue and momentum that follow from the number of pictures."""

import json
from dataclasses import replace

import pytest

from eval.recipes import FITTED, RECIPES
from eval.run_arguments import parse_arguments
from eval.small_data import about_fit, fitted, momentum_for, queue_for
from pipeline.settings import to_plain

SMALL = RECIPES["small-data"]


@pytest.mark.parametrize(
    ("of", "pictures"), [("moco-v2", 1_281_167), ("cifar10", 50_000), ("moco-v1-ig1b", 940_000_000)]
)
def test_the_rule_gives_the_published_numbers_for_the_published_sets(of, pictures):
    config = RECIPES[of]
    found = (queue_for(pictures, config.batch), momentum_for(pictures, config.batch))
    assert found == (config.moco.queue, config.moco.momentum)


@pytest.mark.parametrize(
    ("pictures", "queue", "momentum"),
    [
        (10_000, 768, 0.99),  # in the ablation 512 is good, 2,048 too long, 0.99 best
        (126_689, 10_496, 0.999),
        (30_000, 2_432, 0.9957),  # in between: 1 - 1/234
        (1_000, 128, 0.99),
        (300, 75, 0.99),  # a quarter, less than a batch
        (3, 1, 0.99),
    ],
)
def test_queue_and_momentum_at_a_batch_of_128(pictures, queue, momentum):
    assert (queue_for(pictures, 128), momentum_for(pictures, 128)) == (queue, momentum)


@pytest.mark.parametrize("pictures", [2, 17, 511, 5_000, 99_999, 10**9])
@pytest.mark.parametrize("batch", [1, 8, 100, 4096])
def test_a_queue_is_never_longer_than_a_quarter_of_the_pictures(pictures, batch):
    queue = queue_for(pictures, batch)
    assert 1 <= queue <= max(pictures // 4, 1)
    assert queue <= 65_536
    assert queue % batch == 0 or queue < batch
    assert 0.99 <= momentum_for(pictures, batch) <= 0.999


def test_other_recipes_stay_as_they_are():
    assert frozenset({"small-data"}) == FITTED
    assert fitted(RECIPES["moco-v2"], 100, 10) is RECIPES["moco-v2"]


def test_the_recipe_shows_what_the_rule_gives():
    assert fitted(SMALL, 12_288, SMALL.batch) == SMALL


def parsed(*words):
    return parse_arguments(["small-data", *map(str, words)], "").run


def test_the_numbers_come_from_the_set_and_the_batch_that_are_asked_for(shard_set):
    moco = parsed("--data.shards", shard_set, "--batch", 4).moco  # 40 pictures
    assert (moco.queue, moco.momentum) == (4, 0.99)
    planned = parsed("--plan", "--plan.pictures", 30_000).moco
    assert (planned.queue, planned.momentum) == (2_432, 0.9957)


def test_flags_and_files_win_over_the_rule(shard_set, tmp_path):
    words = ["--data.shards", shard_set, "--batch", 4]
    assert parsed(*words, "--moco.queue", 7).moco == replace(parsed(*words).moco, queue=7)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"moco": {"momentum": 0.5}}))
    assert parsed(*words, "--config", file).moco.queue == 4
    assert parsed(*words, "--config", file).moco.momentum == 0.5


def test_the_settings_of_a_run_are_not_fitted_again(shard_set, tmp_path):
    file = tmp_path / "config.json"
    before = replace(parsed("--data.shards", shard_set, "--batch", 4), epochs=3.0)
    file.write_text(json.dumps(to_plain(replace(before, moco=replace(before.moco, queue=9)))))
    again = parse_arguments(["--config", str(file)], "").run
    assert again.moco.queue == 9


def test_the_start_says_what_was_chosen_and_what_was_not():
    config = fitted(SMALL, 30_000, 128)
    assert list(about_fit(config, 30_000)) == [
        "queue 2,432: chosen for 30,000 pictures in steps of 128",
        "momentum 0.9957: chosen for 30,000 pictures in steps of 128",
    ]
    other = replace(config, moco=replace(config.moco, queue=7))
    assert next(about_fit(other, 30_000)) == (
        "queue 7: given; for 30,000 pictures it would be 2,432"
    )
    assert not list(about_fit(RECIPES["demo"], 30_000))
