"""What ranks tell each other: nothing in one process, the truth in two."""

import pytest
import torch

from model.collectives import all_equal, average, exchange, gather, rank, world_size
from tests.run_in_processes import run_in_processes


def talk(own_rows):
    """Everything at once, from rows that say their rank."""
    rows_N = torch.tensor(own_rows[rank()])
    into_B = torch.zeros(5, 2)
    gather(rows_N, out_B=into_B[1:])
    averaged = rows_N.clone()
    average([averaged])
    counts = ([0, 2], [1, 1])[rank()]
    came = exchange(rows_N, counts, ([0, 1], [2, 1])[rank()])
    return gather(rows_N).tolist(), into_B.tolist(), averaged.tolist(), came.tolist()


def test_two_processes_gather_average_and_exchange_in_the_order_of_the_ranks():
    own_rows = ([[0.0, 1.0], [2.0, 3.0]], [[4.0, 5.0], [6.0, 7.0]])
    first, second = run_in_processes(2, talk, own_rows)
    everything = [*own_rows[0], *own_rows[1]]
    mean = [[2.0, 3.0], [4.0, 5.0]]
    assert first == (everything, [[0.0, 0.0], *everything], mean, [own_rows[1][0]])
    assert second == (everything, [[0.0, 0.0], *everything], mean, [*own_rows[0], own_rows[1][1]])


def compare(tensors_by_rank):
    return all_equal(tensors_by_rank[rank()])


ALIKE = [
    torch.linspace(-1, 1, 21).view(7, 3),
    torch.arange(4),
    torch.tensor(5),
    torch.zeros(2, dtype=torch.bfloat16),
]
DIFFERENT = {
    "the last bit of a float": (torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0 + 2**-23])),
    "the sign of zero": (torch.tensor([0.0, 0.0]), torch.tensor([0.0, -0.0])),
    "the sign of a double": (torch.tensor([0.0, 3.0]).double(), torch.tensor([0.0, -3.0]).double()),
    "two values swapped": (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 3.0, 2.0])),
    "a count": (torch.tensor(5), torch.tensor(6)),
    "half a float": (torch.ones(3).half(), torch.tensor([1.0, 1.0, 1.001]).half()),
    "a truth": (torch.tensor([True, False]), torch.tensor([True, True])),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_all_equal_detects_a_difference_of(what):
    first, second = DIFFERENT[what]
    assert run_in_processes(2, compare, [[*ALIKE, first], [*ALIKE, second]]) == [False, False]


def test_all_equal_finds_no_difference_where_there_is_none():
    both = [*ALIKE, *(first for first, _ in DIFFERENT.values())]
    assert run_in_processes(2, compare, [both, both]) == [True, True]


def test_one_process_is_alone_with_its_rows():
    rows_N = torch.randn(3, 2)
    kept = rows_N.clone()
    average([rows_N])
    assert (rank(), world_size()) == (0, 1)
    assert torch.equal(rows_N, kept)
    assert torch.equal(gather(rows_N), kept)
    assert torch.equal(exchange(rows_N, [3], [3]), kept)
    assert all_equal([rows_N])
