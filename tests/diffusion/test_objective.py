"""Identities of the nine prediction x loss pairs, and of the sampler."""

from itertools import product

import pytest
import torch

from jitscale.config import DiffusionConfig
from jitscale.diffusion.objective import interpolate, sample_loss, times_from_normal, to_spaces
from jitscale.diffusion.sampler import Sampler

PAIRS = list(product("xev", "xev"))


@pytest.fixture
def draw() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    e = 2.0 * torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.06, 0.2, 0.5, 0.7, 0.9, 0.94], dtype=torch.float64)  # All times are inside the clamps.
    return x, e, t, interpolate(x, e, t)


@pytest.mark.parametrize("prediction", "xev")
def test_a_perfect_network_recovers_all_three_spaces(draw: tuple[torch.Tensor, ...], prediction: str) -> None:
    x, e, t, z = draw
    truth = {"x": x, "e": e, "v": x - e}
    spaces = to_spaces(truth[prediction], z, t, prediction, 0.05)
    for name, expected in truth.items():
        torch.testing.assert_close(getattr(spaces, name), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("prediction", "loss"), PAIRS)
def test_a_perfect_network_has_no_loss_even_where_denominators_are_clamped(prediction: str, loss: str) -> None:
    config = DiffusionConfig(prediction=prediction, loss=loss)
    x, e = torch.randn(4, 3, 4, 4), torch.randn(4, 3, 4, 4)
    t = torch.tensor([0.0, 0.01, 0.99, 1.0])
    perfect = {"x": x, "e": e, "v": x - e}[prediction]
    assert float(sample_loss(perfect, x, e, interpolate(x, e, t), t, config).max()) == 0.0


@pytest.mark.parametrize(("prediction", "loss"), PAIRS)
def test_loss_weights_of_the_nine_pairs(draw: tuple[torch.Tensor, ...], prediction: str, loss: str) -> None:
    """An error d of the prediction costs (w d)^2, where w is the derivative of the loss space by the prediction."""
    x, e, t, z = draw
    error = 0.1 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight = {
        "xx": t**0, "xe": t / (1 - t), "xv": 1 / (1 - t),
        "ex": (1 - t) / t, "ee": t**0, "ev": 1 / t,
        "vx": 1 - t, "ve": t, "vv": t**0,
    }[prediction + loss]  # fmt: skip
    config = DiffusionConfig(prediction=prediction, loss=loss)
    perfect = {"x": x, "e": e, "v": x - e}[prediction]
    found = sample_loss(perfect + error, x, e, z, t, config)
    expected = weight.square() * error.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)  # The prediction is float32 there.


@pytest.mark.parametrize("loss", "xev")
def test_x_prediction_is_v_prediction_with_a_skip_connection(draw: tuple[torch.Tensor, ...], loss: str) -> None:
    x, e, t, z = draw
    output = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with_skip = (output - z) / (1 - t.view(-1, 1, 1, 1))
    as_x = sample_loss(output, x, e, z, t, DiffusionConfig(prediction="x", loss=loss))
    as_v = sample_loss(with_skip, x, e, z, t, DiffusionConfig(prediction="v", loss=loss))
    torch.testing.assert_close(as_v, as_x, rtol=1e-5, atol=0)


def test_denominators_are_clamped() -> None:
    z, prediction = torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    v = to_spaces(prediction, z, torch.tensor([0.999]), "x", 0.05).v
    torch.testing.assert_close(v, torch.full_like(v, -1 / 0.05))
    x = to_spaces(prediction, z, torch.tensor([0.001]), "e", 0.05).x
    torch.testing.assert_close(x, torch.full_like(x, 1 / 0.05))


def test_times_have_a_logit_normal_distribution() -> None:
    t = times_from_normal(torch.tensor([0.0, 1.0]), DiffusionConfig(mu=-0.8, sigma=0.8))
    torch.testing.assert_close(t, torch.tensor([-0.8, 0.0]).sigmoid())


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("prediction", "xv")
def test_a_straight_flow_is_followed_exactly(method: str, prediction: str) -> None:
    """If the network knows one image x, every trajectory is the straight line from its noise to x.

    This does not hold for e-prediction: at t = 0 it knows nothing about x, so the first step is lost.
    """
    x = torch.full((2, 3, 2, 2), 0.3)
    noise = torch.randn(2, 3, 2, 2)

    def network(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return {"x": x, "v": x - noise}[prediction]

    sampler = Sampler(method, steps=10, prediction=prediction, t_eps=1e-6)
    images = sampler.sample(network, noise, torch.zeros(2, dtype=torch.long), 10)
    torch.testing.assert_close(images, x, rtol=0, atol=1e-4)


def test_heun_is_second_order() -> None:
    """dz/dt = z gives z(1) = e z(0). Half the step divides Euler's error by about 2, and Heun's by about 4."""

    def network(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return z

    def error(method: str, steps: int) -> float:
        sampler = Sampler(method, steps, prediction="v")
        z = sampler.sample(network, torch.ones(1, 3, 1, 1), torch.zeros(1, dtype=torch.long), 10)
        return abs(float(z.flatten()[0]) - 2.718281828)

    assert error("euler", 20) / error("euler", 40) == pytest.approx(2, rel=0.05)
    # The last step is an Euler step, whose error is of second order too.
    assert error("heun", 20) / error("heun", 40) == pytest.approx(4, rel=0.1)


def test_the_interval_is_compared_in_float32() -> None:
    """The authors' code does the same: in ten steps, 0.1 is not above 0.1, although it is as a double."""
    sampler = Sampler("heun", 10, 3.0, (0.1, 0.7))
    grid = torch.linspace(0.0, 1.0, 11)
    assert [t.item() for t in grid if sampler.guides_at(t.item())] == grid[(grid > 0.1) & (grid < 0.7)].tolist()
    assert sampler.guides_at(grid[2].item())
    assert not sampler.guides_at(grid[1].item())
    assert sampler.steps_before_guidance() == 1, "the second step ends inside the interval"


@pytest.mark.parametrize(("interval", "guided"), [((0.1, 1.0), [0.2, 0.4, 0.6, 0.8]), ((0.0, 0.5), [0.0, 0.2, 0.4])])
def test_guidance_acts_only_inside_its_interval(interval: tuple[float, float], guided: list[float]) -> None:
    """The network sees two batches if guidance acts, otherwise one.

    It sees no unconditional image if guidance is off.
    """
    seen: list[tuple[float, list[int]]] = []

    def network(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append((round(float(t[0]), 3), y.tolist()))
        return z * y.view(-1, 1, 1, 1)

    labels = torch.tensor([1, 2])
    noise = torch.randn(2, 3, 2, 2)
    Sampler("euler", 5, 3.0, interval).sample(network, noise, labels, 10)
    assert [t for t, _ in seen] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert [t for t, y in seen if y == [1, 2, 10, 10]] == guided
    assert all(y in ([1, 2], [1, 2, 10, 10]) for _, y in seen)
    seen.clear()
    Sampler("heun", 5, 1.0, interval).sample(network, noise, labels, 10)
    assert len(seen) == 9  # 4 Heun steps have two evaluations each, the Euler step one.
    assert all(y == [1, 2] for _, y in seen)


def test_the_sampler_keeps_its_state_in_float32() -> None:
    def network(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert z.dtype == torch.float32
        return z.bfloat16()

    images = Sampler("heun", 4).sample(network, torch.randn(1, 3, 2, 2), torch.zeros(1, dtype=torch.long), 10)
    assert images.dtype == torch.float32
