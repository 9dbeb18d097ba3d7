"""The values of the held-out loss, and the effects of ranks and bad images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import Config
from jitscale.data.shards import open_training_shards
from jitscale.errors import DataError
from jitscale.keyed_random import Float64Array, Purpose, generator_seeds
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.preparation.packing import shard_name
from jitscale.training.held_out import TIMES, HeldOutLoss
from tests.data.held_out_shards import COUNT, CPU, config_of, damage, members, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 samples in uneven shards."""
    return write(tmp_path_factory.mktemp("held") / "shards", list(range(COUNT)), 35)


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with only the samples below 100."""
    return write(tmp_path_factory.mktemp("held") / "fewer", list(range(100)), 35)


def network_of(config: Config, seed: int) -> JiT:
    """A network whose prediction depends on all inputs. JiT's own initialisation predicts zeros."""
    torch.manual_seed(seed)
    network = JiT(config.model, config.diffusion)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def small(shards: Path, held_out: str) -> Config:
    config = config_of(shards, held_out)
    model = config.model
    model.hidden_size, model.depth, model.num_heads, model.bottleneck_dim, model.in_context_start = 32, 2, 2, 8, 1
    config.engine.precision = "fp32"
    config.diffusion.noise_scale, config.data.flip = 1.5, True
    config.evaluation.block_size, config.evaluation.seed = 8, 3
    return config


@pytest.mark.parametrize("space", ["v", "x"])
def test_the_values_follow_the_formula(folder: Path, space: str) -> None:
    """The formula, sample by sample: z = t x + (1 - t) e, x-prediction, squared error in the space of the loss."""
    config = small(folder, "0.1")
    config.diffusion.loss = space
    shards = open_training_shards(config)
    assert shards.held_out is not None
    networks = {name: network_of(config, seed) for seed, name in enumerate(("model", "ema_0.9"))}
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    held_out = HeldOutLoss(config, CPU, shards.held_out)
    found = {key: value for name in networks for key, value in held_out.measure(networks[name], name).items()}
    assert torch.equal(torch.random.get_rng_state(), before), "the random state of training is unchanged"
    numbers = members(shards.held_out)
    assert len(numbers) % config.evaluation.block_size, "the last block is not full"
    assert TIMES == (0.0625, 0.1875, 0.3125, 0.4375, 0.5625, 0.6875, 0.8125, 0.9375)
    for name, network in networks.items():
        means = []
        for index, t in enumerate(TIMES):
            losses = []
            for sample, number in enumerate(numbers):
                x = torch.full((1, 3, 4, 4), number / 127.5 - 1)
                x[..., -1] += 1 / 127.5  # A flip would move this column.
                seed = int(generator_seeds(3, Purpose.HELD_OUT_NOISE, sample, index)[0])
                e = 1.5 * torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
                z = t * x + (1 - t) * e
                with torch.no_grad():
                    predicted = network(z, torch.tensor([t]), torch.tensor([number]))
                error = (predicted - x) / (max(1 - t, 0.05) if space == "v" else 1)
                losses.append(float(error.double().square().mean()))
            means.append(np.mean(losses))
            assert found[f"held_out/{name}/t{t}"] == pytest.approx(means[-1], rel=1e-5)
        assert found[f"held_out/{name}"] == pytest.approx(np.mean(means), rel=1e-5)
    assert (found["held_out_samples"], found["held_out_bad_samples"]) == (len(numbers), 0)
    assert found["held_out/model"] != found["held_out/ema_0.9"]


class Gathered(Exception):  # noqa: N818  # It is not an error: it carries the data of one rank.
    """Replaces the collective call and carries the data of one rank."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_blocks_of_ranks_are_joined_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """tests/distributed uses real ranks, but its mean would hardly show a wrong order."""
    config = small(folder, "0.2")
    held_out = open_training_shards(config).held_out
    assert held_out is not None
    network = network_of(config, 0)
    alone, _ = HeldOutLoss(config, CPU, held_out)._losses(network)

    def leave(value: object) -> list[object]:
        if isinstance(value, list):
            raise Gathered(value)
        return [value]

    monkeypatch.setattr("jitscale.parallel.gather_objects", leave)
    parts = []
    for rank in range(ranks):
        with pytest.raises(Gathered) as gathered:
            HeldOutLoss(config, World(rank, ranks, rank, CPU.device), held_out)._losses(network)
        parts += gathered.value.args
    assert [len(part) for part in parts] == [2, 1] if ranks == 2 else [1, 1, 1]
    monkeypatch.setattr("jitscale.parallel.gather_objects", lambda value: parts if isinstance(value, list) else [value])
    together, _ = HeldOutLoss(config, World(0, ranks, 0, CPU.device), held_out)._losses(network)
    np.testing.assert_array_equal(together, alone)


def test_bad_held_out_images_are_left_out_counted_and_reported_once(
    fewer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The other images keep their noise and losses. If no image is left, that is an error."""
    png = write(tmp_path / "png", list(range(100, COUNT)), 20, codec="png")
    config = small(fewer, str(png))
    network = network_of(config, 0)

    def losses() -> tuple[HeldOutLoss, Float64Array]:
        held_out = open_training_shards(config).held_out
        assert held_out is not None
        measured = HeldOutLoss(config, CPU, held_out)
        return measured, measured._losses(network)[0]

    _, sound = losses()
    for sample in (3, 9, 19):
        damage(png / shard_name(0), sample)
    measured, rest = losses()
    np.testing.assert_array_equal(rest, np.delete(sound, (3, 9, 19), axis=0))
    found = measured.measure(network, "model")
    assert (found["held_out_samples"], found["held_out_bad_samples"]) == (17, 3)
    assert caplog.text.count("the held-out loss is measured without it") == 3
    for sample in range(20):
        damage(png / shard_name(0), sample)
    with pytest.raises(DataError, match=r"data.held_out=.*: none of 20 images can be decoded; check the shards"):
        measured.measure(network, "model")
