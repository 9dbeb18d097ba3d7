"""Who we are: torchrun, srun, plain python."""

from __future__ import annotations

import os

import pytest

from jitscale import parallel
from jitscale.errors import ConfigError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in LAUNCHER or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in LAUNCHER:  # so that what the code sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_plain_python_is_a_world_of_one() -> None:
    assert parallel.adopt_launcher_environment() == 1
    assert [os.environ[name] for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR")] == ["0", "0", "127.0.0.1"]
    assert int(os.environ["MASTER_PORT"]) > 1023


def test_torchrun_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    assert parallel.adopt_launcher_environment() == 8
    assert os.environ["MASTER_PORT"] == "7"


def srun(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NODELIST": "node[1-4]",
        "MASTER_ADDR": "node1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_srun_tasks_are_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    srun(monkeypatch)
    assert parallel.adopt_launcher_environment() == 8
    assert (os.environ["RANK"], os.environ["LOCAL_RANK"]) == ("5", "1")
    assert os.environ["MASTER_PORT"] == str(20_000 + 123_456 % 20_000)


def test_a_batch_script_is_not_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside sbatch, but not under srun: Slurm's variables are there, its tasks are not."""
    srun(monkeypatch)
    monkeypatch.delenv("SLURM_STEP_ID")
    monkeypatch.delenv("MASTER_ADDR")
    assert parallel.adopt_launcher_environment() == 1


def test_cuda_that_is_not_there_is_refused() -> None:
    assert parallel.choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        parallel.choose_device("cuda")


def test_everything_works_in_one_process() -> None:
    assert parallel.gather_objects("a") == ["a"]
    assert parallel.broadcast_object("a") == "a"
    assert parallel.any_rank(True)
    assert not parallel.any_rank(False)
    assert parallel.together(lambda: 3) == 3
