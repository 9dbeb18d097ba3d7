"""Metrics of sets of generated images, computed in float64 from stored features and logits.

Values that are not finite, and shapes that do not match, raise a ValueError. Import this module late, where metrics are
computed: torchmetrics imports scipy and matplotlib, which takes 2 seconds.

Shapes: N images, F features, L logits.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_stat_scores
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import poly_mmd

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]

STATES = ("num_samples", "sum", "cov_sum")  # torchmetrics' names of the sums of a set
KERNEL_SUBSETS_SEED = 2020
ROWS = 1000  # images a time: their distances to all others are in memory
INCEPTION_SCORE_SEED = 2020  # the published protocol shuffles with numpy.random.RandomState(2020)

logger = logging.getLogger(__name__)


class _Sums(NamedTuple):
    """The sums of a set of features: the number of images, the sum (F,), and the sum (F, F) of centred products."""

    images: int
    total: Float64Array
    products: Float64Array

    @property
    def mean(self) -> Float64Array:
        return self.total / max(1, self.images)

    def merged(self, other: _Sums) -> _Sums:
        """The sums of both sets (Chan, Golub and LeVeque 1983, equation 2.1); a large mean does not lose digits."""
        images = self.images + other.images
        between = np.outer(other.mean - self.mean, other.mean - self.mean)
        products = self.products + other.products + between * (self.images * other.images / max(1, images))
        return _Sums(images, self.total + other.total, products)


class FrechetDistance(FrechetInceptionDistance):
    """Fréchet distance between "real" and "fake" stored features; it is the FID if they are Inception's pool features.

    torchmetrics stores and resets the sums of both sets; `reset` keeps the real ones. `..._cov_sum` is the sum of
    centred products, in numpy's arithmetic. torchmetrics' own products of features that are not centred differ in the
    last bits, which a singular covariance amplifies to the 8th digit of the distance. One rank updates, in the order of
    the images, so that the result does not depend on the number of GPUs.
    """

    def __init__(self, num_features: int) -> None:
        network = nn.Identity()  # features are computed already
        network.num_features = num_features  # type: ignore[assignment]
        super().__init__(network, reset_real_features=False, sync_on_compute=False, compute_with_cache=False)
        self._root: Float64Array | None = None  # square root of the covariance of the real features

    @classmethod
    def from_statistics(cls, mean: Array, covariance: Array) -> FrechetDistance:
        """The distance to real features with this mean (F,) and unbiased covariance (F, F), of any number of images."""
        if mean.ndim != 1 or covariance.shape != mean.shape * 2:
            raise ValueError(f"statistics do not fit: mean {mean.shape}, covariance {covariance.shape}")
        _refuse_non_finite(mean, "means")
        _refuse_non_finite(covariance, "covariances")
        metric = cls(len(mean))
        # Stored as the sums of two images with this mean and covariance.
        metric._add("real", _Sums(2, 2 * mean.astype(np.float64), covariance.astype(np.float64)))
        return metric

    @property
    def update_called(self) -> bool:
        """Always true, so that torchmetrics does not warn if sums come from `merge_state` or `from_statistics`."""
        return True

    def update(self, imgs: Array, real: bool) -> None:  # type: ignore[override]
        """Add stored features `imgs` (N, F). If one call adds a whole set, the covariance equals `numpy.cov`."""
        if imgs.ndim != 2 or imgs.shape[1:] != self.real_features_sum.shape:
            raise ValueError(f"features {imgs.shape} do not fit: expected (N, {len(self.real_features_sum)})")
        _refuse_non_finite(imgs, "features")
        centred = imgs.astype(np.float64)
        total = centred.sum(axis=0)
        centred -= total / max(1, len(imgs))
        self._add("real" if real else "fake", _Sums(len(imgs), total, centred.T @ centred))

    def merge_state(self, incoming_state: dict[str, torch.Tensor]) -> None:  # type: ignore[override]
        """Add the images of another metric; `incoming_state` is its `metric_state`."""
        for name in ("real", "fake"):
            self._add(name, _sums_of(incoming_state, name))

    def _add(self, name: str, sums: _Sums) -> None:
        if name == "real":
            self._root = None
        merged = _sums_of(self.metric_state, name).merged(sums)
        for key, value in zip(STATES, merged, strict=True):
            setattr(self, f"{name}_features_{key}", torch.as_tensor(value))

    def gaussian(self, *sets: Literal["real", "fake"]) -> tuple[Float64Array, Float64Array]:
        """Mean (F,) and unbiased covariance (F, F) of one set, or of both together; it needs at least two images."""
        sums = functools.reduce(_Sums.merged, (_sums_of(self.metric_state, name) for name in sets))
        if sums.images < 2:
            raise ValueError(f"a covariance needs at least two images, got {sums.images}")
        return sums.mean, sums.products * (1 / (sums.images - 1))

    def compute(self) -> torch.Tensor:
        """Squared Fréchet distance of two Gaussians (Dowson and Landau 1982; as FID: Heusel et al. 2017, equation 6).

        |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), where A B has the eigenvalues of the symmetric R A R, R^2 = B.
        Two symmetric eigendecompositions always give real numbers, unlike torchmetrics' computation. R is kept for
        later calls. If there are fewer images than features, A is singular, and the distance depends mostly on N; then
        a warning is logged. Because of round-off, the distance of equal sets may be slightly negative. A set needs at
        least two images.
        """
        (mean_a, a), (mean_b, b) = self.gaussian("fake"), self.gaussian("real")
        images = int(self.fake_features_num_samples)
        if images < len(mean_a):
            logger.warning("%d images for %d features: their covariance is singular", images, len(mean_a))
        if self._root is None:
            values, vectors = np.linalg.eigh(b)
            self._root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T  # round-off makes values below 0
        product = self._root @ a @ self._root
        cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
        difference = mean_a - mean_b
        return torch.tensor(difference @ difference + np.trace(a) + np.trace(b) - 2.0 * cross)


def _sums_of(state: dict[str, Any], name: str) -> _Sums:
    """One set's part of a `metric_state`."""
    images, total, products = (state[f"{name}_features_{key}"] for key in STATES)
    return _Sums(int(images), total.numpy(), products.numpy())


def frechet_distance(features_a: Array, features_b: Array) -> float:
    """Fréchet distance between two sets of features (N, F), each of at least two images."""
    metric = FrechetDistance(features_b.shape[1])
    metric.update(features_b, real=True)
    metric.update(features_a, real=False)
    return float(metric.compute())


def inception_score(logits: Array, splits: int = 10) -> tuple[float, float]:
    """Inception Score of `logits` (N, L): exp of the mean divergence between p(y|x) and p(y) (Salimans et al. 2016).

    The published protocol: images are shuffled with numpy's RandomState(2020) and divided into `splits` parts. Returns
    the mean and the population standard deviation (divided by `splits`) of the parts' scores. The shuffle matters: if
    images are sorted by class, a part has few classes. Each part needs at least one image.
    """
    if logits.ndim != 2 or not 1 <= splits <= logits.shape[0]:
        raise ValueError(f"expected logits (N, L) of at least {splits} images, got shape {logits.shape}")
    _refuse_non_finite(logits, "logits")
    images = len(logits)
    log_p = logits.astype(np.float64)[np.random.RandomState(INCEPTION_SCORE_SEED).permutation(images)]
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

    The unbiased estimate for `subsets` random subsets of features (N, F) and (M, F), drawn with a fixed seed. A subset
    has `subset_size` images, or all if there are fewer; a set needs at least two. Unlike the Fréchet distance, the
    expected value does not depend on N. (torchmetrics' own metric draws its subsets from torch's global generator.)
    Returns the mean and the population standard deviation over the subsets; some papers print them times 1000.
    """
    _refuse_sets(features_a, features_b, fewest=2)
    size = min(subset_size, len(features_a), len(features_b))
    random = np.random.RandomState(KERNEL_SUBSETS_SEED)

    def subset(features: Array) -> torch.Tensor:
        return torch.from_numpy(features[random.choice(len(features), size, replace=False)].astype(np.float64))

    found = [float(poly_mmd(subset(features_a), subset(features_b))) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


def precision_recall(real: Array, generated: Array, neighbour: int = 3) -> tuple[float, float]:
    """Improved precision and recall of `generated` (N, F) against `real` (M, F) (Kynkäänniemi et al. 2019, section 2).

    A set covers a point if the point is nearer to one of the set's members than that member's `neighbour`-th nearest
    neighbour in the set. Precision is the share of generated images that the real images cover, recall the share of
    real images that the generated images cover. Both depend on N and M, which must be larger than `neighbour`.
    """
    _refuse_sets(real, generated, fewest=neighbour + 1)
    return _covered(generated, real, neighbour), _covered(real, generated, neighbour)


def _covered(points: Array, members: Array, neighbour: int) -> float:
    """Share of `points` that the set of `members` covers."""
    asked, kept = (torch.from_numpy(features.astype(np.float64)) for features in (points, members))
    # + 1, because the nearest member of the set is the member itself.
    radii = torch.cat([torch.cdist(part, kept).kthvalue(neighbour + 1).values for part in kept.split(ROWS)])
    covered = [(torch.cdist(part, kept) <= radii).any(dim=1) for part in asked.split(ROWS)]
    return float(torch.cat(covered).double().mean())


def label_agreement(logits: Array, labels: Array) -> float:
    """Share of images, in [0, 1], whose largest logit in `logits` (N, L) is their class in `labels` (N,).

    Only for a network whose logits are the classes of the generator, in the same order.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or labels.size == 0:
        raise ValueError(f"expected logits (N, L) and labels (N,), got shapes {logits.shape} and {labels.shape}")
    _refuse_non_finite(logits, "logits")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(f"labels from {labels.min()} to {labels.max()} for {logits.shape[1]} classes")
    # torchmetrics' own accuracy is this quotient, but in float32.
    tensors = torch.from_numpy(logits), torch.from_numpy(labels)
    correct, *_, images = multiclass_stat_scores(*tensors, logits.shape[1], average="micro").tolist()
    return correct / images


def _refuse_sets(a: Array, b: Array, fewest: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < fewest:
        raise ValueError(f"expected features (N, F) of at least {fewest} images, got shapes {a.shape} and {b.shape}")
    _refuse_non_finite(a, "features")
    _refuse_non_finite(b, "features")


def _refuse_non_finite(values: Array, what: str) -> None:
    broken = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if broken.size:
        raise ValueError(f"{what} that are not finite in {broken.size} of {len(values)} rows, first row {broken[0]}")
