import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.order import Order
from pipeline.program import InputError
from pipeline.show_order import OrderConfig, measure, neighbour_distances, order_of
from tests.warm_python import warm_python

PROGRAM = Path(__file__).resolve().parents[1] / "pipeline" / "show_order.py"


def run_program(*arguments, cwd):
    command = [*warm_python(), str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_distances_are_those_of_the_steps_that_neighbours_are_met_in():
    order = Order(np.full(10, 40), 8, 3, 2, 400)
    step_of = {}
    for step in range(order.steps_per_epoch):
        for position in order.batch(step, 1, 2).position.tolist():
            step_of[position] = step
    pairs = [(p, p + 1) for p in step_of if p + 1 in step_of]
    expected = sorted(abs(step_of[a] - step_of[b]) for a, b in pairs)
    assert len(expected) == 199  # one lane of 200 places, all in one window
    assert sorted(neighbour_distances(order, 1, 0).tolist()) == expected


def test_a_window_as_long_as_the_epoch_is_a_full_shuffle():
    order = Order(np.full(100, 100), 10, 0, 1, 10_000)
    mixing = measure(order, 1)
    assert mixing.distance_steps.mean() == pytest.approx(order.steps_per_epoch / 3, rel=0.03)
    assert mixing.batch_shards == pytest.approx(mixing.full_batch_shards, rel=0.05)
    assert mixing.rank_shards == 100


def test_a_window_of_one_meets_neighbours_one_after_the_other():
    order = Order(np.full(100, 100), 10, 0, 1, 1)
    distances = neighbour_distances(order, 0, 0)
    assert distances.max(initial=0) <= 1
    assert measure(order, 1).batch_shards < 2


def test_the_command_writes_the_picture_and_prints_the_figures(shard_set, tmp_path):
    done = run_program(shard_set, "--batch", 4, "--window", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "shards that a global batch of 4 draws" in " ".join(done.stdout.split())
    with Image.open(tmp_path / "order.png") as image:
        assert image.format == "PNG" and min(image.size) > 300


def test_a_set_that_does_not_exist_yet_can_be_planned_for():
    config = OrderConfig(simulate=(1003, 10), batch=16)
    order = order_of(config)
    assert order.samples == 1003 and len(order.shard_samples) == 10
    assert np.ptp(order.shard_samples) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a folder of shards, or --simulate"),
        ({"shards": Path("here"), "simulate": (10, 2)}, "not both"),
        ({"simulate": (10, 20)}, "--simulate 10 20: give at least one shard"),
        ({"simulate": (10, 2), "output": Path("order.jpg")}, "name that ends in .png"),
    ],
)
def test_wrong_settings_are_one_line(options, message):
    with pytest.raises(InputError, match=message):
        OrderConfig(**options)


def test_processes_that_do_not_share_the_lanes_are_an_input_error():
    with pytest.raises(InputError, match="3 processes cannot share 16 lanes"):
        order_of(OrderConfig(simulate=(1000, 10), batch=16, world=3))
