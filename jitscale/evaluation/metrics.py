"""Numbers for sets of generated images, computed in float64 from stored features and logits.

Shapes: N images, F features, L logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

KERNEL_SUBSETS_SEED = 2020
DISTANCE_ROWS = 1000  # of a matrix of distances at once
INCEPTION_SCORE_SEED = 2020  # the published protocol shuffles with numpy.random.RandomState(2020)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureStatistics:
    """The Gaussian that stands for a set of images: `mean` (F,) and unbiased `covariance` (F, F), float64."""

    mean: Float64Array
    covariance: Float64Array

    @cached_property
    def root(self) -> Float64Array:
        """The symmetric square root of the covariance, (F, F): kept, since many distances are to one set of images."""
        values, vectors = np.linalg.eigh(self.covariance.astype(np.float64))
        # A covariance has negative eigenvalues by round-off only.
        root: Float64Array = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
        return root


class RunningStatistics:
    """Mean and covariance of features that come in parts, so that no more than a part is ever in memory.

    Parts are merged by their means and centred sums of products (Chan, Golub and LeVeque 1983, equation 2.1), which
    loses no digits where the mean is large. The order of the calls decides the last bits.

    Attributes:
        count: images so far.
        mean: (F,) float64.
        scatter: (F, F) float64, the sum of products of centred features.
    """

    def __init__(self, count: int, mean: Float64Array, scatter: Float64Array) -> None:
        self.count, self.mean, self.scatter = count, mean, scatter

    @classmethod
    def empty(cls, dimensions: int) -> RunningStatistics:
        """Of no images."""
        return cls(0, np.zeros(dimensions), np.zeros((dimensions, dimensions)))

    def update(self, features: Array) -> None:
        """Add `features` (N, F).

        Raises:
            ValueError: values that are not finite.
        """
        if len(features) == 0:
            return
        _refuse_non_finite(features, "features")
        mean = features.mean(axis=0, dtype=np.float64)
        centred = features.astype(np.float64) - mean
        self.merge(RunningStatistics(len(features), mean, centred.T @ centred))

    def merge(self, other: RunningStatistics) -> None:
        """Add the images that `other` has seen."""
        count = self.count + other.count
        if other.count == 0:
            return
        difference = other.mean - self.mean
        self.scatter += other.scatter
        self.scatter += np.outer(difference, difference) * (self.count * other.count / count)
        self.mean = self.mean + difference * (other.count / count)
        self.count = count

    def statistics(self) -> FeatureStatistics:
        """The Gaussian of all images so far.

        Raises:
            ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least two images, got {self.count}")
        return FeatureStatistics(self.mean, self.scatter / (self.count - 1))


def feature_statistics(features: Array) -> FeatureStatistics:
    """Mean and covariance (divided by N - 1) of `features` (N, F).

    Fewer images than features leave the covariance singular, and the distance then depends mostly on N: logged.

    Raises:
        ValueError: not a matrix of at least two rows, or values that are not finite.
    """
    if features.ndim != 2 or features.shape[0] < 2:
        raise ValueError(f"expected features (N, F) of at least two images, got shape {features.shape}")
    _refuse_non_finite(features, "features")
    images, dimensions = features.shape
    if images < dimensions:
        logger.warning("%d images for %d features: their covariance is singular", images, dimensions)
    covariance = np.cov(features, rowvar=False, dtype=np.float64).reshape(dimensions, dimensions)
    return FeatureStatistics(features.mean(axis=0, dtype=np.float64), covariance)


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Fréchet distance between two sets of features (N, F); the FID where they are Inception's pool features.

    Raises:
        ValueError: different F, fewer than two images in a set, or values that are not finite.
    """
    return frechet_distance_from_statistics(feature_statistics(features_a), feature_statistics(features_b))


def frechet_distance_from_statistics(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982; as FID: Heusel et al. 2017, equation 6).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where A B has the eigenvalues of the symmetric R A R, R^2 = B.
    R is kept with `b`, so let that be what many sets are compared with. Two symmetric eigendecompositions need no
    general matrix root and cannot leave the real numbers.
    torchmetrics offers the same number but takes features only; its precomputed statistics would have to be written
    into the attributes of the metric.

    Returns:
        The distance; round-off can leave it a little below zero for equal sets.

    Raises:
        ValueError: shapes that do not fit each other, or values that are not finite.
    """
    dimensions = a.mean.shape[0] if a.mean.ndim == 1 else -1
    for statistics in (a, b):
        if statistics.mean.shape != (dimensions,) or statistics.covariance.shape != (dimensions, dimensions):
            raise ValueError(
                f"statistics do not fit: means {a.mean.shape} and {b.mean.shape}, "
                f"covariances {a.covariance.shape} and {b.covariance.shape}"
            )
        _refuse_non_finite(statistics.mean, "means")
        _refuse_non_finite(statistics.covariance, "covariances")
    covariance_a, covariance_b = a.covariance.astype(np.float64), b.covariance.astype(np.float64)
    product = b.root @ covariance_a @ b.root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    difference = a.mean.astype(np.float64) - b.mean.astype(np.float64)
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross)


def inception_score(logits: Array, splits: int = 10) -> tuple[float, float]:
    """Inception Score of `logits` (N, L): exp of the mean divergence between p(y|x) and p(y) (Salimans et al. 2016).

    The published protocol: images shuffled with numpy's RandomState(2020), cut into `splits` parts, and the mean and
    the population standard deviation (divided by `splits`) of the parts' scores. The shuffle matters: a part of images
    sorted by class sees few classes.

    Returns:
        Mean and standard deviation over the parts.

    Raises:
        ValueError: not a matrix, fewer images than parts, or values that are not finite.
    """
    if logits.ndim != 2 or not 1 <= splits <= logits.shape[0]:
        raise ValueError(f"expected logits (N, L) of at least {splits} images, got shape {logits.shape}")
    _refuse_non_finite(logits, "logits")
    images = logits.shape[0]
    order = np.random.RandomState(INCEPTION_SCORE_SEED).permutation(images)
    log_p = logits.astype(np.float64)[order]
    log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
    scores = []
    for part in range(splits):
        conditional = log_p[part * images // splits : (part + 1) * images // splits]
        marginal = np.logaddexp.reduce(conditional, axis=0) - np.log(len(conditional))  # stays finite where p is 0
        scores.append(np.exp((np.exp(conditional) * (conditional - marginal)).sum(axis=1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def kernel_distance(
    features_a: Array, features_b: Array, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Kernel Inception Distance: squared maximum mean discrepancy, kernel (x.y / F + 1)^3 (Bińkowski et al. 2018).

    The unbiased estimate, for random subsets of both sets of features (N, F), drawn with a fixed seed; unlike the
    Fréchet distance it does not depend on N in the mean. torchmetrics has the same estimate (they agree in the
    tests) but draws its subsets from torch's global generator.

    Args:
        features_a: (N, F).
        features_b: (M, F).
        subsets: how many pairs of subsets.
        subset_size: of each; all images where there are fewer.

    Returns:
        Mean and population standard deviation over the subsets; multiply by 1000 for what some papers print.

    Raises:
        ValueError: different F, fewer than two images in a set, or values that are not finite.
    """
    for features in (features_a, features_b):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] != features_a.shape[1]:
            raise ValueError(f"expected features (N, F), got shapes {features_a.shape} and {features_b.shape}")
        _refuse_non_finite(features, "features")
    size = min(subset_size, len(features_a), len(features_b))
    random = np.random.RandomState(KERNEL_SUBSETS_SEED)
    found = []
    for _ in range(subsets):
        a = features_a[random.choice(len(features_a), size, replace=False)].astype(np.float64)
        b = features_b[random.choice(len(features_b), size, replace=False)].astype(np.float64)
        within_a, within_b, across = ((x @ y.T / a.shape[1] + 1.0) ** 3 for x, y in ((a, a), (b, b), (a, b)))
        within = within_a.sum() - np.trace(within_a) + within_b.sum() - np.trace(within_b)
        found.append(within / (size * (size - 1)) - 2.0 * across.mean())
    return float(np.mean(found)), float(np.std(found))


def precision_recall(real: Array, generated: Array, neighbour: int = 3) -> tuple[float, float]:
    """Improved precision and recall of `generated` (N, F) against `real` (M, F) (Kynkäänniemi et al. 2019, section 2).

    A set covers a point that lies nearer to one of its members than that member's `neighbour`-th nearest neighbour in
    the set. Precision is the share of generated images that the real ones cover, recall the reverse. Both depend on N
    and M.

    Raises:
        ValueError: different F, no more than `neighbour` images in a set, or values that are not finite.
    """
    for features in (real, generated):
        if features.ndim != 2 or len(features) <= neighbour or features.shape[1] != real.shape[1]:
            raise ValueError(
                f"expected features of more than {neighbour} images, got shapes {real.shape} and {generated.shape}"
            )
        _refuse_non_finite(features, "features")
    return _covered(generated, real, neighbour), _covered(real, generated, neighbour)


def label_agreement(logits: Array, labels: Array) -> float:
    """Share of images, in [0, 1], whose largest of `logits` (N, L) is the class they were asked to show, `labels` (N,).

    Only for a network whose logits are the classes of the generator, in the same order.

    Raises:
        ValueError: shapes that do not fit, no images, values that are not finite, or labels outside [0, L).
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.size == 0:
        raise ValueError(f"expected logits (N, L) and labels (N,), got shapes {logits.shape} and {labels.shape}")
    _refuse_non_finite(logits, "logits")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    return float((logits.argmax(axis=1) == labels).mean())


def _covered(points: Array, members: Array, neighbour: int) -> float:
    """Share of `points` that the set of `members` covers."""
    radii = np.concatenate(
        [
            np.partition(_squared_distances(part, members), neighbour, axis=1)[:, neighbour]  # the 0th is itself
            for part in np.array_split(members, -(-len(members) // DISTANCE_ROWS))
        ]
    )
    parts = np.array_split(points, -(-len(points) // DISTANCE_ROWS))
    return float(np.concatenate([(_squared_distances(part, members) <= radii).any(axis=1) for part in parts]).mean())


def _squared_distances(a: Array, b: Array) -> Float64Array:
    """(N, M) float64 between the rows of `a` and of `b`."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    squares: Float64Array = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1) - 2.0 * x @ y.T
    return squares


def _refuse_non_finite(values: Array, what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
    if broken.size:
        raise ValueError(f"{what} that are not finite in {broken.size} of {len(values)} rows, first row {broken[0]}")
