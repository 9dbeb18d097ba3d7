"""Power-function averages, and their reconstruction after the run (Karras et al. 2024, arXiv 2312.02696, "EDM2").

After N images, the average of width sigma_rel weighs the weights at image n in proportion to (n / N)^gamma. Its profile
p(n) = (gamma + 1) / N * (n / N)^gamma integrates to 1 over [0, N], and sigma_rel is the standard deviation of n / N
under it. Weights change only between steps. Therefore the tracked averages equal the integrals of these profiles
without discretisation error, at any batch size, even if the batch size changes.

Shapes: I snapshots, O wanted averages.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jitscale.config import WIDEST_POWER

Array = NDArray[np.float64]

# Relative cutoff of singular values of the normalised inner products; smaller ones are float64 round-off.
_SMALLEST_SINGULAR = 1e-13


def gamma_of_width(width: float) -> float:
    """The exponent of the profile whose relative standard deviation is `width` (equations 123 and 126, algorithm 2).

    width^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is a cubic equation with one root above -1. Raises a ValueError
    if `width` is not in (0, WIDEST_POWER), where gamma is positive.
    """
    if not 0 < width < WIDEST_POWER:
        raise ValueError(f"a width of {width} is outside (0, {WIDEST_POWER:.4f})")
    t = width**-2
    return float(np.roots([1.0, 7.0, 16.0 - t, 12.0 - t]).real.max())


def power_step(gamma: float, before: int, now: int) -> float:
    """The share of the current weights in the average after the step from `before` to `now` images.

    It is 1 - beta, where beta = (before / now)^(gamma + 1) (equation 127 for a step of now - before images). In the
    first step of a run it is 1, so that the initial value of the average does not matter.
    """
    return 1.0 if before <= 0 else -math.expm1((gamma + 1) * math.log(before / now))


@dataclass(frozen=True)
class Reconstruction:
    """The coefficients that mix stored averages into wanted ones.

    The expected relative error is the L2 distance, over the images, between the mixed and the wanted profile, relative
    to the norm of the wanted profile. It is exact if weights are independent from image to image, and an upper estimate
    if they change slowly.
    """

    coefficients: Array  # (I, O); each column sums to 1
    errors: Array  # (O,), expected and relative
    sum_errors: Array  # (O,), distance of the coefficients' sum from 1 before they were scaled to sum 1


def solve(images: Array, widths: Array, at_images: float, wanted_widths: Array) -> Reconstruction:
    """The least-squares mixture of stored averages for each wanted one (section 3.2, algorithm 3), in float64.

    The stored averages have `widths` (I,), and were stored after `images` (I,). The wanted averages have
    `wanted_widths` (O,), after `at_images` images, which is at least the largest of `images`.
    """
    end = np.full(len(wanted_widths), float(at_images))
    stored, wanted = (images, _gammas(widths)), (end, _gammas(wanted_widths))
    # Profiles are scaled to length 1. Otherwise narrow ones, which are longer, would dominate the cutoff for singular
    # values.
    lengths, wanted_lengths = _lengths(*stored), _lengths(*wanted)
    a = _inner_products(*stored, *stored) / np.outer(lengths, lengths)
    b = _inner_products(*stored, *wanted) / np.outer(lengths, wanted_lengths)
    x = np.linalg.lstsq(a, b, rcond=_SMALLEST_SINGULAR)[0] / lengths[:, None] * wanted_lengths
    sums = x.sum(axis=0)
    x /= sums
    scaled = x * lengths[:, None] / wanted_lengths
    squares = 1.0 - 2.0 * np.sum(scaled * b, axis=0) + np.sum(scaled * (a @ scaled), axis=0)
    return Reconstruction(x, np.sqrt(np.maximum(squares, 0.0)), np.abs(sums - 1.0))


def _gammas(widths: Array) -> Array:
    return np.array([gamma_of_width(float(width)) for width in widths])


def _lengths(images: Array, gammas: Array) -> Array:
    """L2 norms of profiles: the square root of the diagonal of `_inner_products`."""
    return (gammas + 1) / np.sqrt((2 * gammas + 1) * images)


def _inner_products(images: Array, gammas: Array, other_images: Array, other_gammas: Array) -> Array:
    """The integral of p_i(n) q_j(n) over the images for every pair of profiles (equation 151): (I, O).

    Let S be the smaller and L the larger of the two ends, and s and l their exponents. Then it is
    (s + 1) (l + 1) / (s + l + 1) * (S / L)^l / L.
    """
    n, m = images[:, None], other_images[None, :]
    g, h = gammas[:, None], other_gammas[None, :]
    later = np.maximum(n, m)
    exponent_of_later = np.where(n < m, h, g)
    ratio: Array = np.minimum(n, m) / later
    return (g + 1) * (h + 1) / (g + h + 1) * ratio**exponent_of_later / later
