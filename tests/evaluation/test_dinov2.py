"""DINOv2 against numbers computed with transformers 5.23.0. Positions are resampled as in the published code."""

import pytest
import torch

from jitscale.evaluation.dinov2 import DinoV2


def arithmetic(network: DinoV2) -> DinoV2:
    """Weights computed from their position, so that they are the same everywhere."""
    with torch.no_grad():
        for name, parameter in network.state_dict().items():
            mixed = (torch.arange(parameter.numel()) + 1 + len(name)) * 2654435761 % 2**32
            mixed ^= mixed >> 15
            mixed = mixed * 2246822519 % 2**32
            mixed ^= mixed >> 13
            parameter.copy_(((mixed.double() / 2**32 - 0.5) * 0.6).view_as(parameter).float())
    return network.eval()


def test_features_equal_those_of_the_published_network() -> None:
    index = torch.arange(3 * 224 * 224)
    picture = ((index * index + index // 7) % 256).view(1, 3, 224, 224).to(torch.uint8)
    with torch.no_grad():
        features, logits, spatial = arithmetic(DinoV2(width=32, depth=2, heads=4))(picture)
    assert features[0, [0, 8, 16, 24, 31]].tolist() == pytest.approx(
        [0.19103, -0.524, 0.59776, -0.03416, -0.11434], abs=2e-5
    )
    assert float(features.norm()) == pytest.approx(1.7902366, rel=1e-5)
    assert logits.shape == spatial.shape == (1, 0)


def test_names_and_sizes_equal_the_published_ones() -> None:
    with torch.device("meta"):
        network = DinoV2()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    assert len(shapes) == 7 + 24 * 14
    assert sum(parameter.numel() for parameter in network.parameters()) == 304_368_640
    assert shapes["pos_embed"] == (1, 1370, 1024)
    assert shapes["mask_token"] == (1, 1024)
    assert shapes["patch_embed.proj.weight"] == (1024, 3, 14, 14)
    assert shapes["blocks.23.attn.qkv.weight"] == (3072, 1024)
    assert shapes["blocks.0.mlp.fc1.bias"] == (4096,)
    assert shapes["blocks.0.ls2.gamma"] == (1024,)
    assert network.num_features == 1024


def test_images_of_any_size_are_resized() -> None:
    network = arithmetic(DinoV2(width=32, depth=1, heads=4))
    grey = [network(torch.full((1, 3, size, size), 90, dtype=torch.uint8)).features for size in (64, 224, 300)]
    torch.testing.assert_close(grey[0], grey[1])
    torch.testing.assert_close(grey[2], grey[1])
