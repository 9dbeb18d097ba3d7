"""Random draws as functions of (seed, purpose, position).

A draw does not depend on earlier draws. So a resumed run repeats and skips nothing, and the number of GPUs, workers or
micro-batches changes no draw. Draws use integer hashing only, because a library may change the stream of a generator.
"""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """The purposes of draws. Every checkpoint depends on these numbers: never reuse or reorder them."""

    SHARD_ORDER = 1
    WINDOW_ORDER = 2
    FLIP = 3
    TIME = 4
    LABEL_DROP = 5
    NOISE = 6
    DROPOUT = 7
    PACKING_ORDER = 8
    REFERENCE_HALVES = 9
    REPLACEMENT = 10
    INSPECTED_SAMPLES = 11
    GLYPH = 12
    REFERENCE_FEATURES = 13
    SAMPLED_LABELS = 14
    HELD_OUT = 15
    HELD_OUT_NOISE = 16
    ROUTE = 17
    SUBSPACE_IMAGES = 18


def splitmix64(values: UInt64Array) -> UInt64Array:
    """One step of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that mixes every bit."""
    with np.errstate(over="ignore"):  # overflow is intended: arithmetic modulo 2^64
        z = values + _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def hash64(seed: int, purpose: Purpose, *coordinates: npt.ArrayLike) -> UInt64Array:
    """64 random bits for every element of the broadcast `coordinates` (non-negative integers)."""
    state = splitmix64(np.asarray([seed % 2**64], np.uint64))
    state = splitmix64(state ^ np.uint64(int(purpose)))
    for coordinate in coordinates:
        state = splitmix64(state ^ np.asarray(coordinate).astype(np.uint64))
    return state


def uniform(seed: int, purpose: Purpose, *coordinates: npt.ArrayLike) -> Float64Array:
    """Uniform numbers in the open interval (0, 1), 53 bits each."""
    return ((hash64(seed, purpose, *coordinates) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def normal(seed: int, purpose: Purpose, *coordinates: npt.ArrayLike) -> Float64Array:
    """Standard normal numbers (Box and Muller 1958), each from two uniform numbers."""
    radius = np.sqrt(-2.0 * np.log(uniform(seed, purpose, *coordinates, 0)))
    return np.asarray(radius * np.cos(2.0 * np.pi * uniform(seed, purpose, *coordinates, 1)))


def permutation(length: int, seed: int, purpose: Purpose, *coordinates: int) -> Int64Array:
    """A random order of range(length): the ranks of `length` hashes."""
    return np.argsort(hash64(seed, purpose, *coordinates, np.arange(length)), kind="stable")


def generator_seeds(seed: int, purpose: Purpose, *coordinates: npt.ArrayLike) -> Int64Array:
    """Non-negative 63-bit seeds for `torch.Generator.manual_seed`, one for each element of the coordinates."""
    return (hash64(seed, purpose, *coordinates) >> np.uint64(1)).astype(np.int64)
