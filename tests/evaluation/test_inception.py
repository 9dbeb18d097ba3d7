"""Inception against numbers of the published port (toshas/torch-fidelity 0.3.0), computed in float32 on a CPU."""

import hashlib
from pathlib import Path

import pytest
import torch

from jitscale.config import EvaluationConfig
from jitscale.errors import DataError, UserError
from jitscale.evaluation.inception import Inception, resize_as_tensorflow_1
from jitscale.evaluation.networks import find_network
from jitscale.evaluation.published import Published, verify

# The hash of the sorted lines "name shape" of all tensors of the published file, without the counters of batches.
NAMES_AND_SHAPES_SHA256 = "d84f693f2abd7fea61cb31c87d3b2f268bf707c1bae1db219afdad3363959cb0"
# Image size -> features 0, 500, 1000, 1500, 2047, their norm, and logits 0, 500, 1007, for the weights of `arithmetic`.
PORT = {
    64: ([0.0, 0.254888, 1.020663, 0.159114, 0.0], 26.071026, [-2.49937, -1.81373, 0.01083]),
    299: ([0.0, 0.420657, 2.043429, 0.347537, 0.0], 51.027275, [-4.90683, -3.53246, 0.026]),
    320: ([0.0, 0.30945, 1.412868, 0.242415, 0.0], 35.212402, [-3.3841, -2.41558, 0.0127]),
}


def arithmetic(network: Inception) -> Inception:
    """Weights computed from their position, so that they are the same everywhere."""
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            if name.endswith("conv.weight") or name == "fc.weight":
                mixed = (torch.arange(parameter.numel()) + 1 + len(name)) * 2654435761 % 2**32
                mixed ^= mixed >> 15
                mixed = mixed * 2246822519 % 2**32
                mixed ^= mixed >> 13
                spread = (24.0 / parameter[0].numel()) ** 0.5
                parameter.copy_(((mixed.double() / 2**32 - 0.5) * spread).view_as(parameter).float())
            elif name == "fc.bias":
                parameter.fill_(5.0)  # The last row is not part of the logits.
    return network.eval()


@pytest.fixture(scope="module")
def network() -> Inception:
    return arithmetic(Inception())


def picture(size: int) -> torch.Tensor:
    index = torch.arange(3 * size * size)
    return ((index * index + index // 7) % 256).view(1, 3, size, size).to(torch.uint8)


def test_names_and_shapes_equal_the_published_ones(network: Inception) -> None:
    lines = [f"{k} {tuple(v.shape)}" for k, v in network.state_dict().items() if "num_batches" not in k]
    assert len(lines) == 472
    assert hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest() == NAMES_AND_SHAPES_SHA256
    assert sum(parameter.numel() for parameter in network.parameters()) == 23_850_960


@pytest.mark.parametrize("size", PORT)
def test_features_and_logits_equal_the_ports(network: Inception, size: int) -> None:
    """The image is enlarged, kept, and made smaller."""
    with torch.no_grad():
        features, logits, spatial = network(picture(size))
    expected, norm, expected_logits = PORT[size]
    assert features.shape == (1, 2048)
    assert logits.shape == (1, 1008)
    assert spatial.shape == (1, 2023)
    assert features[0, [0, 500, 1000, 1500, 2047]].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(features.norm()) == pytest.approx(norm, rel=1e-5)
    assert logits[0, [0, 500, 1007]].tolist() == pytest.approx(expected_logits, rel=1e-3, abs=1e-3)


def test_spatial_features_are_ordered_by_row_column_channel(network: Inception) -> None:
    """They come from the branch that ADM's evaluations use, in the order of ADM's files, so that their mu_s matches."""
    seen = []
    hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        spatial = network(picture(64)).spatial
    hook.remove()
    assert seen[0].shape == (1, 192, 17, 17)
    assert spatial.unflatten(1, (17, 17, 7))[0, 3, 5].tolist() == seen[0][0, :7, 3, 5].tolist()
    assert float(spatial.std()) > 0


def test_the_resize_starts_at_the_corner() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 3, 4, 4)
    wide = resize_as_tensorflow_1(ramp, 8)
    assert wide[0, 0, 0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.0]
    assert resize_as_tensorflow_1(ramp, 2)[0, 0, 1].tolist() == [0.0, 2.0], "pixels are picked, not averaged"
    assert resize_as_tensorflow_1(ramp, 4) is ramp


def test_weights_are_read_by_hash(network: Inception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configuration names the folder. The counters of batches are missing, as in some published files."""
    evaluation = EvaluationConfig(features="inception", features_dir=str(tmp_path))
    path = tmp_path / "weights.pth"
    torch.save({k: v for k, v in network.state_dict().items() if "num_batches" not in k}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Inception, "weights", Published("http://127.0.0.1:9/weights.pth", digest[:8]))
    loaded = find_network("inception", evaluation).load("cpu")
    assert verify(Published("http://127.0.0.1:9/weights.pth", digest[:8]), tmp_path) == digest, (
        "the full hash is returned"
    )
    with torch.no_grad():
        assert torch.equal(loaded(picture(64))[0], network(picture(64))[0])
    monkeypatch.setattr(Inception, "weights", Published("http://127.0.0.1:9/weights.pth", "00000000"))
    with pytest.raises(DataError, match=rf"its sha256 begins with {digest[:8]}, expected 00000000"):
        find_network("inception", evaluation).load("cpu")
    path.write_bytes(path.read_bytes()[:1000])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(Inception, "weights", Published("http://127.0.0.1:9/weights.pth", digest[:8]))
    with pytest.raises(UserError, match="cannot load"):
        find_network("inception", evaluation).load("cpu")
