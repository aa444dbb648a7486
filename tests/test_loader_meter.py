"""The loader's figures: their arithmetic on a clock of our own, and that they tell who is slow."""

import time
from types import SimpleNamespace

import pytest
import torch

from pipeline.data_config import DataConfig
from pipeline.loader import PairLoader
from pipeline.loader_meter import LoaderFigures, LoaderMeter


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(
        "pipeline.loader_meter.time", SimpleNamespace(perf_counter=lambda: now.seconds)
    )
    return now


def test_values_are_speeds_and_shares():
    figures = LoaderFigures(
        seconds=10.0, images=100, waited_s=4.0, starved_s=1.0, read_images=120,
        read_bytes=12 << 20, read_s=3.0, blocked_s=7.0, views_images=80, views_s=2.0,
        bad_samples=3, fetched_bytes=40 << 20, retries=2, fetch_waited_s=1.0,
    )  # fmt: skip
    assert figures.values() == {
        "read_images_per_second": 60.0,
        "read_mib_per_second": 6.0,
        "views_images_per_second": 40.0,
        "engine_wait_share": 0.1,
        "reader_wait_share": 0.7,
        "bad_samples": 3.0,
        "fetched_mib_per_second": 4.0,
        "fetch_wait_share": 0.1,
        "fetch_retries": 2.0,
    }


def test_what_is_not_known_is_left_out():
    assert LoaderFigures().values() == {
        "engine_wait_share": 0.0,
        "reader_wait_share": 0.0,
        "bad_samples": 0.0,
    }


def test_a_stretch_is_the_difference_of_two_readings():
    one = LoaderFigures(seconds=2.0, images=10, retries=1)
    other = LoaderFigures(seconds=5.0, images=40, retries=1)
    assert other.since(one) == LoaderFigures(seconds=3.0, images=30)


def ask(meter, clock, wait_s, starved_s=0.0):
    asked = clock.seconds
    meter.add(starved_s=starved_s)
    clock.seconds += wait_s
    meter.given(8, asked)


def test_the_speed_of_views_is_taken_where_two_batches_in_a_row_were_waited_for(clock):
    meter = LoaderMeter()
    ask(meter, clock, 9.0)  # the first: the pipeline fills
    clock.seconds += 1.0
    ask(meter, clock, 3.0)  # four seconds after the last one
    ask(meter, clock, 4.0, starved_s=2.0)  # of which it did not work two
    clock.seconds += 100.0
    ask(meter, clock, 0.0)  # was ready: nobody knows since when
    ask(meter, clock, 5.0)
    figures = meter.figures(retries=7)
    assert (figures.views_images, figures.views_s) == (16, 4.0 + 2.0)
    assert (figures.images, figures.waited_s, figures.starved_s) == (40, 21.0, 2.0)
    assert (figures.seconds, figures.retries) == (122.0, 7)


def test_a_clock_counts_a_body_that_fails(clock):
    meter = LoaderMeter()
    with pytest.raises(ZeroDivisionError), meter.clock("read_s"):
        clock.seconds += 3.0
        raise ZeroDivisionError
    assert meter.figures().read_s == 3.0


def figures_of(folder, steps, monkeypatch, *, read_s=0.0, views_s=0.0, consume_s=0.0):
    """Of a loader whose stages are made slow, per batch of eight."""
    config = DataConfig(
        shards=str(folder), image_px=24, window=16, threads=1, engine="torchvision", lanes=4
    )
    with PairLoader(config, global_batch=8, seed=1, device=torch.device("cpu")) as loader:
        plan, make = loader.plan, loader._engine.make
        monkeypatch.setattr(loader, "plan", lambda step: (time.sleep(read_s), plan(step))[1])
        monkeypatch.setattr(
            loader._engine, "make", lambda request: (time.sleep(views_s), make(request))[1]
        )
        [next(loader) for _ in range(8)]  # what was in the queues before
        before = loader.figures()
        for _ in range(steps):
            next(loader)
            time.sleep(consume_s)
        return loader.figures().since(before)


def test_a_slow_reader_starves_the_engine_and_its_speed_is_told(shard_set, monkeypatch):
    figures = figures_of(shard_set, 15, monkeypatch, read_s=0.05)
    values = figures.values()
    assert values["engine_wait_share"] > 0.5 and values["reader_wait_share"] < 0.3
    assert 10 < values["read_images_per_second"] < 160  # eight in a bit more than 0.05 s
    assert figures.waited_s > 0.5 * figures.seconds


def test_slow_views_block_the_reader_and_their_speed_is_told(shard_set, monkeypatch):
    figures = figures_of(shard_set, 15, monkeypatch, views_s=0.05)
    values = figures.values()
    assert values["reader_wait_share"] > 0.5 and values["engine_wait_share"] < 0.3
    assert 10 < values["views_images_per_second"] < 160
    assert values["read_images_per_second"] > 2 * values["views_images_per_second"]


def test_a_slow_consumer_blocks_everything_and_waits_for_nothing(shard_set, monkeypatch):
    figures = figures_of(shard_set, 15, monkeypatch, consume_s=0.1)
    assert figures.values()["reader_wait_share"] > 0.5
    assert figures.waited_s < 0.3 * figures.seconds and figures.images == 15 * 8


def test_the_bytes_of_what_was_read_are_counted(shard_set, monkeypatch, clean_pictures):
    figures = figures_of(shard_set, 20, monkeypatch)
    mean = sum(map(len, clean_pictures)) / len(clean_pictures)
    assert figures.read_bytes == pytest.approx(figures.read_images * mean, rel=0.1)
    assert figures.bad_samples == figures.fetched_bytes == 0
