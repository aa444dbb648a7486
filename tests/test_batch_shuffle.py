"""The shuffle of the keys among the ranks, against the official gather form."""

import pytest
import torch

from model.batch_norm import SplitBatchNorm
from model.batch_shuffle import make_local_shuffle, make_shuffle
from model.collectives import gather, rank, world_size
from tests.run_in_processes import run_in_processes

CPU = torch.device("cpu")


def rows_of(batch, own):
    """Global row numbers of a rank, as pictures that hold nothing but their number."""
    return torch.arange(own * batch, (own + 1) * batch).float().view(batch, 1, 1, 1)


def shuffle_steps(batch, seed, steps):
    """For each step: the shuffled global batch, and whether both ways equal the official form."""
    found = []
    for step in range(steps):
        shuffle = make_shuffle(batch, seed, step, CPU)
        rows_N = rows_of(batch, rank())
        shuffled_N = shuffle.apply(rows_N)
        permutation_B = gather(shuffled_N).view(-1).long()
        found.append(
            {
                "permutation": permutation_B.tolist(),
                "apply": torch.equal(shuffled_N, official_shuffle(rows_N, permutation_B)),
                "undo": torch.equal(shuffle.undo(shuffled_N), rows_N),
                "undo_official": torch.equal(
                    shuffle.undo(-shuffled_N), official_unshuffle(-shuffled_N, permutation_B)
                ),
            }
        )
    return found


def official_shuffle(rows_N, permutation_B):
    """``_batch_shuffle_ddp``: gather everything, keep this rank's slice of the permutation."""
    return gather(rows_N)[permutation_B.view(world_size(), -1)[rank()]]


def official_unshuffle(rows_N, permutation_B):
    """``_batch_unshuffle_ddp``."""
    return gather(rows_N)[torch.argsort(permutation_B).view(world_size(), -1)[rank()]]


@pytest.mark.parametrize(("world", "batch"), [(1, 8), (2, 1), (2, 8), (4, 6)])
def test_shuffle_and_its_inverse_equal_the_official_gather_form(world, batch):
    if world == 1:
        ranks = [shuffle_steps(batch, 7, 5)]
    else:
        ranks = run_in_processes(world, shuffle_steps, batch, 7, 5)
    for step in range(5):
        (permutation,) = {tuple(found[step]["permutation"]) for found in ranks}
        assert sorted(permutation) == list(range(world * batch))
        for found in ranks:
            assert found[step]["apply"]
            assert found[step]["undo"]
            assert found[step]["undo_official"]


def test_the_global_order_is_the_same_for_any_number_of_processes():
    alone = shuffle_steps(8, 7, 3)
    two = run_in_processes(2, shuffle_steps, 4, 7, 3)[0]
    assert [step["permutation"] for step in alone] == [step["permutation"] for step in two]


def test_every_step_and_every_seed_has_an_order_of_its_own():
    orders = {
        tuple(step["permutation"]) for seed in range(5) for step in shuffle_steps(16, seed, 20)
    }
    assert len(orders) == 100


def test_the_global_generator_is_not_touched():
    before = torch.get_rng_state()
    make_shuffle(8, 0, 0, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def key_statistics(batch, steps):
    """What batch norm of this rank sees of pictures that hold the number of their rank."""
    found = []
    for step in range(steps):
        norm = SplitBatchNorm(1, groups=1)
        norm.momentum = 1.0
        own_N = torch.full((batch, 1, 1, 1), float(rank()))
        shuffle = make_shuffle(batch, 7, step, CPU)
        shuffled_N = shuffle.apply(own_N)
        norm(shuffled_N)
        back_N = shuffle.undo(shuffled_N)
        found.append((norm.running_mean.item(), (shuffled_N == rank()).float().mean().item()))
        assert torch.equal(back_N, own_N)
    return found


def test_the_statistics_of_a_rank_s_keys_come_from_the_pictures_of_all_ranks():
    ranks = run_in_processes(4, key_statistics, 32, 20)
    for own, found in enumerate(ranks):
        means, own_shares = zip(*found, strict=True)
        # Of its own pictures alone the mean were its number, of all ranks' it is 1.5.
        assert sum(means) / 20 == pytest.approx(1.5, abs=0.2), own
        assert sum(own_shares) / 20 == pytest.approx(0.25, abs=0.05)
        assert max(own_shares) < 0.6


def gradient_of_the_way(make):
    """Gradients of rows that went through the shuffle, and of those that also came back."""
    rows_N = (rows_of(8, rank()) + 1).requires_grad_()
    shuffle = make(8, 7, 3, CPU)
    there_N = shuffle.apply(rows_N)
    (there_N.square() / 2).sum().backward()
    there, rows_N.grad = rows_N.grad.clone(), None
    (shuffle.undo(shuffle.apply(rows_N)) * rows_N.detach()).sum().backward()
    return torch.equal(there, rows_N), torch.equal(rows_N.grad, rows_N)


def gradients_of_both():
    return gradient_of_the_way(make_shuffle), gradient_of_the_way(make_local_shuffle)


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_go_back_to_the_rows_that_they_belong_to(world):
    ranks = [gradients_of_both()] if world == 1 else run_in_processes(2, gradients_of_both)
    assert ranks == [((True, True), (True, True))] * world


def local_rows(step):
    shuffle = make_local_shuffle(8, 7, step, CPU)
    shuffled_N = shuffle.apply(rows_of(8, rank()))
    assert torch.equal(shuffle.undo(shuffled_N), rows_of(8, rank()))
    return shuffled_N.flatten().tolist()


def test_a_local_shuffle_keeps_each_rank_s_pictures_and_mixes_them():
    first, second = run_in_processes(2, local_rows, 0)
    assert (sorted(first), sorted(second)) == (list(range(8)), list(range(8, 16)))
    assert first != sorted(first)
    assert [row - 8 for row in second] != first
    assert local_rows(0) != local_rows(1)


def test_the_second_view_of_a_step_has_an_order_of_its_own():
    rows_N = rows_of(16, 0)
    first, second = (make_shuffle(16, 7, 0, CPU, view=view).apply(rows_N) for view in (0, 1))
    assert not torch.equal(first, second)
    assert not torch.equal(second, make_shuffle(16, 7, 1, CPU).apply(rows_N))
