"""The shipped recipes, the scripts and the table in docs/train.md agree with the planner's recommendations."""

import re

import pytest

from jitscale.config import Config, load_config
from jitscale.planner.choice import Candidate, recommend
from jitscale.planner.timing import Cluster
from tests.support import ROOT


def job_of(name: str) -> tuple[str, int]:
    """The configuration and the number of GPUs of a script in slurm/."""
    script = (ROOT / "slurm" / name).read_text()
    nodes, ranks = (int(re.findall(rf"--{option}=(\d+)", script)[0]) for option in ("nodes", "ntasks-per-node"))
    return re.findall(r"^supervise train --config (\S+)", script, re.MULTILINE)[0], nodes * ranks


def rows() -> list[tuple[str, ...]]:
    """The rows of the table of settings in docs/train.md: model, GPUs, GB of a GPU, settings, GB that it needs."""
    row = r"^\| ([BLHG]) \| (\d+) \| (\d+) \| (.+) \| ([\d.]+) \|$"
    return re.findall(row, (ROOT / "docs/train.md").read_text(), re.MULTILINE)


JOBS = [
    *(job_of(path.name) for path in sorted((ROOT / "slurm").glob("train_*.sh"))),
    *((f"configs/jit_{size}.yaml", 64) for size in ("h_256", "h_512", "g_256", "g_512")),
]


@pytest.mark.parametrize("memory", [80e9, 141e9])
@pytest.mark.parametrize(("path", "gpus"), JOBS)
def test_the_planner_recommends_the_settings_of_the_recipe(path: str, gpus: int, memory: float) -> None:
    recommended(load_config(ROOT / path, world_size=gpus), Cluster(gpus=gpus, gpu_memory=memory))


def test_the_page_has_rows() -> None:
    assert {row[0] for row in rows()} == set("BLHG")


@pytest.mark.parametrize(("model", "gpus", "memory", "settings", "needed"), rows())
def test_the_page_has_the_recommended_settings(model: str, gpus: str, memory: str, settings: str, needed: str) -> None:
    cluster = Cluster(gpus=int(gpus), gpu_memory=float(memory) * 1e9)
    overrides = [] if settings == "none" else settings.strip("`").split()
    config = load_config(ROOT / f"configs/jit_{model.lower()}_256.yaml", overrides, world_size=cluster.gpus)
    assert f"{recommended(config, cluster).memory.total / 1e9:.1f}" == needed


def recommended(config: Config, cluster: Cluster) -> Candidate:
    """The planner's recommendation. It must equal the settings of `config`."""
    choice = recommend(config, cluster)
    assert choice is not None
    engine, share = config.engine, config.data.batch_size // cluster.gpus
    expected = (engine.zero_stage, engine.micro_batch_size or share, engine.activation_checkpointing)
    assert (choice.stage, choice.micro_batch_size, choice.activation_checkpointing) == expected
    return choice
