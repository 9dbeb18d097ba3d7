"""Networks of grey images: their shapes, the order of their pixels, and what is drawn for them."""

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
def test_patches_become_the_images_that_they_are_of(channels: int) -> None:
    model = replace(MODEL, in_channels=channels)
    images = torch.randn(2, *image_shape(model))
    patches = patches_of(images, model.patch_size)
    assert patches.shape == (2, 16, patch_elements(model))
    assert torch.equal(images_of(patches, model.patch_size, model.image_size), images)
    assert torch.equal(JiT(model).unpatchify(patches), images)
    whole = torch.eye(patch_elements(model))
    torch.testing.assert_close(project(images, whole), images)


def test_a_grey_network_is_the_one_that_adds_three_equal_channels() -> None:
    """Of a network of three, the patch embedding summed over channels and one channel of the output."""
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


def test_the_first_rows_of_the_embedding_look_at_the_subspace_of_a_grey_patch() -> None:
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
    assert (found[1:9, 11:19] == grey[1, 0].numpy()).all(), "the second one lies beside the first one"


def test_channels_make_another_network() -> None:
    assert network_differences(Config(model=GREY), Config(model=MODEL)) == ["model.in_channels: 1 -> 3"]
