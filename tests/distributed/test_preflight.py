"""The preflight in real processes: healthy ranks, and ranks that are missing."""

from pathlib import Path

import pytest

from jitscale.errors import ExitCode
from tests.support import ROOT
from tests.support.forking import Process
from tests.support.processes import rank_environments, run_ranks


def command(tmp_path: Path) -> list[str]:
    # Nothing is measured, so no feature network is needed. tests/slurm refuses a run whose network is missing.
    settings = [f"run.dir={tmp_path / 'run'}", "run.device=cpu", "evaluation.at_end=false", "evaluation.every_images=0"]
    return ["-m", "jitscale.launch.preflight", "--config", str(ROOT / "configs/jit_b_256.yaml"), *settings]


def test_healthy_ranks_report_their_bandwidth(tmp_path: Path) -> None:
    assert "preflight: 2 ranks on 1 nodes are fit; all-reduce of 64 MiB at " in run_ranks(2, *command(tmp_path))


@pytest.mark.parametrize(
    ("present", "line"),
    [
        (0, "preflight: node b: rank 1 did not connect within 3 s"),
        (1, "preflight: node a: rank 0 does not serve 127.0.0.1:"),
    ],
)
def test_a_missing_rank_is_named_with_its_node(tmp_path: Path, present: int, line: str) -> None:
    environment = {**rank_environments(2)[present], "JITSCALE_NODES": "a,b", "JITSCALE_PREFLIGHT_SECONDS": "3"}
    rank = Process(command(tmp_path), environment)
    said, _ = rank.communicate(timeout=120)
    assert rank.returncode == ExitCode.FAILED
    assert len([text for text in said.splitlines() if text.startswith(line)]) == 1
    assert said.count("preflight: ") == 1
    assert "Traceback" not in said
