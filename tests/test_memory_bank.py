"""The memory bank against a slow form of it, and its draw."""

import pytest
import torch
import torch.nn.functional as F

from model.collectives import all_equal, average, rank, world_size
from model.encoder import EncoderConfig
from model.memory_bank import BankEncoder, MemoryBank, draw_negatives, hashed
from model.moco import MoCoConfig
from tests.run_in_processes import run_in_processes

SAMPLES, DIM, DRAWN, BATCH, T = 40, 6, 9, 8, 0.2


def unit_rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, DIM, generator=generator, dtype=torch.float64)
    return F.normalize(rows, dim=1)


def samples_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randperm(SAMPLES, generator=generator)[:BATCH]


def slow_bank(steps, momentum):
    """Losses, accuracies and entries of a bank in loops over pictures and entries."""
    bank = MemoryBank(SAMPLES, DIM, drawn=DRAWN, seed=3).double()
    entries, found = list(bank.rows_SD.clone()), []
    for step in range(steps):
        samples = samples_of(step).tolist()
        drawn = draw_negatives(SAMPLES, torch.tensor(samples), DRAWN, 3, step).tolist()
        query_ND = unit_rows(BATCH, step).requires_grad_()
        losses, hits = [], 0
        for query_D, sample in zip(query_ND, samples, strict=True):
            own = torch.dot(query_D, entries[sample]) / T
            others = [torch.dot(query_D, entries[other]) / T for other in drawn]
            losses.append(-own + torch.stack([own, *others]).exp().sum().log())
            hits += all(own > other for other in others)
        loss = sum(losses) / BATCH
        (gradient,) = torch.autograd.grad(loss, query_ND)
        for query_D, sample in zip(query_ND.detach(), samples, strict=True):
            moved = momentum * entries[sample] + (1 - momentum) * query_D
            entries[sample] = moved / moved.norm()
        found.append((loss.item(), hits / BATCH, gradient))
    return found, torch.stack(entries)


def fast_bank(steps, momentum):
    """The same of the project's own, on this rank's share."""
    bank = MemoryBank(SAMPLES, DIM, drawn=DRAWN, momentum=momentum, seed=3).double()
    share = BATCH // world_size()
    own = slice(rank() * share, (rank() + 1) * share)
    found = []
    for step in range(steps):
        query_ND = unit_rows(BATCH, step)[own].requires_grad_()
        pairs = [(query_ND, query_ND.detach())]
        loss, accuracy = bank.contrast(pairs, T, samples_of(step)[own].numpy(), step)
        (gradient,) = torch.autograd.grad(loss, query_ND)
        means = [loss.detach(), accuracy]
        average(means)
        found.append((means[0].item(), means[1].item(), gradient / world_size()))
    return found, bank.rows_SD, all_equal([bank.rows_SD])


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_losses_gradients_and_entries_are_those_of_the_slow_form(world, momentum):
    expected, entries = slow_bank(12, momentum)
    ranks = (
        [fast_bank(12, momentum)]
        if world == 1
        else run_in_processes(world, fast_bank, 12, momentum)
    )
    for found, rows_SD, is_equal in ranks:
        torch.testing.assert_close(rows_SD, entries)
        assert is_equal
        for step, (loss, accuracy, _) in enumerate(found):
            assert loss == pytest.approx(expected[step][0])
            assert accuracy == pytest.approx(expected[step][1])
    for step in range(12):
        gradient = torch.cat([found[step][2] for found, _, _ in ranks])
        torch.testing.assert_close(gradient, expected[step][2])


def test_no_negative_is_of_a_picture_in_the_batch_and_every_other_one_is_met():
    met = torch.zeros(SAMPLES)
    for step in range(200):
        own_B = samples_of(step)
        drawn_K = draw_negatives(SAMPLES, own_B, 100, 0, step)
        assert not set(drawn_K.tolist()) & set(own_B.tolist())
        met += torch.bincount(drawn_K, minlength=SAMPLES)
    assert met.sum() == 200 * 100
    assert met.min() / met.mean() > 0.8
    assert met.max() / met.mean() < 1.2


def test_a_picture_that_stands_twice_in_a_batch_is_left_out_once():
    drawn_K = draw_negatives(5, torch.tensor([4, 1, 1]), 500, 0, 0)
    assert set(drawn_K.tolist()) <= {0, 2, 3}
    assert len(set(drawn_K.tolist())) == 2


def test_the_draw_is_a_function_of_seed_and_step():
    own_B = torch.tensor([3, 7])
    draws = {
        tuple(draw_negatives(1000, own_B, 16, seed, step).tolist())
        for seed in range(5)
        for step in range(20)
    }
    assert len(draws) == 100
    again = draw_negatives(1000, own_B, 16, 4, 19).tolist()
    assert tuple(again) in draws


def slow_hash(number, seed):
    """With Python's own integers."""
    mixed = (number * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95 + 1) % 2**64
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
    return (mixed ^ mixed >> 31) >> 2


def test_the_hash_is_that_of_python_s_integers():
    numbers = [0, 1, 2, 65_535, 10**12, 2**62 + 12345]
    for seed in (0, 1, 12_345_678):
        found = hashed(torch.tensor(numbers), seed).tolist()
        assert found == [slow_hash(number, seed) for number in numbers]


def test_of_a_picture_that_stands_twice_the_first_row_moves_its_entry():
    bank = MemoryBank(5, DIM, drawn=2, momentum=0.0).double()
    rows = unit_rows(3, seed=1)
    before = bank.rows_SD.clone()
    bank.move(torch.tensor([2, 4, 2]), rows)
    torch.testing.assert_close(bank.rows_SD[2], rows[0])
    torch.testing.assert_close(bank.rows_SD[4], rows[1])
    torch.testing.assert_close(bank.rows_SD[[0, 1, 3]], before[[0, 1, 3]])


def test_the_encoder_of_a_bank_puts_its_queries_into_it():
    torch.manual_seed(0)
    encoder = EncoderConfig(backbone="test_resnet", dim=8)
    config = MoCoConfig(mechanism="memory-bank", batch_norm_groups=2, symmetric=True)
    network = BankEncoder(encoder, config, global_batch=4, seed=0)
    pairs = network(*torch.randn(2, 4, 3, 32, 32), 0)
    assert [name for name, _ in network.named_children()] == ["encoder_q"]
    assert len(pairs) == 2
    for query_ND, key_ND in pairs:
        assert query_ND.requires_grad
        assert not key_ND.requires_grad
        assert torch.equal(query_ND, key_ND)
