"""The queue against a Python list."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.key_queue import KeyQueue
from tests.run_in_processes import run_in_processes


def oldest_first(queue):
    return torch.roll(queue.rows_KD, -queue.place, dims=0).tolist()


def numbered_keys(first, count):
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(count, 2)


@settings(deadline=None, max_examples=150)
@given(length=st.integers(1, 12), batches=st.lists(st.integers(1, 30), max_size=8))
def test_keeps_the_newest_keys_in_order_whether_or_not_the_batch_divides_the_length(
    length, batches
):
    queue, pushed = KeyQueue(length, 2, seed=0), 0
    expected = queue.rows_KD.tolist()
    for count in batches:
        key_ND = numbered_keys(pushed, count)
        queue.push(key_ND)
        pushed += count
        expected = (expected + key_ND.tolist())[-length:]
        assert oldest_first(queue) == expected
    assert queue.place == pushed % length


def test_starts_with_unit_vectors_that_are_a_function_of_the_seed():
    rows_KD = KeyQueue(300, 16, seed=5).rows_KD
    torch.testing.assert_close(rows_KD.norm(dim=1), torch.ones(300))
    assert torch.equal(rows_KD, KeyQueue(300, 16, seed=5).rows_KD)
    assert not torch.equal(rows_KD, KeyQueue(300, 16, seed=6).rows_KD)


def test_the_seed_does_not_touch_the_global_generator():
    before = torch.get_rng_state()
    KeyQueue(8, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_push_writes_in_place_and_keeps_the_precision_of_the_queue():
    queue = KeyQueue(8, 4, seed=0)
    address = queue.rows_KD.data_ptr()
    queue.push(torch.ones(3, 4, dtype=torch.bfloat16, requires_grad=True))
    assert queue.rows_KD.data_ptr() == address
    assert queue.rows_KD.dtype == torch.float32
    assert not queue.rows_KD.requires_grad


def push_rank_by_rank(length, batch, steps):
    """What a queue holds after keys that say their step and rank."""
    queue, rank = KeyQueue(length, 2, seed=0), torch.distributed.get_rank()
    for step in range(steps):
        queue.push(numbered_keys(100 * step + 10 * rank, batch))
    return queue.rows_KD.tolist(), queue.place


@pytest.mark.parametrize(("length", "batch"), [(12, 3), (7, 2), (5, 4)])
def test_keys_of_all_ranks_stand_in_every_queue_in_the_order_of_the_ranks(length, batch):
    first, second = run_in_processes(2, push_rank_by_rank, length, batch, 5)
    alone = KeyQueue(length, 2, seed=0)
    for step in range(5):
        alone.push(torch.cat([numbered_keys(100 * step + 10 * rank, batch) for rank in range(2)]))
    assert first == second == (alone.rows_KD.tolist(), alone.place)
