"""Rank-asymmetric prediction: it equals x- and v-prediction at its two ends, and follows the formulas in between."""

import numpy as np
import pytest
import torch

from jitscale.config import DiffusionConfig
from jitscale.diffusion.objective import interpolate, patches_of, project, sample_loss, to_spaces
from jitscale.diffusion.sampler import Sampler
from jitscale.evaluation.generate import sample_images
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL

PATCH, NUMBERS = 2, 12
TIMES = torch.tensor([0.0, 0.5, 0.95, 0.98])  # below, at and above the time where 1 / (1 - t) is clamped
ENDS = [(0, "x"), (NUMBERS, "v")]


def orthonormal(numbers: int, rank: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(numbers, numbers, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn).Q[:, :rank].to(dtype)


def draws(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """The prediction, x, e and z of four images of 4 pixels per side."""
    generator = torch.Generator().manual_seed(0)
    output, x, e = torch.randn(3, 4, 3, 4, 4, generator=generator, dtype=dtype)
    return output, x, e, interpolate(x, e, TIMES.to(dtype))


@pytest.mark.parametrize("loss", "xev")
@pytest.mark.parametrize(("rank", "plain"), ENDS)
@pytest.mark.parametrize("basis", ["identity", "turned"])
def test_the_ends_of_the_ranks_are_x_and_v_prediction(rank: int, plain: str, loss: str, basis: str) -> None:
    output, x, e, z = draws()
    subspace = torch.eye(NUMBERS)[:, :rank] if basis == "identity" else orthonormal(NUMBERS, rank)
    asym = DiffusionConfig(prediction="asym", rank=rank, loss=loss)
    found = sample_loss(output, x, e, z, TIMES, asym, subspace)
    expected = sample_loss(output, x, e, z, TIMES, DiffusionConfig(prediction=plain, loss=loss))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(
        to_spaces(output, z, TIMES, "asym", 0.05, subspace), to_spaces(output, z, TIMES, plain, 0.05), strict=True
    ):
        # Values are divided by 0.05.
        torch.testing.assert_close(one, other, rtol=1e-6, atol=3e-5 if basis == "turned" else 1e-6)


@pytest.mark.parametrize(("method", "steps"), [("heun", 50), ("euler", 20), ("2m", 20), ("ab2", 20)])
@pytest.mark.parametrize(("rank", "plain"), [(0, "x"), (48, "v")])
def test_a_network_at_the_ends_samples_as_one_of_x_or_v(rank: int, plain: str, method: str, steps: int) -> None:
    """This holds with guidance, and with times above 0.95, where the clamp acts."""
    asym = JiT(MODEL, DiffusionConfig(prediction="asym", rank=rank)).eval()
    for parameter in asym.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    other = JiT(MODEL, DiffusionConfig(prediction=plain)).eval()
    other.load_state_dict(asym.state_dict())
    noise, labels = torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 10])
    images = []
    for network in (asym, other):
        sampler = Sampler(method, steps, guidance_scale=1.5, prediction=network.diffusion.prediction)
        images.append(sample_images(network, sampler, noise, labels))
    torch.testing.assert_close(*images, rtol=0, atol=1e-6)
    assert images[0].isfinite().all()
    assert images[0].std() > 0.01


@pytest.mark.parametrize("loss", "xev")
def test_a_perfect_prediction_has_no_loss(loss: str) -> None:
    _, x, e, z = draws()
    subspace = orthonormal(NUMBERS, 5)
    perfect = x - project(e, subspace)
    config = DiffusionConfig(prediction="asym", rank=5, loss=loss)
    assert float(sample_loss(perfect, x, e, z, TIMES, config, subspace).max()) == 0.0
    assert float(sample_loss(perfect + 0.1, x, e, z, TIMES, config, subspace)[1:].min()) > 1e-3


@pytest.mark.parametrize("rank", [0, 1, 5, NUMBERS])
def test_the_three_spaces_between_both_ends_follow_the_formulas(rank: int) -> None:
    """The reference uses the formulas with whole matrices for both projections.

    A perfect prediction recovers x, e and v.
    """
    output, x, e, z = draws(torch.float64)
    subspace = orthonormal(NUMBERS, rank, torch.float64)
    inner = subspace @ subspace.T
    outer = torch.eye(NUMBERS, dtype=torch.float64) - inner
    o, noisy = (patches_of(images, PATCH) for images in (output, z))
    t = TIMES.double()[:, None, None]
    share = (1 - t).clamp_min(0.05)
    expected = {
        "x": o @ outer + (noisy + (1 - t) * o) @ inner,
        "e": (noisy - t * o) @ inner + (noisy - t * o) @ outer / share,
        "v": o @ inner + (o - noisy) @ outer / share,
    }
    found = to_spaces(output, z, TIMES.double(), "asym", 0.05, subspace)
    for name, values in expected.items():
        torch.testing.assert_close(patches_of(getattr(found, name), PATCH), values, rtol=0, atol=1e-12)
    spaces = to_spaces(x - project(e, subspace), z, TIMES.double(), "asym", 0.01, subspace)  # No clamp acts here.
    for name, values in {"x": x, "e": e, "v": x - e}.items():
        torch.testing.assert_close(getattr(spaces, name), values, rtol=0, atol=1e-12)


def test_a_projection_acts_on_each_patch_in_the_order_row_column_channel() -> None:
    images = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    subspace = orthonormal(NUMBERS, 4, torch.float64)
    matrix, expected = (subspace @ subspace.T).numpy(), np.zeros((2, 3, 4, 6))
    for image in range(2):
        for top in range(0, 4, PATCH):
            for left in range(0, 6, PATCH):
                places = [(c, top + i, left + j) for i in range(PATCH) for j in range(PATCH) for c in range(3)]
                patch = np.array([float(images[image][place]) for place in places])
                for place, value in zip(places, matrix @ patch, strict=True):
                    expected[image][place] = value
    found = project(images, subspace)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(project(found, subspace), found, rtol=0, atol=1e-12)


def test_a_projection_under_autocast_stays_in_float32() -> None:
    output, x, e, z = draws()
    subspace = orthonormal(NUMBERS, 5)
    config = DiffusionConfig(prediction="asym", rank=5)
    plain = project(x, subspace), sample_loss(output, x, e, z, TIMES, config, subspace)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x.flatten(1) @ x.flatten(1).T).dtype == torch.bfloat16
        cast = project(x, subspace), sample_loss(output, x, e, z, TIMES, config, subspace)
    assert all(torch.equal(one, other) for one, other in zip(plain, cast, strict=True))


def test_a_sampler_takes_the_subspace_of_its_network_and_of_its_guide() -> None:
    """One Euler step from the noise gives z + v', with each network's own subspace."""
    diffusion = DiffusionConfig(prediction="asym", rank=7)
    networks = [JiT(MODEL, diffusion, orthonormal(48, 48)[:, own]).eval() for own in (slice(7), slice(20, 27))]
    for network in networks:
        torch.nn.init.normal_(network.final_layer.linear.weight, std=0.2)
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    velocities = []
    for network in networks:
        assert network.subspace is not None
        output = network(noise, torch.zeros(2), labels)
        velocities.append(output + (project(noise, network.subspace) - noise))  # 1 - t = 1 here.
    sampler = Sampler("euler", 1, 2.0, (0.0, 1.0), prediction="asym")
    found = sample_images(networks[0], sampler, noise, labels, networks[1])
    expected = noise + velocities[1] + 2.0 * (velocities[0] - velocities[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
