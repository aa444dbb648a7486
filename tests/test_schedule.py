"""The learning rate at each step, against the published numbers."""

import math

import pytest

from model.schedule import OptimiserConfig, lr_at

V1 = OptimiserConfig(lr=0.03, schedule="steps")
V2 = OptimiserConfig(lr=0.03, schedule="cosine")
STEPS_PER_EPOCH = 5004  # ImageNet-1M with batch 256
TOTAL = 200 * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003), (199, 0.0003)],
)
@pytest.mark.parametrize("step_in_epoch", [0, STEPS_PER_EPOCH - 1])
def test_v1_falls_tenfold_at_epochs_120_and_160_of_200(epoch, lr, step_in_epoch):
    step = epoch * STEPS_PER_EPOCH + step_in_epoch
    assert lr_at(V1, step, TOTAL, STEPS_PER_EPOCH) == pytest.approx(lr)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 150, 199])
@pytest.mark.parametrize("step_in_epoch", [0, 1, STEPS_PER_EPOCH - 1])
def test_v2_is_the_official_cosine_of_the_epoch(epoch, step_in_epoch):
    official = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
    step = epoch * STEPS_PER_EPOCH + step_in_epoch
    assert lr_at(V2, step, TOTAL, STEPS_PER_EPOCH) == pytest.approx(official, rel=1e-12)


def test_a_run_shorter_than_an_epoch_changes_the_rate_at_every_step():
    rates = [lr_at(V2, step, 8, 1000) for step in range(8)]
    assert rates[0] == 0.03
    assert rates[4] == pytest.approx(0.015)
    assert rates[7] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert sorted(set(rates), reverse=True) == rates


def test_a_short_run_by_steps_falls_at_its_shares():
    rates = [lr_at(V1, step, 10, 1000) for step in range(10)]
    assert rates == pytest.approx([0.03] * 6 + [0.003] * 2 + [0.0003] * 2)


def test_a_run_that_ends_within_an_epoch_counts_that_epoch_as_a_whole():
    assert lr_at(V2, 10, 15, 10) == pytest.approx(0.015)  # the second of two epochs
    assert lr_at(V2, 9, 15, 10) == 0.03


def test_milestones_and_factor_are_settings():
    config = OptimiserConfig(lr=1.0, schedule="steps", milestones=(0.5,), factor=0.9)
    assert [lr_at(config, step, 4, 100) for step in range(4)] == [1.0, 1.0, 0.9, 0.9]


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_negative_number_is_named_with_its_flag(name):
    flag = "--optimiser." + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{flag} -1.0: give a number of at least 0"):
        OptimiserConfig(**{name: -1.0})
