"""The meter's arithmetic, on a clock of our own."""

from types import SimpleNamespace

import pytest

from eval.meter import WARM_UP_STEPS, Meter


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr("eval.meter.time", SimpleNamespace(perf_counter=lambda: now.seconds))
    return now


def take_steps(meter, clock, steps, *, wait_s=1.0, work_s=3.0, pause_s=0.0):
    for _ in range(steps):
        with meter.waiting_for_data():
            clock.seconds += wait_s
        clock.seconds += work_s
        with meter.paused():
            clock.seconds += pause_s


def test_the_first_steps_do_not_count(clock):
    meter = Meter(images_per_step=8)
    take_steps(meter, clock, WARM_UP_STEPS, wait_s=50.0, work_s=50.0)
    take_steps(meter, clock, 4)
    assert meter.read() == pytest.approx({"images_per_second": 2.0, "data_wait_share": 0.25})


def test_every_reading_counts_from_the_one_before(clock):
    meter = Meter(images_per_step=8)
    take_steps(meter, clock, 10)
    meter.read()
    take_steps(meter, clock, 5, wait_s=4.0, work_s=4.0)
    assert meter.read() == pytest.approx({"images_per_second": 1.0, "data_wait_share": 0.5})


def test_a_pause_counts_neither_as_time_nor_as_waiting(clock):
    meter = Meter(images_per_step=8)
    take_steps(meter, clock, 10)
    meter.read()
    take_steps(meter, clock, 5, pause_s=1000.0)
    assert meter.read() == pytest.approx({"images_per_second": 2.0, "data_wait_share": 0.25})


def test_a_reading_at_once_divides_by_nothing(clock):
    meter = Meter(images_per_step=8)
    assert clock.seconds == 100.0
    assert meter.read() == {"images_per_second": 0.0, "data_wait_share": 0.0}
