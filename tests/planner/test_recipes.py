"""The shipped recipes and scripts are what the planner recommends."""

import re

import pytest

from jitscale.config import load_config
from jitscale.planner.choice import recommend
from jitscale.planner.timing import Cluster
from tests.support import ROOT


def job_of(name: str) -> tuple[str, int]:
    """The configuration and the number of GPUs of a script in slurm/."""
    script = (ROOT / "slurm" / name).read_text()
    nodes, ranks = (int(re.findall(rf"--{option}=(\d+)", script)[0]) for option in ("nodes", "ntasks-per-node"))
    return re.findall(r"^supervise train --config (\S+)", script, re.MULTILINE)[0], nodes * ranks


JOBS = [
    *(job_of(path.name) for path in sorted((ROOT / "slurm").glob("train_*.sh"))),
    *((f"configs/jit_{size}.yaml", 64) for size in ("h_256", "h_512", "g_256", "g_512")),
]


@pytest.mark.parametrize("memory", [80e9, 141e9])
@pytest.mark.parametrize(("path", "gpus"), JOBS)
def test_the_planner_recommends_what_the_recipe_sets(path: str, gpus: int, memory: float) -> None:
    config = load_config(ROOT / path, world_size=gpus)
    choice = recommend(config, Cluster(gpus=gpus, gpu_memory=memory))
    assert choice is not None
    engine, share = config.engine, config.data.batch_size // gpus
    expected = (engine.zero_stage, engine.micro_batch_size or share, engine.activation_checkpointing)
    assert (choice.stage, choice.micro_batch_size, choice.activation_checkpointing) == expected
