"""The meter's arithmetic, on a clock of our own."""

from types import SimpleNamespace

import pytest

from eval.meter import WARM_UP_STEPS, Meter, Totals
from pipeline.loader_meter import LoaderFigures


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


def speed_of(meter):
    values = meter.read()
    return {name: values[name] for name in ("images_per_second", "data_wait_share")}


def test_the_first_steps_do_not_count(clock):
    meter = Meter(8, LoaderFigures)
    take_steps(meter, clock, WARM_UP_STEPS, wait_s=50.0, work_s=50.0)
    take_steps(meter, clock, 4)
    assert speed_of(meter) == pytest.approx({"images_per_second": 2.0, "data_wait_share": 0.25})


def test_every_reading_counts_from_the_one_before(clock):
    meter = Meter(8, LoaderFigures)
    take_steps(meter, clock, 10)
    meter.read()
    take_steps(meter, clock, 3, wait_s=6.0, work_s=4.0)
    take_steps(meter, clock, 2, wait_s=1.0, work_s=4.0)
    assert speed_of(meter) == pytest.approx({"images_per_second": 1.0, "data_wait_share": 0.5})


def test_a_pause_counts_neither_as_time_nor_as_waiting(clock):
    meter = Meter(8, LoaderFigures)
    take_steps(meter, clock, 10)
    meter.read()
    take_steps(meter, clock, 5, pause_s=1000.0)
    assert speed_of(meter) == pytest.approx({"images_per_second": 2.0, "data_wait_share": 0.25})


def test_totals_count_every_step_and_second_but_pauses_and_what_was_before(clock):
    before = Totals(images=800, training_s=100.0, waited_s=40.0)
    meter = Meter(8, LoaderFigures, before)
    clock.seconds += 1000.0  # until the first step
    take_steps(meter, clock, 10, pause_s=7.0)
    meter.read()
    take_steps(meter, clock, 15, wait_s=2.0, work_s=1.0)
    expected = Totals(images=800 + 25 * 8, training_s=100.0 + 40 + 45, waited_s=40.0 + 10 + 30)
    assert meter.totals() == expected
    values = meter.read()
    assert values["images_seen"] == 1000
    assert values["data_wait_share_so_far"] == pytest.approx(80 / 185)


def test_what_follows_from_the_speed_is_asked_with_it(clock):
    meter = Meter(8, LoaderFigures, of_speed=lambda speed: {"flops_per_second": 3 * speed})
    take_steps(meter, clock, 10)
    assert meter.read()["flops_per_second"] == 6.0


def test_totals_before_the_first_step_are_those_before(clock):
    assert Meter(8, LoaderFigures).totals() == Totals(images=0, training_s=0.0, waited_s=0.0)
    before = Totals(images=800, training_s=100.0, waited_s=40.0)
    meter = Meter(8, LoaderFigures, before)
    clock.seconds += 1000.0
    assert meter.totals() == before


def test_a_reading_at_once_divides_by_nothing(clock):
    meter = Meter(8, LoaderFigures)
    assert clock.seconds == 100.0
    assert speed_of(meter) == {"images_per_second": 0.0, "data_wait_share": 0.0}


def test_a_reading_has_what_the_loader_measured_since_the_one_before(clock):
    read_bytes = iter([0, 5 << 20, 5 << 20, 8 << 20, 8 << 20])
    meter = Meter(8, lambda: LoaderFigures(read_bytes=next(read_bytes), read_s=clock.seconds))
    clock.seconds += 2
    assert meter.read()["read_mib_per_second"] == 2.5
    clock.seconds += 1
    assert meter.read()["read_mib_per_second"] == 3
