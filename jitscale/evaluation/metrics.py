"""Numbers for sets of generated images, computed in float64 from stored features and logits.

Import this file where numbers are computed, not at the top of a file: torchmetrics brings all of scipy and matplotlib
if they are installed, which takes 2 seconds at the start of every process.

Shapes: N images, F features, L logits.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_stat_scores
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

KERNEL_SUBSETS_SEED = 2020
ROWS = 1000  # images of which a float64 copy, or a matrix of distances, is in memory at once
INCEPTION_SCORE_SEED = 2020  # the published protocol shuffles with numpy.random.RandomState(2020)

logger = logging.getLogger(__name__)


class _Stored(nn.Module):
    """Takes the place of the feature network: the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance between "real" and "fake" stored features; the FID where they are Inception's pool features.

    torchmetrics sums the features and their products. One rank updates, in the order of the images: the result does not
    depend on the number of GPUs. `reset` keeps the real features.
    """

    def __init__(self, origin: Float64Array) -> None:
        """Of no images.

        Args:
            origin: (F,), subtracted from all features. The sums of products lose digits where the mean is far from it.
        """
        super().__init__(_Stored(len(origin)), reset_real_features=False, sync_on_compute=False)
        self.origin = origin
        self._root: tuple[int, Float64Array] = 0, np.empty((0, 0))

    @classmethod
    def from_statistics(cls, mean: Array, covariance: Array) -> FrechetDistance:
        """To real features with this mean (F,) and unbiased covariance (F, F); their number has no influence.

        Raises:
            ValueError: shapes that do not fit each other, or values that are not finite.
        """
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"statistics do not fit: mean {mean.shape}, covariance {covariance.shape}")
        _refuse_non_finite(mean, "means")
        _refuse_non_finite(covariance, "covariances")
        metric = cls(mean.astype(np.float64))
        metric.real_features_cov_sum = torch.from_numpy(covariance.astype(np.float64))  # that of two images
        metric.real_features_num_samples = torch.tensor(2)
        return metric

    @property
    def update_called(self) -> bool:
        """torchmetrics warns without it; sums may also come from `merge_state` or `from_statistics`."""
        return True

    def update(self, imgs: Array | torch.Tensor, real: bool) -> None:
        """Add stored features `imgs` (N, F).

        Raises:
            ValueError: another shape, or values that are not finite.
        """
        if imgs.ndim != 2 or imgs.shape[1] != len(self.origin):
            raise ValueError(f"features {tuple(imgs.shape)} do not fit: expected (N, {len(self.origin)})")
        features = np.asarray(imgs)
        _refuse_non_finite(features, "features")
        for start in range(0, len(features), ROWS):
            part = features[start : start + ROWS].astype(np.float64) - self.origin
            super().update(torch.from_numpy(part), real)

    def gaussian(self, *sets: Literal["real", "fake"]) -> tuple[Float64Array, Float64Array]:
        """Mean (F,) and unbiased covariance (F, F) of one set, or of both together.

        Raises:
            ValueError: fewer than two images.
        """
        count = sum(int(getattr(self, f"{name}_features_num_samples")) for name in sets)
        if count < 2:
            raise ValueError(f"a covariance needs at least two images, got {count}")
        sums: Float64Array = sum(getattr(self, f"{name}_features_sum") for name in sets).numpy()
        products: Float64Array = sum(getattr(self, f"{name}_features_cov_sum") for name in sets).numpy()
        mean = sums / count
        return self.origin + mean, (products - np.outer(sums, mean)) / (count - 1)

    def compute(self) -> torch.Tensor:
        """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982; as FID: Heusel et al. 2017, equation 6).

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where A B has the eigenvalues of the symmetric R A R, R^2 = B.
        Two symmetric eigendecompositions cannot leave the real numbers, unlike those of torchmetrics, and R is kept.
        Fewer images than features leave A singular, and the distance then depends mostly on N: logged.

        Returns:
            The distance; round-off can leave it a little below zero for equal sets.

        Raises:
            ValueError: fewer than two images in a set.
        """
        mean_a, a = self.gaussian("fake")
        mean_b, b = self.gaussian("real")
        images, real_images = int(self.fake_features_num_samples), int(self.real_features_num_samples)
        if images < len(mean_a):
            logger.warning("%d images for %d features: their covariance is singular", images, len(mean_a))
        if self._root[0] != real_images:
            values, vectors = np.linalg.eigh(b)
            # A covariance has negative eigenvalues by round-off only.
            self._root = real_images, (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
        product = self._root[1] @ a @ self._root[1]
        cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
        difference = mean_a - mean_b
        return torch.tensor(difference @ difference + np.trace(a) + np.trace(b) - 2.0 * cross)


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Fréchet distance between two sets of features (N, F).

    Raises:
        ValueError: different F, fewer than two images in a set, or values that are not finite.
    """
    metric = FrechetDistance(features_b.mean(axis=0, dtype=np.float64))
    metric.update(features_b, real=True)
    metric.update(features_a, real=False)
    return float(metric.compute())


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
    Fréchet distance it does not depend on N in the mean. torchmetrics' own metric draws its subsets from torch's global
    generator.

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
        a, b = (
            torch.from_numpy(features[random.choice(len(features), size, replace=False)].astype(np.float64))
            for features in (features_a, features_b)
        )
        found.append(float(poly_mmd(a, b)))
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
    # Its accuracy is this quotient in float32.
    correct, *_, images = multiclass_stat_scores(
        torch.from_numpy(logits), torch.from_numpy(labels), logits.shape[1], average="micro"
    ).tolist()
    return correct / images


def _covered(points: Array, members: Array, neighbour: int) -> float:
    """Share of `points` that the set of `members` covers."""
    asked, kept = (torch.from_numpy(features.astype(np.float64)) for features in (points, members))
    # The nearest member of the set is the member itself.
    radii = torch.cat([torch.cdist(part, kept).kthvalue(neighbour + 1).values for part in kept.split(ROWS)])
    covered = [(torch.cdist(part, kept) <= radii).any(dim=1) for part in asked.split(ROWS)]
    return float(torch.cat(covered).double().mean())


def _refuse_non_finite(values: Array, what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if broken.size:
        raise ValueError(f"{what} that are not finite in {broken.size} of {len(values)} rows, first row {broken[0]}")
