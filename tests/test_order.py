import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.order import Order, default_lanes
from pipeline.program import InputError


@st.composite
def orders(draw):
    lanes = draw(st.sampled_from([1, 2, 4, 16]))
    batch = lanes * draw(st.integers(1, 4))
    shards = draw(st.lists(st.integers(0, 60), min_size=1, max_size=8))
    shards[0] += batch  # at least one step in every epoch
    window = draw(st.integers(1, 50))
    return Order(np.array(shards), batch, draw(st.integers(0, 2**63)), lanes, window)


def epoch_samples(order, epoch):
    first = epoch * order.steps_per_epoch
    steps = range(first, first + order.steps_per_epoch)
    return np.concatenate([order.batch(step).sample for step in steps]).tolist()


def even_order(**changed):
    given = {"shard_samples": np.array([50, 50]), "global_batch": 8, "seed": 0}
    return Order(**{**given, "lanes": 4, "window": 16, **changed})


@given(order=orders(), epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_at_most_once_and_all_but_a_tail(order, epoch):
    seen = epoch_samples(order, epoch)
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(order.samples))
    assert 0 <= order.samples - len(seen) < order.global_batch


@given(order=orders(), step=st.integers(0, 40))
def test_shard_and_index_name_the_sample(order, step):
    places = order.batch(step)
    assert (places.index >= 0).all()
    assert (places.index < order.shard_samples[places.shard]).all()
    assert (order.first_sample[places.shard] + places.index == places.sample).all()


@given(order=orders(), step=st.integers(0, 40))
def test_the_ranks_of_every_world_size_share_one_global_batch(order, step):
    whole = order.batch(step).sample.tolist()
    for world in (1, 2, 4, 8, 16):
        if order.lanes % world == 0:
            parts = [order.batch(step, rank, world).sample for rank in range(world)]
            assert np.concatenate(parts).tolist() == whole


def test_worlds_of_one_to_sixteen_see_the_same_batches():
    order = even_order(shard_samples=np.array([70, 30]), global_batch=32, lanes=16)
    for world in (1, 2, 4, 8, 16):
        parts = [order.batch(5, rank, world).sample for rank in range(world)]
        assert {len(part) for part in parts} == {32 // world}
        assert np.concatenate(parts).tolist() == order.batch(5).sample.tolist()


@given(order=orders(), step=st.integers(0, 60))
def test_a_step_reached_by_arithmetic_equals_the_one_reached_in_sequence(order, step):
    walked = [order.batch(s).sample.tolist() for s in range(step + 1)][-1]
    fresh = Order(order.shard_samples, order.global_batch, order.seed, order.lanes, order.window)
    assert fresh.batch(step).sample.tolist() == walked


@given(order=orders(), stops=st.lists(st.integers(1, 12), min_size=1, max_size=4), data=st.data())
def test_a_run_resumed_again_and_again_with_other_worlds_reads_what_one_run_reads(
    order, stops, data
):
    # The state of a resume is the step alone; every life has its own Order and world size.
    worlds = [world for world in (1, 2, 4, 8, 16) if order.lanes % world == 0]
    read, done = [], 0
    for length in stops:
        world = data.draw(st.sampled_from(worlds))
        life = Order(order.shard_samples, order.global_batch, order.seed, order.lanes, order.window)
        for step in range(done, done + length):
            for rank in range(world):
                read += life.batch(step, rank, world).sample.tolist()
        done += length
    unbroken = np.concatenate([order.batch(step).sample for step in range(done)])
    assert read == unbroken.tolist()


def test_the_tail_differs_between_epochs_even_with_one_shard():
    order = even_order(shard_samples=np.array([103]))
    tails = [frozenset(range(103)) - frozenset(epoch_samples(order, e)) for e in range(6)]
    assert all(len(tail) == 7 for tail in tails) and len(set(tails)) == 6


def test_epochs_and_seeds_have_their_own_order():
    first = epoch_samples(even_order(), 0)
    assert first != epoch_samples(even_order(), 1)
    assert first != epoch_samples(even_order(seed=1), 0)
    assert first == epoch_samples(even_order(), 0)


def test_shards_come_in_another_order_in_every_epoch():
    order = even_order(shard_samples=np.full(20, 8), lanes=1, window=8)
    firsts = {tuple(dict.fromkeys(order.batch(20 * e + 3).shard)) for e in range(10)}
    assert len(firsts) > 5


def test_neighbours_on_the_disk_are_apart_within_a_window():
    order = even_order(shard_samples=np.array([1000]), global_batch=10, lanes=1, window=1000)
    gaps = np.abs(np.diff(epoch_samples(order, 0)))
    assert (gaps == 1).mean() < 0.02 and gaps.mean() == pytest.approx(1000 / 3, rel=0.1)


def test_a_batch_comes_from_one_window_of_each_lane():
    order = even_order(shard_samples=np.array([960]), global_batch=16, lanes=4, window=24)
    position = order.batch(3).position.reshape(4, 4)
    windows = (position - np.arange(4)[:, None] * 240) // 24
    assert (windows == 0).all()  # steps 0-5 use the first 24 places of each lane


def test_a_batch_has_its_frozen_places():
    # These literals must never change: they are what a run resumed tomorrow will read.
    order = Order(np.array([13, 40, 27]), 8, 5, 4, 6)
    assert order.batch(0).sample.tolist() == [69, 71, 24, 22, 39, 42, 9, 11]
    assert order.batch(25).sample.tolist() == [17, 18, 39, 34, 57, 55, 79, 77]
    assert order.replacement(3, np.array([0, 1, 2]), 1).sample.tolist() == [12, 42, 51]


def test_a_billion_samples_are_reached_at_once():
    order = Order(np.full(100_000, 10_000), 4096, 0, 64, 131_072)
    places = order.batch(3 * order.steps_per_epoch + 200_000)
    assert len(set(places.sample.tolist())) == 4096
    assert order.epoch_of(3 * order.steps_per_epoch + 200_000) == 3


@given(order=orders(), step=st.integers(0, 40), attempt=st.integers(1, 5))
def test_a_replacement_is_deterministic_and_a_sample_of_the_set(order, step, attempt):
    position = order.batch(step).position
    once, again = (order.replacement(step, position, attempt).sample for _ in range(2))
    assert once.tolist() == again.tolist()
    assert len(set(once.tolist())) == len(once)  # a bijection: no two stand-ins are the same
    assert set(once.tolist()) <= set(range(order.samples))


def test_every_attempt_and_every_epoch_has_its_own_replacements():
    order, position = even_order(), np.arange(8)
    kinds = [
        tuple(order.replacement(step, position, attempt).sample)
        for step in (0, order.steps_per_epoch)
        for attempt in (1, 2)
    ]
    assert len(set(kinds)) == 4


def test_a_replacement_for_the_epoch_before_is_still_right():
    order = even_order()
    expected = order.replacement(1, np.array([4]), 1).sample
    for epoch in range(5):
        order.batch(epoch * order.steps_per_epoch)
    assert order.replacement(1, np.array([4]), 1).sample == expected


def test_a_batch_larger_than_the_data_is_an_input_error():
    with pytest.raises(InputError, match=r"batch of 128 is larger than the data, which has 100 "):
        even_order(global_batch=128)


def test_lanes_that_do_not_divide_the_batch_are_an_input_error():
    with pytest.raises(InputError, match=r"batch of 8 cannot be cut into 3 lanes"):
        even_order(lanes=3)


def test_a_world_that_does_not_divide_the_lanes_is_an_input_error_that_lists_the_fitting():
    with pytest.raises(InputError, match=r"3 processes cannot share 4 lanes .* one of \[1, 2, 4\]"):
        even_order().batch(0, rank=0, world=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lanes", 0), ("lanes", -2), ("window", 0), ("global_batch", 0), ("seed", -1)],
)
def test_numbers_below_their_least_are_input_errors(name, value):
    with pytest.raises(InputError, match=f"{value}: give a number of at least"):
        even_order(**{name: value})


@pytest.mark.parametrize(("batch", "lanes"), [(256, 64), (48, 48), (96, 48), (250, 50), (67, 1)])
def test_default_lanes_are_the_largest_divisor_up_to_64(batch, lanes):
    assert default_lanes(batch) == lanes


@given(order=orders(), step=st.integers(0, 60), steps=st.integers(1, 20))
def test_the_shards_ahead_are_those_of_the_coming_batches_by_first_use(order, step, steps):
    world = min(order.lanes, 2)
    for rank in range(world):
        used = []
        for ahead in range(step, step + steps):
            used += order.batch(ahead, rank, world).shard.tolist()
        assert order.shards_ahead(step, steps, rank, world).tolist() == list(dict.fromkeys(used))


def test_what_is_kept_of_epochs_does_not_grow_with_them():
    order = Order(np.full(10, 40), 8, 3, 2, 400)
    for epoch in range(6):
        order.batch(epoch * order.steps_per_epoch, 0, 1)
    assert len(order._epoch_cache) <= 3
