"""Learning rate and momentum at each step, against the published numbers."""

import math

import pytest

from model.schedule import OptimiserConfig, lr_at, momentum_at, scaled_lr

V1 = OptimiserConfig(lr=0.03, schedule="steps")
V2 = OptimiserConfig(lr=0.03, schedule="cosine")
V3 = OptimiserConfig(
    name="lars", lr=0.3, lr_batch=256, schedule="cosine", every="step", warmup_epochs=10
)
STEPS_PER_EPOCH = 5004  # ImageNet-1M with batch 256
TOTAL = 200 * STEPS_PER_EPOCH


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [(0, 0.03), (119, 0.03), (120, 0.003), (159, 0.003), (160, 0.0003), (199, 0.0003)],
)
@pytest.mark.parametrize("step_in_epoch", [0, STEPS_PER_EPOCH - 1])
def test_v1_falls_tenfold_at_epochs_120_and_160_of_200(epoch, lr, step_in_epoch):
    step = epoch * STEPS_PER_EPOCH + step_in_epoch
    assert lr_at(V1, step, TOTAL, STEPS_PER_EPOCH, 256) == pytest.approx(lr)


@pytest.mark.parametrize("epoch", [0, 1, 50, 100, 150, 199])
@pytest.mark.parametrize("step_in_epoch", [0, 1, STEPS_PER_EPOCH - 1])
def test_v2_is_the_official_cosine_of_the_epoch(epoch, step_in_epoch):
    official = 0.03 * 0.5 * (1.0 + math.cos(math.pi * epoch / 200))
    step = epoch * STEPS_PER_EPOCH + step_in_epoch
    assert lr_at(V2, step, TOTAL, STEPS_PER_EPOCH, 256) == pytest.approx(official, rel=1e-12)


def test_a_run_shorter_than_an_epoch_changes_the_rate_at_every_step():
    rates = [lr_at(V2, step, 8, 1000, 256) for step in range(8)]
    assert rates[0] == 0.03
    assert rates[4] == pytest.approx(0.015)
    assert rates[7] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert sorted(set(rates), reverse=True) == rates


def test_a_short_run_by_steps_falls_at_its_shares():
    rates = [lr_at(V1, step, 10, 1000, 256) for step in range(10)]
    assert rates == pytest.approx([0.03] * 6 + [0.003] * 2 + [0.0003] * 2)


def test_a_run_that_ends_within_an_epoch_counts_that_epoch_as_a_whole():
    assert lr_at(V2, 10, 15, 10, 256) == pytest.approx(0.015)  # the second of two epochs
    assert lr_at(V2, 9, 15, 10, 256) == 0.03


def test_milestones_and_factor_are_settings():
    config = OptimiserConfig(lr=1.0, schedule="steps", milestones=(0.5,), factor=0.9)
    assert [lr_at(config, step, 4, 100, 256) for step in range(4)] == [1.0, 1.0, 0.9, 0.9]


@pytest.mark.parametrize("step", [0, 1, 312, 3119, 3120, 3121, 50_000, 93_599])
def test_v3_is_the_official_warm_up_and_cosine_of_each_step_for_a_batch_of_4096(step):
    epoch, highest = step / 312, 0.3 * 4096 / 256
    if epoch < 10:
        official = highest * epoch / 10
    else:
        official = highest * 0.5 * (1 + math.cos(math.pi * (epoch - 10) / (300 - 10)))
    assert lr_at(V3, step, 300 * 312, 312, 4096) == pytest.approx(official, rel=1e-12)


def test_v3_begins_at_zero_and_is_highest_after_ten_epochs():
    rates = [lr_at(V3, step, 3000, 100, 4096) for step in range(3000)]
    assert rates[0] == 0
    assert max(rates) == rates[1000] == pytest.approx(4.8)
    assert rates[-1] < 1e-5


def test_a_run_that_is_shorter_than_its_warm_up_only_rises():
    rates = [lr_at(V3, step, 20, 5, 256) for step in range(20)]
    assert rates == pytest.approx([0.3 * step / 50 for step in range(20)])


def test_a_cosine_between_epochs_may_begin_with_a_warm_up():
    config = OptimiserConfig(lr=1.0, warmup_epochs=1)
    rates = [lr_at(config, step, 15, 5, 256) for step in range(15)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.6, 0.8] + [1.0] * 5 + [0.5] * 5)


@pytest.mark.parametrize(("step", "falls"), [(0, 0), (62_499, 0), (62_500, 1), (1_249_999, 19)])
def test_v1_on_a_billion_pictures_falls_by_a_tenth_every_62500_steps(step, falls):
    config = OptimiserConfig(lr=0.12, schedule="decay", factor=0.9)
    lr = lr_at(config, step, 1_250_000, 917_968, 1024)
    assert lr == pytest.approx(0.12 * 0.9**falls, rel=1e-12)


@pytest.mark.parametrize(("batch", "expected"), [(256, 0.3), (4096, 4.8), (64, 0.075)])
def test_the_rate_follows_the_batch_where_it_is_given_for_one(batch, expected):
    assert scaled_lr(0.3, batch, 256) == pytest.approx(expected)
    assert scaled_lr(0.3, batch, None) == 0.3


@pytest.mark.parametrize(("step", "m"), [(0, 0.99), (25, 0.99 + 0.01 * 0.1464466), (50, 0.995),
                                         (99, 1 - 0.01 * 0.00024672), (100, 1.0)])  # fmt: skip
def test_the_momentum_of_v3_goes_to_one_on_half_a_cosine(step, m):
    assert momentum_at(0.99, step, 100, "cosine") == pytest.approx(m, abs=1e-9)
    assert momentum_at(0.99, step, 100, "constant") == 0.99


@pytest.mark.parametrize("name", ["lr_batch", "decay_steps"])
def test_a_number_below_one_is_named_with_its_flag(name):
    flag = "--optimiser." + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{flag} 0: give a number of at least 1"):
        OptimiserConfig(**{name: 0})


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "warmup_epochs", "factor"])
def test_a_negative_number_is_named_with_its_flag(name):
    flag = "--optimiser." + name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"{flag} -1.0: give a number of at least 0"):
        OptimiserConfig(**{name: -1.0})
