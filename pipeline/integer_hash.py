"""Our own integer hash and bijection: everything random in the data path is drawn from these.

A library's generator may change its stream between versions, and has a state that must be saved.
A hash of a counter has neither: the value for (seed, epoch, sample, view, draw) is the same on
every machine, in every order, for every number of processes. Frozen by test vectors.
"""

import numpy as np
from numpy.typing import NDArray

U64 = np.uint64
UInts = NDArray[np.uint64]

FEISTEL_ROUNDS = 6


def mix(value: UInts) -> UInts:
    """Scatter 64 bits (the finaliser of splitmix64, Steele et al. 2014); a bijection."""
    value = (value ^ (value >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> U64(27))) * U64(0x94D049BB133111EB)
    return value ^ (value >> U64(31))


def hash_of(*parts: int | UInts) -> UInts:
    """64 random bits for each combination of the parts, which broadcast against each other."""
    state = np.zeros(1, dtype=U64)
    for part in parts:
        part = np.atleast_1d(np.asarray(part, dtype=U64))  # numpy warns of overflow in scalars only
        state = mix((state + U64(0x9E3779B97F4A7C15)) ^ mix(part))
    return state


def uniform(bits: UInts) -> NDArray[np.float64]:
    """Doubles in [0, 1) from the upper 53 bits."""
    return (bits >> U64(11)).astype(np.float64) * 2.0**-53


def permute(place: UInts, size: int | UInts, key: UInts) -> UInts:
    """Where a keyed bijection of ``range(size)`` sends each place.

    A Feistel network over the next power of two, with its two halves one bit apart at most; a
    result outside the range goes through again until it falls inside ("cycle walking"), which is
    still a bijection and takes less than two passes on average.

    Args:
        place: integers below ``size``.
        size: one for all, or one for each place; every size at least 1.
        key: one for all, or one for each place.
    """
    place, size, key = np.broadcast_arrays(
        np.asarray(place, dtype=U64), np.asarray(size, dtype=U64), np.asarray(key, dtype=U64)
    )
    result = place.copy()
    bits = np.frexp(np.maximum(size.astype(np.float64) - 1, 0))[1].astype(U64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():
        result[outside] = _feistel(result[outside], bits[outside], key[outside])
        outside = result >= size
    return result


def _feistel(value: UInts, bits: UInts, key: UInts) -> UInts:
    low_bits = bits // U64(2)
    low_mask = (U64(1) << low_bits) - U64(1)
    high_mask = (U64(1) << (bits - low_bits)) - U64(1)
    high, low = value >> low_bits, value & low_mask
    for number in range(FEISTEL_ROUNDS):
        round_key = key + U64(number * 0x9E3779B97F4A7C15 % 2**64)
        if number % 2:
            low = low ^ (mix(high ^ round_key) & low_mask)
        else:
            high = high ^ (mix(low ^ round_key) & high_mask)
    joined: UInts = (high << low_bits) | low
    return joined
