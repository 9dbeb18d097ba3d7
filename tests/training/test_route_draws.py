"""The routed tokens of a sample depend on its position in the run and on nothing else."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import Config, image_tokens, network_differences, routed_part, routed_tokens, routes
from jitscale.data.shards import open_training_shards
from jitscale.parallel import World
from jitscale.training.feed import Feed, kept_tokens
from tests.data.held_out_shards import COUNT, config_of, write

TOKENS, KEPT, BATCH = 64, 38, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("routed") / "shards", list(range(COUNT)), 35, size=16)


def routed(folder: Path, share: float = 0.4) -> Config:
    config = config_of(folder, size=16)
    config.model = replace(config.model, depth=6, route_share=share)
    config.data.batch_size, config.data.streams, config.data.window = BATCH, 4, 16
    return config


def step(config: Config, *, ranks: int, micro_batches: int, workers: int, number: int) -> dict[int, list[int]]:
    """The tokens that pass in step `number`, from all ranks, by the position of a sample in the global batch."""
    config.data.num_workers = workers
    found: dict[int, list[int]] = {}
    for rank in range(ranks):
        world = World(rank, ranks, rank, torch.device("cpu"))
        feed = Feed(config, world, open_training_shards(config), micro_batches=micro_batches, origin=0, compiled=False)
        feed.start(number * BATCH)
        rows = []
        for _ in range(micro_batches):
            kept = next(feed).kept
            assert kept is not None
            assert (kept.dtype, kept.shape) == (torch.int64, (BATCH // ranks // micro_batches, KEPT))
            rows += kept.tolist()
        feed.close()
        found |= {rank + ranks * index: row for index, row in enumerate(rows)}
    return found


@pytest.mark.parametrize(("ranks", "micro_batches", "workers"), [(1, 3, 0), (2, 1, 0), (3, 2, 0), (2, 3, 2)])
def test_ranks_micro_batches_and_workers_change_nothing(
    folder: Path, ranks: int, micro_batches: int, workers: int
) -> None:
    config = routed(folder)
    assert (image_tokens(config.model), routed_tokens(config.model)) == (TOKENS, KEPT)
    found = step(config, ranks=ranks, micro_batches=micro_batches, workers=workers, number=3)
    expected = kept_tokens(config.run.seed, np.arange(3 * BATCH, 4 * BATCH), TOKENS, KEPT)
    assert found == dict(enumerate(expected.tolist()))


def test_without_routing_nothing_is_drawn(folder: Path) -> None:
    for config in (routed(folder, share=0.0), routed(folder, share=0.001)):
        config.data.num_workers = 0
        feed = Feed(
            config,
            World(0, 1, 0, torch.device("cpu")),
            open_training_shards(config),
            micro_batches=1,
            origin=0,
            compiled=False,
        )
        feed.start(0)
        assert next(feed).kept is None
        feed.close()


def test_draws_are_exact_rising_uniform_and_independent() -> None:
    many = 20_000
    kept = kept_tokens(7, np.arange(many), TOKENS, KEPT)
    assert kept.shape == (many, KEPT)
    assert bool((kept.diff(dim=1) > 0).all()), "each token appears at most once, in order"
    assert (int(kept.min()), int(kept.max())) == (0, TOKENS - 1)
    passes = torch.zeros(many, TOKENS, dtype=torch.float64).scatter(1, kept, 1.0)
    share = KEPT / TOKENS
    spread = (share * (1 - share)) ** 0.5
    deviations = (passes.mean(0) - share) / (spread / many**0.5)
    assert float(deviations.abs().max()) < 4.5
    # The pairs are tokens, which are hardly correlated because exactly K pass, and neighbouring samples.
    centred = (passes - share) / spread
    correlation = centred.T @ centred / many + torch.ones(TOKENS, TOKENS, dtype=torch.float64) / (TOKENS - 1)
    assert float((correlation - correlation.diag().diag()).abs().max()) < 5 / many**0.5
    assert abs(float((centred[1:] * centred[:-1]).mean())) < 5 / (many * TOKENS) ** 0.5
    assert not torch.equal(kept[:100], kept_tokens(8, np.arange(100), TOKENS, KEPT)), "the draws depend on the seed"
    assert torch.equal(kept[50:60], kept_tokens(7, np.arange(50, 60), TOKENS, KEPT)), (
        "the draws depend only on the position"
    )


def test_the_step_at_which_routing_ends() -> None:
    config = Config()
    config.run.max_images = 1000
    assert routed_part(config) == 1.0
    assert routes(config.run, 10**9)
    config.run.route_until_images = 800
    assert [routes(config.run, images) for images in (1, 800, 801)] == [True, True, False]
    assert routed_part(config) == pytest.approx(0.8)
    config.run.route_until_images = 2000
    assert routed_part(config) == 1.0


def test_routing_does_not_change_the_identity_of_the_network() -> None:
    """Routing is like dropout. A middle output layer makes another network, because its weights differ."""
    before = Config()
    routed = replace(before, model=replace(before.model, route_share=0.5, route_blocks=[3, -1]))
    assert network_differences(before, routed) == []
    middle = replace(before, model=replace(before.model, middle_head=4))
    assert network_differences(before, middle) == ["model.middle_head: 0 -> 4"]
