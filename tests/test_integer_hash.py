import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.integer_hash import hash_of, mix, permute, uniform

U64 = np.uint64

# The literals in this file must never change: every run's order and views hang on them.


def test_mix_has_its_frozen_values():
    values = mix(np.array([0, 1, 2**64 - 1], dtype=U64))
    assert [hex(value) for value in values] == ["0x0", "0x5692161d100b05e5", "0xb4d055fcf2cbbd7b"]


def test_hash_has_its_frozen_values():
    assert hash_of(0)[0] == 0xE220A8397B1DCDAF  # the published first output of splitmix64
    values = hash_of(7, np.arange(3), 9)
    expected = [0x71F0A5372EFC45FD, 0x7D3CEF7D966B0CAF, 0xA62AEAC7B2CFABD9]
    assert values.tolist() == expected


def test_permute_has_its_frozen_values():
    assert permute(np.arange(10, dtype=U64), 10, U64(42)).tolist() == [
        *(2, 8, 7, 3, 0, 4, 5, 6, 9, 1)
    ]
    large = permute(np.array([0, 1, 999_999_999], dtype=U64), 10**9, U64(3))
    assert large.tolist() == [745477103, 382429574, 361020266]


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_every_size(size, key):
    image = permute(np.arange(size, dtype=U64), size, U64(key))
    assert sorted(image.tolist()) == list(range(size))


@given(size=st.integers(2**33, 2**53), key=st.integers(0, 2**64 - 1))
def test_permute_stays_inside_and_apart_in_huge_ranges(size, key):
    places = np.concatenate([np.arange(50), size - 1 - np.arange(50)]).astype(U64)
    image = permute(places, size, U64(key))
    assert image.max() < size and len(set(image.tolist())) == len(places)


def test_permute_takes_a_size_and_a_key_for_each_place():
    sizes, keys = np.array([7, 1, 1000], dtype=U64), np.array([3, 4, 5], dtype=U64)
    together = permute(np.zeros(3, dtype=U64), sizes, keys)
    alone = [permute(np.zeros(1, dtype=U64), s, k)[0] for s, k in zip(sizes, keys, strict=True)]
    assert together.tolist() == alone


def test_another_key_gives_another_permutation():
    places = np.arange(1000, dtype=U64)
    same = (permute(places, 1000, U64(1)) == permute(places, 1000, U64(2))).mean()
    assert same < 0.01


def test_permute_sends_a_place_anywhere_with_equal_chance():
    places = permute(np.full(20_000, 3, dtype=U64), 10, hash_of(np.arange(20_000)))
    shares = np.bincount(places.astype(int), minlength=10) / 20_000
    assert np.abs(shares - 0.1).max() < 0.01


def test_uniform_fills_the_unit_interval_evenly():
    values = uniform(hash_of(11, np.arange(100_000)))
    assert 0 <= values.min() < 1e-4 and 1 - 1e-4 < values.max() < 1
    assert values.mean() == pytest.approx(0.5, abs=0.003)
    assert values.var() == pytest.approx(1 / 12, abs=0.001)


def test_uniform_is_below_one_for_the_largest_hash():
    assert uniform(np.array([0, 2**64 - 1], dtype=U64)).tolist() == [0.0, 1 - 2**-53]


def test_one_changed_bit_of_a_part_changes_half_of_the_bits():
    numbers = np.arange(2000)
    changed = hash_of(5, numbers) ^ hash_of(5, numbers ^ 1)
    assert np.unpackbits(changed.view(np.uint8)).mean() == pytest.approx(0.5, abs=0.01)


def test_the_order_of_the_parts_matters():
    assert hash_of(1, 2) != hash_of(2, 1) and hash_of(1) != hash_of(1, 0)


def test_parts_broadcast_against_each_other():
    table = hash_of(np.arange(3)[:, None], np.arange(4))
    assert table.shape == (3, 4)
    assert table[2, 1] == hash_of(2, 1)[0]
