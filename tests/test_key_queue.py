"""The queue against a Python list."""

import math

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


def push_rank_by_rank(length, batch, steps, pushes_at_once):
    """What a queue holds after keys that say their step and rank."""
    queue = KeyQueue(length, 2, seed=0, overlaps=pushes_at_once > 0)
    rank = torch.distributed.get_rank()
    for step in range(steps):
        queue.push(numbered_keys(100 * step + 10 * rank, batch))
        if pushes_at_once and step % pushes_at_once == pushes_at_once - 1:
            queue.settle()
    queue.settle()
    return queue.rows_KD.tolist(), queue.place


@pytest.mark.parametrize("pushes_at_once", [0, 1, 2, 5])
@pytest.mark.parametrize(("length", "batch"), [(12, 3), (7, 2), (5, 4)])
def test_keys_of_all_ranks_stand_in_every_queue_in_the_order_of_the_ranks(
    length, batch, pushes_at_once
):
    first, second = run_in_processes(2, push_rank_by_rank, length, batch, 5, pushes_at_once)
    alone = KeyQueue(length, 2, seed=0)
    for step in range(5):
        alone.push(torch.cat([numbered_keys(100 * step + 10 * rank, batch) for rank in range(2)]))
    assert first == second == (alone.rows_KD.tolist(), alone.place)


def steps_with(settings, steps):
    """Losses, gradients and rows of some steps, in the order of train.py."""
    queue, rank = KeyQueue(21, 6, seed=0, **settings), torch.distributed.get_rank()
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * step + rank)
        query_ND = torch.randn(4, 6, generator=generator, requires_grad=True)
        key_ND = torch.randn(4, 6, generator=generator)
        loss, _ = queue.contrast([(query_ND, key_ND), (query_ND, -key_ND)], 0.2, None, step)
        loss.backward()
        queue.settle()
        found.append((loss.detach(), query_ND.grad, queue.rows_KD.clone()))
    return found


def test_an_overlapping_gather_gives_the_same_bits():
    plain = run_in_processes(2, steps_with, {}, 12)
    overlapping = run_in_processes(2, steps_with, {"overlaps": True}, 12)
    torch.testing.assert_close(overlapping, plain, rtol=0, atol=0)


def test_a_queue_in_bfloat16_holds_rounded_keys_and_the_loss_is_that_of_them():
    rows = torch.nn.functional.normalize(torch.randn(16, 6), dim=1)
    half, whole = KeyQueue(8, 6, 0, torch.bfloat16), KeyQueue(8, 6, 0)
    half.push(rows)
    whole.push(rows.bfloat16().float())
    assert half.rows_KD.dtype == torch.bfloat16
    torch.testing.assert_close(half.rows_KD.float(), whole.rows_KD, rtol=0, atol=0)
    query_ND = torch.nn.functional.normalize(torch.randn(4, 6), dim=1)
    losses = [queue.contrast([(query_ND, -query_ND)], 0.1, None, 0)[0] for queue in (half, whole)]
    torch.testing.assert_close(*losses)
    assert losses[0].dtype == torch.float32


def test_no_two_pushes_that_are_on_their_way_write_the_same_row(monkeypatch):
    on_their_way = []

    def begin(key_ND, out_BD):
        on_their_way.append(len(out_BD))

        def wait():
            out_BD.copy_(key_ND)
            on_their_way.pop(0)

        return wait

    monkeypatch.setattr("model.key_queue.begin_gather", begin)
    queue, most = KeyQueue(7, 2, seed=0, overlaps=True), 0
    for step in range(9):
        queue.push(numbered_keys(3 * step, 3))
        assert sum(on_their_way) <= 7
        most = max(most, sum(on_their_way))
    queue.settle()
    assert most == 6 and on_their_way == []
    assert oldest_first(queue) == numbered_keys(20, 7).tolist()


def test_a_loss_at_chance_is_the_log_of_the_candidates():
    queue = KeyQueue(8, 4, seed=0)
    expected = math.log(queue.candidates(3))
    loss, _ = queue.contrast([(torch.zeros(3, 4), torch.zeros(3, 4))], 0.1, None, 0)
    assert loss.item() == pytest.approx(expected)
