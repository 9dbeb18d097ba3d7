"""jitscale/recorded.py, and therefore docs/reference.md, lists exactly the metrics and files of runs."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitscale.recorded import (
    EVALUATION_METRICS,
    FILES,
    HELD_OUT_METRICS,
    RESULT_ENTRIES,
    STEP_METRICS,
    WANDB_RECORDS,
)
from jitscale.run_folder import Attempts
from jitscale.tracking import read_evaluations, read_held_out, read_metrics
from jitscale.training.stopping import HangWatch
from tests.support.processes import run_ranks
from tests.support.recorded import check_recorded, files_of, matching, never_logged, unknown
from tests.support.runs import BATCH, Job
from tests.support.tools import run_tool
from tests.support.wandb_records import keys_of

OFTEN = 13 * BATCH  # once, before the profile starts
# A run that uses every feature that records something.
EVERYTHING = [
    *("--profile", "tracking.wandb=offline", "model.middle_head=1"),
    "run.max_steps=25",  # A profile ends with step 25, or at the end of a shorter run.
    *("progressive.resolutions=[8]", f"progressive.images=[{BATCH}]"),
    *("data.held_out=0.2", f"evaluation.held_out_every_images={OFTEN}"),
    *("ema.power_widths=[0.1]", f"ema.snapshot_every_images={OFTEN}"),
    *("evaluation.features=digits", "evaluation.more_features=[glyphs]", "evaluation.block_size=10"),
    *("evaluation.steps=2", "evaluation.num_images=20", "evaluation.at_end=true"),
    *("evaluation.sweep=[guidance=1:2:1]", "evaluation.sweep_images=10"),
    *(f"evaluation.every_images={OFTEN}", "evaluation.few_images=10", f"evaluation.grid_every_images={OFTEN}"),
]
ON_GPUS = {"mfu"}
# Metrics of Inception and of DINOv2 as the main network. Below: files that only a kill or another machine leaves.
WITH_OTHER_NETWORKS = {"sfid", "kd_NETWORK", "kd_NETWORK_std"}
WITH_ANOTHER_SWEEP = {"DISTANCE_over_internal_guidance"}
LEFT_BY_A_KILL = {"*/*.partial/*", "**/.*.partial", ".*.partial/**", ".preflight*"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of that run, after an evaluation, with its gallery page."""
    job = Job(tmp_path_factory.mktemp("recorded"))
    in_the_way = job.folder / "shards/real_images"
    in_the_way.touch()  # This is a file, so the statistics of real images lie in the run's folder.
    job.train("run", *EVERYTHING, world_size=1)
    folder = job.folder / "run"
    run_ranks(1, "-m", "jitscale.evaluate", "--run-dir", str(folder))
    assert run_tool("gallery", folder).code == 0
    Attempts.begin(folder, position=0)  # A Slurm job's supervisor does this.
    watch = HangWatch(1000.0, folder / "stacks_rank_00000.txt")  # This file exists while the run is at work.
    yield folder
    watch.close()


def test_every_record_of_a_run_has_an_entry(run: Path) -> None:
    check_recorded(run)
    logged = (*STEP_METRICS, *HELD_OUT_METRICS, *WANDB_RECORDS)
    assert unknown(keys_of(run), logged) == set()
    for path in (run / "result.json", *(run / "results").glob("*.json")):
        assert unknown(json.loads(path.read_text()), (*EVALUATION_METRICS, *RESULT_ENTRIES)) == set()


def test_every_entry_is_recorded_by_some_run(run: Path) -> None:
    steps, held_out, evaluations = (
        {key for line in read(run) for key in line} for read in (read_metrics, read_held_out, read_evaluations)
    )
    assert never_logged(steps, STEP_METRICS) == ON_GPUS
    assert never_logged(held_out, HELD_OUT_METRICS) == set()
    assert never_logged(evaluations, EVALUATION_METRICS) == WITH_OTHER_NETWORKS
    assert never_logged(json.loads((run / "result.json").read_text()), RESULT_ENTRIES) == set()
    assert never_logged(keys_of(run), WANDB_RECORDS) == WITH_ANOTHER_SWEEP
    files = files_of(run)
    assert {one.path for one in FILES if not matching(one.path, files)} == LEFT_BY_A_KILL


def test_a_record_without_an_entry_is_found(tmp_path: Path) -> None:
    check_recorded(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss_t3": 1.0, "speed": 2.0}\n')
    with pytest.raises(AssertionError, match=r"\{'speed'\} is in no list of jitscale/recorded\.py"):
        check_recorded(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/loss.png").touch()
    with pytest.raises(AssertionError, match=r"\{'samples/loss\.png'\} is in no list"):
        check_recorded(tmp_path)
    (tmp_path / "samples/loss.png").rename(tmp_path / "samples/images_000000000008.png")
    (tmp_path / "samples/.images_000000000008.png.node1.77.partial").touch()
    check_recorded(tmp_path)
