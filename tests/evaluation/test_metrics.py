"""The metrics against independent computations: scipy's matrix root, closed forms, plain loops."""

import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg

from jitscale.evaluation.metrics import (
    FrechetDistance,
    frechet_distance,
    inception_score,
    kernel_distance,
    label_agreement,
    precision_recall,
)


def correlated_features(images: int, dimensions: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(100 + seed).standard_normal((dimensions, dimensions))
    return (generator.standard_normal((images, dimensions)) @ mixing + shift).astype(np.float32)


def test_frechet_distance_equals_the_matrix_root_of_scipy() -> None:
    a, b = correlated_features(300, 24, 0), correlated_features(200, 24, 1, shift=0.5)
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a64.T), np.cov(b64.T)
    mean_term = ((a64.mean(0) - b64.mean(0)) ** 2).sum()
    expected = mean_term + np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def closed_form(a: np.ndarray, b: np.ndarray) -> float:
    """The distance from all features at once, with numpy alone, without merged sums."""
    cov_a, cov_b = (np.cov(features, rowvar=False, dtype=np.float64) for features in (a, b))
    values, vectors = np.linalg.eigh(cov_b)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root @ cov_a @ root
    cross = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0.0)).sum()
    difference = a.mean(axis=0, dtype=np.float64) - b.mean(axis=0, dtype=np.float64)
    return float(difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross)


def twelve_decades(images: int, seed: int) -> np.ndarray:
    """64 features, whose variances along common axes fall from 1 to 1e-12."""
    axes = scipy.linalg.qr(np.random.default_rng(0).standard_normal((64, 64)))[0]
    return (np.random.default_rng(seed).standard_normal((images, 64)) * np.logspace(0, -6, 64)) @ axes.T


@pytest.mark.parametrize(
    ("a", "b", "round_off"),
    [
        # These are several blocks.
        (correlated_features(2500, 24, 0), correlated_features(1200, 24, 1, shift=0.5), 0.0),
        (correlated_features(300, 24, 0) + 1000.0, correlated_features(200, 24, 1) + 1000.0, 0.0),
        # These are blocks too. If eigenvalues are zero, a root is only as exact as the root of round-off. The closed
        # form itself changes as much if the order of the images changes.
        # changes as much if the images are put in another order.
        (correlated_features(40, 64, 2), correlated_features(40, 64, 3), 1e-8),
        (correlated_features(40, 64, 2), correlated_features(400, 64, 3), 1e-8),
        (correlated_features(40, 64, 2), correlated_features(40, 64, 2), 1e-8),
        (twelve_decades(500, 0), twelve_decades(400, 1), 1e-8),
        (twelve_decades(500, 0), twelve_decades(500, 0), 1e-8),
    ],
    ids=["well", "large_mean", "singular", "singular_and_full", "equal_singular", "ill", "equal_ill"],
)
def test_frechet_distance_equals_the_closed_form(a: np.ndarray, b: np.ndarray, round_off: float) -> None:
    exact = closed_form(a, b)
    assert frechet_distance(a, b) == pytest.approx(exact, rel=1e-9)
    from_statistics = FrechetDistance.from_statistics(b.mean(axis=0, dtype=np.float64), np.cov(b.T, dtype=np.float64))
    from_statistics.update(a, real=False)
    assert float(from_statistics.compute()) == pytest.approx(exact, rel=1e-9)
    expected = pytest.approx(exact, rel=1e-9, abs=round_off * np.cov(b.T).trace())
    for _ in range(2):
        from_statistics.reset()  # The reset keeps the real features.
        for block in np.array_split(a, 7):
            from_statistics.update(block, real=False)
        assert float(from_statistics.compute()) == expected


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    features = correlated_features(300, 24, 4)
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-6)


def test_frechet_distance_of_two_gaussians_in_closed_form() -> None:
    mean_a, mean_b = np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.0, 0.0])
    std_a, std_b = np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 0.5])
    # Both matrices share this rotation, so that A and B commute.
    rotation = scipy.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    metric = FrechetDistance.from_statistics(mean_b, rotation @ np.diag(std_b**2) @ rotation.T)
    # The six images have exactly this mean and covariance.
    metric.update(mean_a + np.sqrt(2.5) * np.concatenate([np.diag(std_a), -np.diag(std_a)]) @ rotation.T, real=False)
    assert float(metric.compute()) == pytest.approx(5.0 + ((std_a - std_b) ** 2).sum(), rel=1e-12)


def test_statistics_are_computed_in_float64_and_divided_by_one_less() -> None:
    features = np.array([[10000.0, 1.0], [10000.5, 3.0], [10001.0, 5.0]], dtype=np.float32)
    metric = FrechetDistance(2)
    metric.update(features[:1], real=True)
    metric.update(features[1:], real=False)
    mean, covariance = metric.gaussian("real", "fake")
    np.testing.assert_allclose(mean, [10000.5, 3.0], rtol=1e-15)
    np.testing.assert_allclose(covariance, [[0.25, 1.0], [1.0, 4.0]], rtol=1e-12)
    assert mean.dtype == covariance.dtype == np.float64


def test_fewer_images_than_features_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    real = correlated_features(100, 24, 5)
    with caplog.at_level(logging.WARNING):
        frechet_distance(correlated_features(24, 24, 5), real)
        assert not caplog.records
        frechet_distance(correlated_features(23, 24, 5), real)
    assert "23 images for 24 features" in caplog.text


def test_frechet_distance_refuses_features_that_do_not_compare() -> None:
    features = correlated_features(30, 4, 6)
    with pytest.raises(ValueError, match="do not fit"):
        frechet_distance(features, features[:, :3])
    with pytest.raises(ValueError, match="at least two images"):
        frechet_distance(features, features[:1])
    broken = features.copy()
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match="first row 7"):
        frechet_distance(features, broken)
    with pytest.raises(ValueError, match="do not fit"):
        FrechetDistance.from_statistics(np.zeros(4), np.eye(3))
    with pytest.raises(ValueError, match="covariances that are not finite"):
        FrechetDistance.from_statistics(np.zeros(4), np.full((4, 4), np.nan))


def brute_force_inception_score(logits: np.ndarray, splits: int) -> tuple[float, float]:
    order = np.random.RandomState(2020).permutation(len(logits))
    scores = []
    for part in range(splits):
        rows = order[part * len(logits) // splits : (part + 1) * len(logits) // splits]
        probabilities = []
        for row in rows:
            weights = [math.exp(value) for value in logits[row]]
            probabilities.append([weight / sum(weights) for weight in weights])
        marginal = [sum(column) / len(rows) for column in zip(*probabilities, strict=True)]
        divergence = sum(p * math.log(p / q) for row in probabilities for p, q in zip(row, marginal, strict=True))
        scores.append(math.exp(divergence / len(rows)))
    mean = sum(scores) / splits
    return mean, math.sqrt(sum((score - mean) ** 2 for score in scores) / splits)


@pytest.mark.parametrize(("images", "splits"), [(200, 10), (57, 4), (5, 1)])
def test_inception_score_equals_a_plain_computation(images: int, splits: int) -> None:
    logits = np.random.default_rng(images).normal(0, 3, (images, 7)).astype(np.float32)
    assert inception_score(logits, splits) == pytest.approx(brute_force_inception_score(logits, splits), rel=1e-9)


def test_inception_score_hardly_depends_on_the_order_of_the_images() -> None:
    generator = np.random.default_rng(1)
    labels = np.repeat(np.arange(10), 100)
    by_class = 12.0 * np.eye(10)[labels] + generator.normal(0, 1, (1000, 10))
    mixed = by_class[generator.permutation(1000)]
    assert inception_score(by_class)[0] == pytest.approx(inception_score(mixed)[0], rel=0.02)
    assert inception_score(by_class)[0] > 9.0


def test_inception_score_of_certain_and_of_equal_predictions() -> None:
    # Here the probabilities underflow to 0, and two classes never occur.
    certain = 1e4 * np.eye(12)[np.arange(40) % 10]
    assert inception_score(certain, splits=1) == pytest.approx((10.0, 0.0), rel=1e-12)
    assert inception_score(np.zeros((40, 10))) == pytest.approx((1.0, 0.0), rel=1e-12)


def test_inception_score_refuses_fewer_images_than_splits() -> None:
    with pytest.raises(ValueError, match="at least 10 images"):
        inception_score(np.zeros((9, 10)))


def test_label_agreement_is_the_share_classified_as_labelled() -> None:
    logits = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    assert label_agreement(logits, np.array([0, 1, 2, 1])) == 0.75
    with pytest.raises(ValueError, match="3 classes"):
        label_agreement(logits, np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="shapes"):
        label_agreement(logits, np.array([0, 1, 2]))


def test_kernel_distance_is_the_unbiased_discrepancy() -> None:
    """All images are in one subset. The reference is the sums of the definition."""
    a, b = correlated_features(40, 6, 0), correlated_features(40, 6, 1, shift=0.5)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x.astype(np.float64) @ y.astype(np.float64) / 6 + 1) ** 3)

    within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    across = sum(kernel(x, y) for x in a for y in b) / 40**2
    mean, deviation = kernel_distance(a, b, subsets=2, subset_size=40)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9)
    assert deviation == pytest.approx(0.0, abs=1e-9)


def test_kernel_distance_of_halves_is_zero_in_the_mean() -> None:
    features = correlated_features(4000, 8, 0)
    same, spread = kernel_distance(features[::2], features[1::2], subset_size=250)
    other, _ = kernel_distance(features[::2], correlated_features(2000, 8, 0, shift=0.5), subset_size=250)
    assert abs(same) < spread
    assert other > 3 * abs(same)
    assert kernel_distance(features[::2], features[1::2], subset_size=250) == (same, spread), "seeded"


def test_precision_and_recall_equal_those_of_plain_loops() -> None:
    generator = np.random.default_rng(0)
    real = generator.standard_normal((60, 3))
    generated = 0.5 * generator.standard_normal((50, 3)) + 0.5

    def covered(points: np.ndarray, members: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(m - other) for other in members)[3] for m in members]
        inside = [any(np.linalg.norm(p - m) <= r for m, r in zip(members, radii, strict=True)) for p in points]
        return float(np.mean(inside))

    precision, recall = precision_recall(real, generated)
    assert precision == pytest.approx(covered(generated, real))
    assert recall == pytest.approx(covered(real, generated))
    assert precision > recall, "the generated images are narrower than the real ones"
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, generated + 100.0) == (0.0, 0.0)


@pytest.mark.parametrize("metric", [kernel_distance, precision_recall])
def test_metrics_of_two_sets_refuse_sets_that_do_not_match(metric: Callable[..., object]) -> None:
    good = correlated_features(20, 4, 0)
    for bad in (correlated_features(20, 5, 0), good[:1], good[0], np.full_like(good, np.nan)):
        with pytest.raises(ValueError, match=r"expected features|not finite"):
            metric(good, bad)
