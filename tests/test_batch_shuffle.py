"""The shuffle of the keys among the ranks, against the official gather form."""

import pytest
import torch

from model.batch_shuffle import make_shuffle
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
