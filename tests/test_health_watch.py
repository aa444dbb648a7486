"""Looks at the dictionary: when, at what, and what a constant encoder leads to."""

import math

import pytest
import torch
import torch.nn.functional as F

from eval.alarms import Alarms
from eval.health_watch import HealthWatch, bars, describe
from model.encoder import EncoderConfig
from model.end_to_end import BatchKeys, EndToEnd
from model.key_queue import KeyQueue
from model.memory_bank import MemoryBank
from model.moco import MoCo, MoCoConfig

CONFIG = MoCoConfig(queue=32, batch_norm_groups=1)


def unit(rows, seed, dim=16):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator), dim=1)


def pairs_of(step, count=1):
    return [(unit(8, 100 * step + n), unit(8, 100 * step + 50 + n)) for n in range(count)]


@pytest.fixture(scope="module")
def moco():
    torch.manual_seed(0)
    return MoCo(EncoderConfig(backbone="test_resnet", dim=16), CONFIG, global_batch=8, seed=0)


def looks(watch, moco, dictionary, *, steps, pairs=pairs_of, labels=lambda _: range(8)):
    """What is found at each step, as a loop would do it."""
    for step in range(steps):
        made = pairs(step)
        samples = range(8 * step % 16, 8 * step % 16 + 8)
        watch.look(step, made, dictionary, samples, labels(step))
        if isinstance(dictionary, KeyQueue):
            for _, key_ND in made:
                dictionary.push(key_ND)
        yield watch.read(moco)


def test_it_looks_at_due_steps_once_something_is_in_the_queue(moco):
    found = list(looks(HealthWatch(2, 8, 1), moco, KeyQueue(32, 16, 0), steps=7))
    assert [bool(look) for look in found] == [False, True, False, True, False, True, False]
    assert [look["oldest_key_steps"] for look in found if look] == [1, 3, 4]
    assert [look["queue_filled_share"] for look in found if look] == [0.25, 0.75, 1]
    first = list(looks(HealthWatch(1, 8, 1), moco, KeyQueue(32, 16, 0), steps=2))
    assert [bool(look) for look in first] == [False, True]


def test_it_never_looks_when_it_is_off(moco):
    assert not any(looks(HealthWatch(0, 8, 1), moco, KeyQueue(32, 16, 0), steps=5))


def test_own_keys_are_looked_at_before_they_are_negatives(moco):
    def same(step):
        query_ND = unit(8, step)
        return [(query_ND, query_ND)]

    found = list(looks(HealthWatch(1, 8, 1), moco, KeyQueue(32, 16, 0), steps=4, pairs=same))
    assert found[-1]["positive_similarity"] == pytest.approx(1)
    assert found[-1]["positive_counts"][-1] == 8
    assert found[-1]["negative_counts"][-1] == 0


def test_a_symmetric_loss_fills_the_queue_twice_as_fast(moco):
    def both(step):
        return pairs_of(step, 2)

    found = list(looks(HealthWatch(1, 8, 1), moco, KeyQueue(32, 16, 0), steps=5, pairs=both,
                       labels=lambda step: [min(step, 3)] * 8))  # fmt: skip
    assert [look["oldest_key_steps"] for look in found[1:]] == [1, 2, 2, 2]
    assert found[-1]["false_negative_share"] == pytest.approx(1 / 2)  # of keys of steps 2 and 3


def test_ranks_know_the_labels_of_their_own_part(moco):
    found = list(looks(HealthWatch(1, 16, 2), moco, KeyQueue(32, 16, 0), steps=5,
                       labels=lambda step: [min(step, 3)] * 8))  # fmt: skip
    assert found[-1]["false_negative_share"] == pytest.approx(1 / 2)  # of keys of steps 2 and 3
    assert found[-1]["oldest_key_steps"] == 2


def test_a_memory_bank_is_looked_at_once_it_has_no_random_entries(moco):
    bank = MemoryBank(16, 16, drawn=4, momentum=0.5, seed=0)
    bank.rows_SD.copy_(unit(16, 7))
    found = list(looks(HealthWatch(1, 8, 1), moco, bank, steps=4))
    assert [bool(look) for look in found] == [False, False, True, True]
    query_ND = pairs_of(3)[0][0]
    expected = (query_ND * bank.rows_SD[8:16]).sum(dim=1).mean().item()
    assert found[3]["positive_similarity"] == pytest.approx(expected)
    assert "key_age_steps" not in found[3]
    assert describe(found[3])


def test_without_key_encoder_and_queue_there_is_no_age_and_no_distance():
    torch.manual_seed(0)
    network = EndToEnd(EncoderConfig(backbone="test_resnet", dim=16), CONFIG, 8, 0)
    (found,) = looks(HealthWatch(1, 8, 1), network, BatchKeys(), steps=1)
    assert "encoder_distance" not in found and "key_age_steps" not in found
    assert [name for name, _ in describe(found)] == ["keys span", "uniformity", "own key",
                                                     "other keys"]  # fmt: skip


@pytest.mark.parametrize("mechanism", ["queue", "batch"])
def test_a_constant_encoder_raises_the_alarm_of_collapse(moco, mechanism):
    def constant(_):
        same_ND = unit(1, 5).repeat(8, 1)
        return [(same_ND, same_ND)]

    dictionary = KeyQueue(32, 16, 0) if mechanism == "queue" else BatchKeys()
    alarms = Alarms(math.log(33), 32, 1000, settled_step=8)
    raised = [
        (step, alarm.name)
        for step, look in enumerate(looks(HealthWatch(1, 8, 1), moco, dictionary, steps=20,
                                          pairs=constant), start=1)
        if look
        for alarm in alarms.look(step, {**look, "loss": math.log(33)})
    ]  # fmt: skip
    assert raised == [(10, "collapse")]


def test_the_distance_is_that_of_the_two_encoders():
    moved = MoCo(EncoderConfig(backbone="test_resnet", dim=16), CONFIG, global_batch=8, seed=0)
    for key, query in zip(moved.encoder_k.parameters(), moved.encoder_q.parameters(), strict=True):
        key.data.copy_(0.75 * query.data)
    found = list(looks(HealthWatch(1, 8, 1), moved, KeyQueue(32, 16, 0), steps=2))
    assert found[1]["encoder_distance"] == pytest.approx(0.25)


def test_bars_show_the_shape_of_a_histogram():
    assert bars([0, 0, 1, 1, 8, 8, 16, 16]) == "-1│ ▁▄█│1"
    assert bars([0.0] * 4) == "-1│  │1"
