"""Many ways of sampling from one trained network, each measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jitscale import parallel
from jitscale.checkpoints.opening import open_weights
from jitscale.config import Config
from jitscale.diffusion.sampler import Sampler
from jitscale.evaluation.evaluator import Evaluator
from jitscale.evaluation.final import measure_points
from jitscale.evaluation.generate import configured_sampler, ready_on_all_ranks
from jitscale.model.flops import TRAINING_PASSES
from jitscale.model.jit import JiT
from studies.run import Run
from studies.tasks import Outcomes, Task, by_seed


@dataclass(frozen=True)
class Ways(Task):
    """A task that samples from the network of a finished run in several ways."""

    run: Run
    ways: Mapping[str, tuple[str, ...]]  # name -> settings of `evaluation` that this way changes

    def cost(self, folder: Path) -> int:
        configs = self.configs(folder)
        evaluations = sum(c.evaluation.num_images * sum(sampler_of(c).evaluations()) for c in configs.values())
        return max(1, evaluations // TRAINING_PASSES)

    def configs(self, folder: Path) -> dict[str, Config]:
        """The run's configuration with the settings of each way."""
        return {name: self.run.load(folder, *settings) for name, settings in self.ways.items()}

    def network(self, folder: Path, world: parallel.World) -> JiT:
        """The run's network at its end, ready to sample."""
        config = self.run.load(folder)
        stored = open_weights(folder / self.run.name)
        return ready_on_all_ranks(stored.network(config.evaluation.weights, world.device), config, world)


@dataclass(frozen=True)
class Measured(Ways):
    """Measures the distances of all ways."""

    def execute(self, folder: Path) -> dict[str, Any]:
        """By the name of the way: `fid`, `label_agreement`, and `evaluations` of the network for each image."""
        world = parallel.start(parallel.choose_device("cpu"))
        network, configs = self.network(folder, world), self.configs(folder)
        evaluator = Evaluator(self.run.load(folder), world, folder / self.name)
        points = [config.evaluation for config in configs.values()]
        measured = measure_points(points, lambda weights: network, evaluator, neighbours=False)
        found = {}
        for (name, config), (_, metrics) in zip(configs.items(), measured, strict=True):
            evaluations = sum(sampler_of(config).evaluations())
            found[name] = {"evaluations": evaluations, **{key: metrics[key] for key in ("fid", "label_agreement")}}
        return {"ways": found}


def sampler_of(config: Config) -> Sampler:
    """The sampler of `config.evaluation`."""
    return configured_sampler(config.evaluation, config.diffusion)


def of_ways(outcomes: Outcomes, name: str, key: str) -> dict[str, list[Any]]:
    """By the name of the way, `key` of the tasks NAME_sSEED, from seed 0 on."""
    seeds = [outcome["ways"] for outcome in by_seed(outcomes, name)]
    return {way: [seed[way][key] for seed in seeds] for way in seeds[0]}
