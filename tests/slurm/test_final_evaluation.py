"""A job ends with its final number: all ranks sweep, a requeue changes nothing, missing parts are reported first."""

import json
import shutil
from pathlib import Path

import pytest

from tests.slurm.conftest import BATCH, Runs
from tests.support.processes import run_ranks

pytestmark = pytest.mark.cluster

SCALES = 17
EVALUATION = (
    *("evaluation.features=digits", "evaluation.at_end=true", "evaluation.sweep_max_share=null", "run.max_steps=8"),
    *(f"evaluation.every_images={4 * BATCH}", "evaluation.few_images=16", "evaluation.num_images=200"),
    *("evaluation.sweep_images=160", "evaluation.block_size=4", "evaluation.steps=10"),
    f'evaluation.sweep=[ema=averages,"guidance=1:{1 + 0.125 * (SCALES - 1)}:0.125"]',
)


def blocks(run_dir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run_dir.glob("evaluation/samples_*/block_*.npz")}


def test_the_job_ends_with_its_sweep(runs: Runs) -> None:
    """The job is requeued in the middle of its sweep. tools/evaluate_fid.py gives the same result.

    A second job has nothing to do.
    """
    cluster, run_dir = runs.cluster, runs.folder / "measured"
    job = runs.submit("measured", *EVALUATION)
    whole = SCALES * 160 // 4 + 10
    cluster.wait_for(lambda: len(blocks(run_dir)) > whole // 5, 120, f"no sweep: {runs.log('measured')[-3000:]}")
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for(lambda: int(cluster.job(job)["Restarts"]) == 1, 60, "not requeued")
    before = blocks(run_dir)
    assert whole // 5 < len(before) < whole, "the requeue came in the middle of the sweep"
    assert not (run_dir / "result.json").exists()
    assert cluster.wait(job, seconds=240) == "COMPLETED", runs.log("measured")[-4000:]
    after = blocks(run_dir)
    assert len(after) == whole
    assert {path: after[path] for path in before} == before, "finished blocks are not generated again"
    log = runs.log("measured")
    assert f"{SCALES} settings x 160 in a sweep" in log
    assert "of the run's compute" in log

    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["table"]) == SCALES + 1
    assert result["num_images"] == 200
    assert (run_dir / "sweep.svg").exists()
    assert list((run_dir / "best_samples").glob("*.png"))
    measured = [json.loads(line) for line in (run_dir / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], "fid_16" in line, "fid" in line) for line in measured] == [
        (4, True, False),
        (8, False, True),
    ]

    again = runs.submit("measured_again", *EVALUATION, f"run.dir={run_dir}")
    assert cluster.wait(again) == "COMPLETED"
    assert "is complete; there is no work left" in runs.log("measured_again")
    assert "preflight" not in runs.log("measured_again")
    assert blocks(run_dir) == after

    for name in ("evaluation", "results"):
        shutil.rmtree(run_dir / name)
    (run_dir / "result.json").unlink()
    run_ranks(2, "tools/evaluate_fid.py", "--checkpoint", str(run_dir))
    assert json.loads((run_dir / "result.json").read_text()) == result


def test_missing_parts_are_reported_before_the_first_step(runs: Runs) -> None:
    cluster, weights = runs.cluster, runs.folder / "no_weights"
    job = runs.submit(
        "unmeasurable", *EVALUATION, "evaluation.features=inception", f"evaluation.features_dir={weights}"
    )
    assert cluster.wait(job) == "FAILED"
    log = runs.log("unmeasurable")
    assert f"on a machine with a network: python tools/fetch_weights.py --output {weights} inception" in log
    assert cluster.job(job)["ExitCode"] == "2:0"
    assert cluster.job(job)["Restarts"] == "0"
    assert "Traceback" not in log
    assert not (runs.folder / "unmeasurable/config.yaml").exists()
