"""The stored digits network on the real digits: which damage its distance sees, and what it ignores."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from jitscale.config import EvaluationConfig
from jitscale.errors import UserError
from jitscale.evaluation.features import Embedding, FeatureNetwork, to_uint8
from jitscale.evaluation.metrics import frechet_distance, inception_score, label_agreement
from jitscale.evaluation.networks import find_network, identity_of, network_files
from jitscale.evaluation.small_networks import DIGITS_HELD_OUT, DigitsFeatures
from jitscale.parallel import World
from jitscale.preparation.digits import digit_images

# Every result names this hash. Distances from another file do not compare with earlier ones.
DIGITS_SHA256 = "5f12f99d2677e7f00703410b24d12586470479353fd6595ebb7853d962ca0e22"


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return find_network("digits", EvaluationConfig()).load("cpu")


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return digit_images(32)


@pytest.fixture(scope="module")
def real(network: FeatureNetwork, digits: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return embed(network, digits[0])


@pytest.fixture(scope="module")
def floor(real: tuple[np.ndarray, np.ndarray]) -> float:
    order = np.random.default_rng(0).permutation(len(real[0]))
    return frechet_distance(real[0][order[::2]], real[0][order[1::2]])


def embed(network: FeatureNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    embedded = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return embedded.features.numpy(), embedded.logits.numpy()


def as_pixels(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


def test_the_stored_weights_have_the_hash_that_results_name() -> None:
    assert hashlib.sha256(DigitsFeatures.weights.read_bytes()).hexdigest() == DIGITS_SHA256
    (file,) = network_files(EvaluationConfig(features="digits"), World(0, 1, 0, torch.device("cpu")))
    assert identity_of([file]) == {"features": "digits", "features_sha256": DIGITS_SHA256}
    assert DigitsFeatures.weights.stat().st_size < 300_000


def test_network_has_its_stated_shapes_and_is_not_trainable(network: FeatureNetwork) -> None:
    features, logits, spatial = network(torch.randint(0, 256, (3, 3, 20, 40), dtype=torch.uint8))
    assert features.shape == (3, network.num_features)
    assert logits.shape == (3, network.num_logits)
    assert spatial.shape == (3, 0)
    assert features.dtype == logits.dtype == torch.float32
    assert not network.training
    assert not features.requires_grad


def test_callers_autocast_does_not_change_the_features(network: FeatureNetwork) -> None:
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(images).features
    assert torch.equal(features, network(images)[0])


def test_digits_outside_of_the_training_set_are_recognised(
    digits: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray]
) -> None:
    assert label_agreement(real[1][DIGITS_HELD_OUT], digits[1][DIGITS_HELD_OUT]) >= 0.98


def test_features_have_full_rank_and_unit_scale(real: tuple[np.ndarray, np.ndarray]) -> None:
    covariance = np.cov(real[0].astype(np.float64), rowvar=False)
    np.testing.assert_allclose(np.diag(covariance), 1.0, atol=0.1)
    assert np.linalg.cond(covariance) < 1e5


def test_real_halves_are_close_and_real_digits_score_high(floor: float, real: tuple[np.ndarray, np.ndarray]) -> None:
    assert 0.4 < floor < 1.5
    assert inception_score(real[1])[0] > 8.5


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        ("noise 0.1", 1.5),
        pytest.param("noise 0.3", 20.0, marks=pytest.mark.slow),
        ("blur 1", 2.0),
        pytest.param("blur 2", 15.0, marks=pytest.mark.slow),
        ("class dropped", 1.5),
        ("ten repeated", 30.0),
        ("uniform noise", 100.0),
    ],
)
def test_damage_is_clearly_larger_than_the_floor(
    network: FeatureNetwork, digits: tuple[np.ndarray, np.ndarray], floor: float, damage: str, least: float
) -> None:
    images, labels = digits
    generator = np.random.default_rng(1)
    pixels = images.astype(np.float64)
    kind, _, amount = damage.partition(" ")
    if kind == "noise":
        changed = as_pixels(pixels + 127.5 * float(amount) * generator.standard_normal(images.shape))
    elif kind == "blur":
        changed = as_pixels(gaussian_filter(pixels, (0, float(amount), float(amount), 0)))
    elif kind == "class":
        changed = images[labels != 3]
    elif kind == "ten":
        changed = np.repeat(images[:10], 180, axis=0)
    else:
        changed = generator.integers(0, 256, images.shape, dtype=np.uint8)
    assert frechet_distance(embed(network, changed)[0], embed(network, images)[0]) > least * floor


def test_more_damage_gives_a_larger_distance(
    network: FeatureNetwork, digits: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray]
) -> None:
    blurred = [as_pixels(gaussian_filter(digits[0].astype(np.float64), (0, s, s, 0))) for s in (0.5, 1.0, 2.0)]
    distances = [frechet_distance(embed(network, images)[0], real[0]) for images in blurred]
    assert 0.0 < distances[0] < distances[1] < distances[2]


def test_the_resolution_hardly_changes_the_distance(
    network: FeatureNetwork, real: tuple[np.ndarray, np.ndarray], floor: float
) -> None:
    at_64, _ = embed(network, digit_images(64)[0])
    assert frechet_distance(at_64, real[0]) < 0.02 * floor


def test_larger_images_are_averaged_and_not_sampled(network: FeatureNetwork) -> None:
    columns = torch.tensor([0, 0, 255], dtype=torch.uint8).repeat(32)
    stripes = network(columns.expand(1, 3, 96, 96)).features
    grey = network(torch.full((1, 3, 96, 96), 85, dtype=torch.uint8)).features
    black = network(torch.zeros(1, 3, 96, 96, dtype=torch.uint8)).features
    assert (stripes - grey).norm() < 0.1 * (black - grey).norm()


def test_rounding_to_uint8_hardly_changes_the_distance(
    network: FeatureNetwork, digits: tuple[np.ndarray, np.ndarray], real: tuple[np.ndarray, np.ndarray], floor: float
) -> None:
    # The offsets are twice as large as the largest error of rounding.
    offsets = np.random.default_rng(2).integers(-1, 2, digits[0].shape)
    assert frechet_distance(embed(network, as_pixels(digits[0] + offsets))[0], real[0]) < 0.05 * floor


def test_damaged_or_missing_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (DigitsFeatures.weights.read_bytes()[:-1], None):
        path = tmp_path / "weights.safetensors"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        monkeypatch.setattr(DigitsFeatures, "weights", path)
        with pytest.raises(UserError, match="cannot load"):
            find_network("digits", EvaluationConfig()).load("cpu")


def test_network_takes_uint8_only(network: FeatureNetwork) -> None:
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))


def test_a_network_sees_the_one_channel_of_grey_images_three_times(network: FeatureNetwork) -> None:
    grey = torch.randint(256, (4, 1, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found, expected = network(grey), network(grey.repeat(1, 3, 1, 1))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match=r"or \(B, 1, height, width\) uint8, got \(4, 2, 20, 20\)"):
        network(grey.repeat(1, 2, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_uint8_undoes_the_scaling_and_rounds(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    scaled = levels.to(dtype) / 127.5 - 1.0
    assert torch.equal(to_uint8(scaled), levels)
    assert torch.equal(to_uint8(scaled - 0.4 / 127.5), levels)
    assert torch.equal(to_uint8(scaled + 0.4 / 127.5), levels)


def test_to_uint8_clamps_values_outside_the_range() -> None:
    images = torch.tensor([-7.0, -1.0, 1.0, 7.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_uint8(images)[0, 0].flatten().tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_to_uint8_refuses_values_that_are_not_finite(value: float) -> None:
    images = torch.zeros(4, 3, 8, 8)
    images[1, 2, 3, 4] = images[3, 0, 0, 0] = value
    with pytest.raises(UserError, match=r"not finite, ids 1, 3;"):
        to_uint8(images)
    with pytest.raises(UserError, match=r"not finite, ids 65, 67;"):
        to_uint8(images, range(64, 68))


def test_networks_run_without_tf32() -> None:
    class Network(FeatureNetwork):
        def embed(self, images: torch.Tensor) -> Embedding:
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
            return Embedding(images.flatten(1), images.flatten(1), images.flatten(1))

    before = torch.backends.cudnn.allow_tf32
    Network()(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
    assert torch.backends.cudnn.allow_tf32 == before
