"""Networks of grey images: their shapes, the order of their pixels, and their random numbers."""

from dataclasses import replace

import pytest
import torch

from jitscale.config import Config, DiffusionConfig, image_shape, network_differences, patch_elements
from jitscale.diffusion.objective import images_of, patches_of, project
from jitscale.evaluation.generate import noise_of, tile
from jitscale.model.jit import JiT
from jitscale.training.noise import seeded_noise
from tests.support.tiny import MODEL

GREY = replace(MODEL, in_channels=1)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_put_together_to_the_images_they_come_from(channels: int) -> None:
    model = replace(MODEL, in_channels=channels)
    images = torch.randn(2, *image_shape(model))
    patches = patches_of(images, model.patch_size)
    assert patches.shape == (2, 16, patch_elements(model))
    assert torch.equal(images_of(patches, model.patch_size, model.image_size), images)
    assert torch.equal(JiT(model).unpatchify(patches), images)
    whole = torch.eye(patch_elements(model))
    torch.testing.assert_close(project(images, whole), images)


def test_a_grey_network_equals_one_with_three_equal_channels() -> None:
    """Its patch embedding is that of the other network, summed over channels.

    Its output is one channel of the other network.
    """
    torch.manual_seed(0)
    colour, grey = JiT(MODEL).eval(), JiT(GREY).eval()
    for parameter in colour.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = colour.state_dict()
    state["x_embedder.proj1.weight"] = state["x_embedder.proj1.weight"].sum(dim=1, keepdim=True)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        state[name] = state[name].unflatten(0, (-1, 3))[:, 1]
    grey.load_state_dict(state)
    z, t, y = torch.randn(2, *image_shape(GREY)), torch.rand(2), torch.tensor([1, 10])
    with torch.no_grad():
        found, expected = grey(z, t, y), colour(z.expand(-1, 3, -1, -1), t, y)[:, 1:2]
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_first_rows_of_the_embedding_give_coordinates_in_the_subspace() -> None:
    subspace = torch.linalg.qr(torch.randn(16, 3, generator=torch.Generator().manual_seed(0))).Q
    network = JiT(GREY, DiffusionConfig(prediction="asym", rank=3), subspace)
    rows = network.x_embedder.proj1.weight[:3].flatten(1)
    scale = float(rows[0].detach().norm())
    torch.testing.assert_close(rows.detach() / scale, subspace.T)


def test_noise_has_the_shape_of_the_images() -> None:
    for draw in (
        lambda model: noise_of(5, [7, 9], image_shape(model)),
        lambda model: seeded_noise([3, 4], image_shape(model), torch.Generator()),  # type: ignore[arg-type]
    ):
        grey, colour = draw(GREY), draw(MODEL)
        assert (grey.shape, colour.shape) == ((2, 1, 16, 16), (2, 3, 16, 16))
        assert grey.std() > 0.9
        assert not torch.equal(grey[0], grey[1])


def test_grids_of_grey_images_are_grey() -> None:
    grey = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8)
    found, colour = tile(grey, 2), tile(grey.repeat(1, 3, 1, 1), 2)
    assert found.shape == (30, 20)
    assert (found[..., None] == colour).all()
    assert (found[1:9, 11:19] == grey[1, 0].numpy()).all(), "the second image lies next to the first one"


def test_the_number_of_channels_is_part_of_the_network() -> None:
    assert network_differences(Config(model=GREY), Config(model=MODEL)) == ["model.in_channels: 1 -> 3"]
