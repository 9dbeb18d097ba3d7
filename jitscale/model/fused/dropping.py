"""Dropout of the fused kernels: the mask is a function of a seed and an element's position.

The backward pass computes the mask again, instead of reading a stored one.
"""

# Kernels are written in Triton's language: no types, and constants in capitals.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803

from typing import Any

import triton
import triton.language as tl

LEVELS = 1 << 16  # number of possible probabilities
ROUNDS = tl.constexpr(7)  # rounds of Philox; 7 rounds pass all of TestU01 (Salmon et al. 2011, section 4, table 2)


def dropping(probability: float) -> dict[str, Any]:
    """A kernel's constants for a probability in [0, 1), rounded to a multiple of 2^-16 and below 1.

    THRESHOLD is 0 if nothing is dropped. SCALE is the factor of the kept elements.
    """
    threshold = min(round(probability * LEVELS), LEVELS - 1)
    return {"THRESHOLD": threshold, "SCALE": LEVELS / (LEVELS - threshold)}


@triton.jit
def random_words(seed, column, row):
    """Four words of 32 random bits, each with the shape of `column`: 16 bits for each of eight elements."""
    zero = column * 0
    return tl.philox(seed, column, zero + row, zero, zero, ROUNDS)


@triton.jit
def kept(x, bits, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """`x` with inverted dropout; the low 16 bits of `bits` decide."""
    if THRESHOLD > 0:
        x = tl.where((bits & 0xFFFF) >= THRESHOLD, x * SCALE, 0.0)
    return x
