"""Glyphs: the same pictures at every resolution, and the abilities of their feature network."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import EvaluationConfig
from jitscale.data.shards import ShardSet
from jitscale.errors import UserError
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.metrics import frechet_distance, label_agreement
from jitscale.evaluation.networks import find_network, network_files
from jitscale.evaluation.small_networks import GlyphFeatures
from jitscale.parallel import World
from jitscale.preparation.digits import digit_images
from jitscale.preparation.glyphs import GLYPH_CLASSES, GLYPH_FONTS, Glyphs
from tests.support.tools import Finished, run_tool

# Every result names this hash. Distances from another file do not compare with earlier ones.
GLYPHS_SHA256 = "599b215cf4302e6cadb0b34084ef521e73a08e035f03b2f72877111a87a3271e"
COUNT = 500


def drawn(resolution: int, seed: int = 3) -> np.ndarray:
    glyphs = Glyphs(COUNT, resolution, seed)
    return np.stack([glyphs[index] for index in range(COUNT)])


@pytest.fixture(scope="module")
def network() -> FeatureNetwork:
    return find_network("glyphs", EvaluationConfig()).load("cpu")


@pytest.fixture(scope="module")
def large() -> np.ndarray:
    return drawn(128)


def features(network: FeatureNetwork, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    parts = [network(part) for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(200)]
    embedded = [torch.cat(part).numpy() for part in zip(*parts, strict=True)]
    return embedded[0], embedded[1]


@pytest.mark.parametrize("resolution", [32, 64])
def test_a_glyph_is_the_same_picture_at_every_resolution(large: np.ndarray, resolution: int) -> None:
    """They differ only by the rounding of a letter's coverage of a pixel."""
    ratio = 128 // resolution
    pooled = large.reshape(COUNT, resolution, ratio, resolution, ratio, 3).mean((2, 4))
    assert np.abs(pooled - drawn(resolution)).max() <= 4


def test_glyphs_differ_from_each_other(large: np.ndarray) -> None:
    glyphs = Glyphs(COUNT, 128, seed=3)
    assert np.bincount(glyphs.labels).tolist() == [COUNT // 10] * len(GLYPH_CLASSES)
    assert np.bincount(glyphs.fonts, minlength=len(GLYPH_FONTS)).min() > 5
    assert len({image.tobytes() for image in large}) == COUNT
    assert np.array_equal(glyphs[5], large[5])
    assert not np.array_equal(Glyphs(COUNT, 128, seed=4)[5], large[5])
    contrast = large.reshape(COUNT, -1, 3).max(1).astype(int) - large.reshape(COUNT, -1, 3).min(1)
    assert contrast.min() > 50, "every letter is visible"


def test_the_tool_writes_them_once(tmp_path: Path) -> None:
    def run(*more: str) -> Finished:
        return run_tool("make_glyphs", "--resolution", 32, "--count", 50, "--output", tmp_path / "shards", *more)

    assert run().out == f"{tmp_path}/shards: 50 images in 1 shards\n"
    shards = ShardSet.open(tmp_path / "shards", 10, 32)
    image, label = shards.read(0, 7)
    glyphs = Glyphs(50, 32)
    assert any(np.array_equal(image, glyphs[index]) for index in range(50) if glyphs.labels[index] == label)
    assert run().out == f"{tmp_path}/shards: is there already\n"
    other = run("--seed", "1")
    assert other.code == 2
    assert "holds other shards" in other.err


def test_the_stored_weights_have_the_hash_that_results_name() -> None:
    (file,) = network_files(EvaluationConfig(features="glyphs"), World(0, 1, 0, torch.device("cpu")))
    assert file.sha256 == hashlib.sha256(GlyphFeatures.weights.read_bytes()).hexdigest() == GLYPHS_SHA256
    assert GlyphFeatures.weights.stat().st_size < 300_000


@pytest.mark.slow
def test_the_distance_sees_lost_detail_and_wrong_letters(network: FeatureNetwork, large: np.ndarray) -> None:
    """These glyphs were not in the training set of the network."""
    real, logits = features(network, large)
    assert label_agreement(logits, Glyphs(COUNT, 128, seed=3).labels) > 0.9
    from_64, from_32 = (frechet_distance(features(network, drawn(size))[0], real) for size in (64, 32))
    assert from_32 > 4 * from_64 > 0
    noise = 0.3 * 127.5 * np.random.default_rng(0).standard_normal(large.shape)
    noisy = (large + noise).round().clip(0, 255).astype(np.uint8)
    assert frechet_distance(features(network, noisy)[0], real) > from_64


def test_digits_that_would_fill_the_memory_are_refused() -> None:
    with pytest.raises(UserError, match="resolution 513: must be at most 512 pixels per side"):
        digit_images(513)
