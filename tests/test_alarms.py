"""Alarms on made-up runs."""

import math
from dataclasses import replace

import pytest

from eval.alarms import PATIENCE, Alarms, settled_step
from eval.recipes import RECIPES
from eval.run_check import about_leak

CHANCE = math.log(4097)
HEALTHY = {"loss": 6.5, "effective_rank": 60.0, "highest_rank": 128, "negative_similarity": 0.1}
COLLAPSED = {**HEALTHY, "effective_rank": 1.02, "negative_similarity": 0.999}


def alarms(**changes):
    settings = {"chance_loss": CHANCE, "queue": 4096, "samples": 50_000, "settled_step": 100}
    return Alarms(**{**settings, **changes})


def looks(watch, values, count=PATIENCE, first=100):
    return [a.name for n in range(count) for a in watch.look(first + n, values)]


def test_a_healthy_run_raises_none():
    watch = alarms()
    assert watch.start() == []
    assert looks(watch, HEALTHY, 20) == []
    for accuracy, top1 in ((0.3, 0.5), (0.5, 0.6), (0.7, 0.7), (0.8, 0.75), (0.85, 0.755)):
        assert watch.knn(accuracy, top1) == []


def test_collapse_is_said_once_after_some_looks_in_a_row():
    watch = alarms()
    assert looks(watch, COLLAPSED, PATIENCE - 1) == []
    assert looks(watch, HEALTHY, 1) == []
    assert looks(watch, COLLAPSED, PATIENCE - 1) == []
    (alarm,) = watch.look(200, COLLAPSED)
    assert alarm.name == "collapse"
    assert "span 1.0 of 128 dimensions" in alarm.text
    assert "--optimiser.lr" in alarm.text
    assert looks(watch, COLLAPSED, 9) == []


def test_an_alarm_is_said_again_after_its_cause_had_gone():
    watch = alarms()
    assert looks(watch, COLLAPSED) == ["collapse"]
    assert looks(watch, HEALTHY, 1) == []
    assert looks(watch, COLLAPSED) == ["collapse"]


def test_a_part_of_the_dimensions_collapses_too():
    alike = {**HEALTHY, "negative_similarity": 0.73}
    assert looks(alarms(), {**alike, "effective_rank": 12.7}) == ["collapse"]
    assert looks(alarms(), {**alike, "effective_rank": 12.9}) == []
    # As measured in runs whose kNN score rose.
    assert looks(alarms(), {**HEALTHY, "effective_rank": 8.0, "negative_similarity": 0.16}) == []
    few = {**HEALTHY, "highest_rank": 8}
    assert looks(alarms(), {**few, "effective_rank": 1.4}) == ["collapse"]
    assert looks(alarms(), {**few, "effective_rank": 1.6}) == []


def test_different_pictures_that_are_alike_are_a_collapse_whatever_the_rank():
    assert looks(alarms(), {**HEALTHY, "negative_similarity": 0.981}) == ["collapse"]
    assert looks(alarms(), {**HEALTHY, "negative_similarity": 0.979}) == []


def test_nothing_is_judged_before_the_run_has_settled():
    assert looks(alarms(settled_step=1000), COLLAPSED, 20) == []


def test_a_loss_that_stays_at_chance_is_named_with_its_value():
    watch = alarms()
    assert looks(watch, {**HEALTHY, "loss": CHANCE * 0.98}, 9) == []
    assert looks(watch, {**HEALTHY, "loss": CHANCE - 0.001}, PATIENCE - 1) == []
    (alarm,) = watch.look(200, {**HEALTHY, "loss": CHANCE})
    assert alarm.name == "stuck at chance"
    assert "log(K + 1) = 8.318" in alarm.text


def test_collapse_explains_a_loss_at_chance():
    assert looks(alarms(), {**COLLAPSED, "loss": CHANCE}) == ["collapse"]


@pytest.mark.parametrize(("queue", "names"), [(49_999, []), (50_000, ["long queue"])])
def test_a_queue_as_long_as_the_data_is_named(queue, names):
    assert [alarm.name for alarm in alarms(queue=queue).start()] == names


def knn_names(*pairs):
    watch = alarms()
    return [alarm.name for pair in pairs for alarm in watch.knn(*pair)]


def test_pretext_accuracy_that_soars_while_knn_falls_is_a_leak():
    falling = ((0.6, 0.40), (0.95, 0.38), (0.998, 0.35), (0.999, 0.30), (0.999, 0.28))
    assert knn_names(*falling) == ["batch-norm leak"]


def test_pretext_accuracy_that_soars_while_knn_never_rises_is_a_leak():
    assert knn_names(*((0.6, 0.40), *[(0.99, 0.405)] * 5)) == ["batch-norm leak"]


@pytest.mark.parametrize(
    "pairs",
    [
        [(0.6, 0.40), (0.99, 0.5), (0.99, 0.6), (0.99, 0.6), (0.99, 0.6)],  # a plateau, risen
        [(0.6, 0.40), (0.7, 0.38), (0.7, 0.36), (0.7, 0.35), (0.7, 0.3)],  # no high accuracy
        [(0.6, 0.40), (0.99, 0.36), (0.99, 0.30)],  # too early to tell
        [(0.6, 0.40), (0.99, 0.60), (0.99, 0.58), (0.99, 0.595), (0.99, 0.598)],  # noise
    ],
)
def test_other_curves_are_no_leak(pairs):
    assert knn_names(*pairs) == []


def test_a_run_is_judged_after_the_queue_was_filled_twice_and_an_epoch():
    assert settled_step(512, 64, 62) == 62
    assert settled_step(4096, 256, 20) == 32
    assert settled_step(65_536, 256, 5004) == 1000


@pytest.mark.parametrize(
    ("recipe", "groups", "changes", "is_said"),
    [
        ("moco-v2", 8, {}, False),
        ("moco-v2", 1, {}, True),
        ("moco-v2", 8, {"batch_norm": "none"}, True),
        ("moco-v2", 1, {"batch_norm": "sync"}, True),
        ("moco-v3-100", 1, {}, False),  # all its keys are of the step itself
        ("moco-v2", 1, {"mechanism": "end-to-end"}, False),
    ],
)
def test_settings_that_let_batch_norm_tell_are_named(recipe, groups, changes, is_said):
    config = RECIPES[recipe]
    lines = list(about_leak(replace(config, moco=replace(config.moco, **changes)), groups))
    assert [("which key is its own" in line) for line in lines] == [True] * is_said
