"""Training runs that are measured on the way and at their end."""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from jitscale.checkpoints.format import complete_checkpoints
from tests.support.evaluations import CHECKPOINT, Evaluation
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import wait_for_steps


def test_a_training_is_measured_on_the_way(evaluation: Evaluation) -> None:
    """The measurement uses few images and removes its blocks. A resumed run does not measure twice."""
    shards = f"data.shards={evaluation.folder / 'shards'}"
    on_the_way = ["evaluation.every_images=24", "evaluation.few_images=16", "tracking.log_every_steps=1"]
    sizes = [
        "run.max_steps=null",
        "data.batch_size=8",
        "data.num_workers=0",
        "checkpoint.every_images=24",
        "engine.zero_stage=2",
    ]
    command = ["-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", shards, *on_the_way, *sizes]
    folder = evaluation.folder / "measured"
    command.append(f"run.dir={folder}")
    said = run_ranks(2, *command, "run.max_images=48")
    assert "24 images: FID " in said

    def lines() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]

    assert [(line["step"], line["images"], line["num_images"]) for line in lines()] == [(3, 24, 16), (6, 48, 16)]
    assert all(line["fid_16"] > 0 and "fid" not in line for line in lines()), (
        "the file is named after the number of images"
    )
    assert not list(folder.glob("evaluation/*")), (
        "no blocks are left; the statistics of the real images lie next to the shards"
    )
    first, second = lines()
    # The run looks as if it had been killed between the save of step 6 and the end of its measurement.
    (folder / "evaluations.jsonl").write_text(json.dumps(first) + "\n")
    run_ranks(2, *command, "run.max_images=72")
    assert [line["images"] for line in lines()] == [24, 48, 72]
    assert lines()[:2] == [first, second]


@pytest.fixture(scope="module")
def swept(evaluation: Evaluation) -> tuple[Path, list[str], str]:
    """The folder, the command and the output of a training run that ends with a sweep."""
    folder = evaluation.folder / "finished"
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0", "run.max_steps=3"),
        *(
            "evaluation.at_end=true",
            "evaluation.every_images=8",
            "evaluation.few_images=10",
            "evaluation.sweep_images=16",
        ),
        'evaluation.sweep=[ema=averages,"guidance=1,2"]',
    ]
    return folder, command, run_ranks(2, *command)


def test_the_end_of_a_training_is_the_configured_sweep(swept: tuple[Path, list[str], str]) -> None:
    folder, _, said = swept
    assert "measuring: 2 x 10 images during training" in said
    assert "4 settings x 16 in a sweep" in said
    assert "after 3 steps, 100% of ema_0.9999 are the initial weights" in said
    assert "evaluation.num_images=70 is fewer" not in said
    result = json.loads((folder / "result.json").read_text())
    assert len(result["table"]) == 4 + 1
    assert {row["weights"] for row in result["table"]} == {"ema_0.9999", "ema_0.9996"}
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3], "the last step is measured by the final evaluation alone"
    assert lines[2]["fid"] == result["fid"]
    assert len(list((folder / "best_samples").glob("*.png"))) == 1


@pytest.mark.slow
def test_no_other_measurement_replaces_the_final_result(swept: tuple[Path, list[str], str]) -> None:
    """Any command may write this result.json.

    Other measurements are stored under their protocol and do not replace it.
    """
    folder, command, _ = swept
    result = json.loads((folder / "result.json").read_text())
    written = (folder / "result.json").stat().st_mtime_ns
    run = ["--run-dir", str(folder)]
    run_ranks(1, "-m", "jitscale.evaluate", *run, "--weights=model", "evaluation.num_images=40")
    run_ranks(1, "tools/evaluate_fid.py", "--checkpoint", str(folder), "--sweep", "guidance=1,3", "--coarse", "10")
    assert (folder / "result.json").stat().st_mtime_ns == written
    assert len(list((folder / "results").glob("*.json"))) == 3
    # If the finished run is asked for another evaluation, its result is recorded but replaces no earlier line.
    run_ranks(2, *command, "evaluation.num_images=60")
    other = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["fid"], line["num_images"]) for line in lines[2:]] == [(result["fid"], 70), (other["fid"], 60)]
    assert {line["step"] for line in lines[2:]} == {3}
    # If a run is not complete, its newest checkpoint is not its end.
    (folder / "result.json").unlink()
    longer = (folder / "config.yaml").read_text().replace("max_steps: 3", "max_steps: 30")
    (folder / "config.yaml").write_text(longer.replace("num_images: 60", "num_images: 70"))
    run_ranks(1, "-m", "jitscale.evaluate", *run)
    assert not (folder / "result.json").exists()
    (folder / "config.yaml").write_text(longer.replace("max_steps: 30", "max_steps: 3").replace("s: 60", "s: 70"))
    run_ranks(1, "tools/evaluate_fid.py", "--checkpoint", str(folder))
    assert json.loads((folder / "result.json").read_text()) == result
    (folder / "result.json").unlink()
    run_ranks(1, "-m", "jitscale.evaluate", *run)
    assert json.loads((folder / "result.json").read_text()) == result
    assert len(list((folder / "results").glob("*.json"))) == 4


def test_missing_parts_of_the_evaluation_are_reported_before_the_first_step(evaluation: Evaluation) -> None:
    """There are two ranks. The other refusals are tested in tests/evaluation/test_measuring.py."""
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", "data.batch_size=8"),
        *(
            f"run.dir={evaluation.folder / 'never'}",
            f"data.shards={evaluation.folder / 'shards'}",
            "data.num_workers=0",
        ),
        *("evaluation.features=inception", "evaluation.features_dir=/tmp/no_weights_here", "evaluation.every_images=8"),
    ]
    said = run_ranks(2, *command, "evaluation.at_end=true", expect=2)
    message = "on a machine with a network: python tools/fetch_weights.py --output /tmp/no_weights_here inception"
    assert sum(line.startswith("error: ") and message in line for line in said.splitlines()) == 1, said
    assert not (evaluation.folder / "never").exists()
    assert "at_end: true" in run_ranks(1, *command, "evaluation.at_end=true", "--print-config"), (
        "without a measurement there is no refusal"
    )
    said = run_ranks(2, *command, "evaluation.at_end=false")
    assert "evaluation.at_end=false: nothing is measured during training either: /tmp/no_weights_here/weights-" in said
    assert not (evaluation.folder / "never/evaluations.jsonl").exists()
    assert not (evaluation.folder / "never/result.json").exists()


def test_a_signal_ends_a_measurement_on_the_way(evaluation: Evaluation) -> None:
    """The run stops at once and saves the step. The next start makes the measurement."""
    folder = evaluation.folder / "signalled"
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0"),
        *("run.max_steps=5", "evaluation.every_images=24"),
    ]
    (rank,) = start_ranks(1, *command, "evaluation.few_images=100000")
    said = line = ""
    # An image has been generated.
    while re.match(r"generate: .* [1-9]\d*/", line) is None:
        line = rank.stdout.readline()  # type: ignore[union-attr]
        assert line, said
        said += line
    rank.terminate()
    assert rank.wait(timeout=5) == 75, rank.communicate()[0]
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000003"]
    run_ranks(2, *command, "evaluation.few_images=16")
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["num_images"]) for line in lines] == [(3, 16)]


def test_only_the_end_of_a_run_is_its_result(evaluation: Evaluation) -> None:
    """Measurements of other weights and of earlier steps never replace the result.json of a run.

    An unfinished run has none.
    """
    folder = evaluation.folder / "whose"
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0"),
        *("checkpoint.every_images=8", "evaluation.at_end=true", "evaluation.num_images=10"),
    ]
    run_ranks(1, *command)
    written = (folder / "result.json").read_bytes()
    config = f"--config={folder / 'config.yaml'}"
    said = run_ranks(1, "-m", "jitscale.evaluate", f"--checkpoint={CHECKPOINT}", config)
    assert "result.json is not written: these weights are not the end of the run" in said
    assert (folder / "result.json").read_bytes() == written
    run_ranks(1, *command, "run.max_steps=2", "evaluation.at_end=false")
    assert not (folder / "result.json").exists(), "the run was continued"
    said = run_ranks(1, "tools/evaluate_fid.py", f"--checkpoint={folder / 'checkpoints/step_00000001'}", config)
    assert "these weights are not the end of the run" in said
    assert not (folder / "result.json").exists()
    assert len(list((folder / "results").glob("*.json"))) == 2, (
        "the first step's result, its repetition, and the result of the other weights"
    )


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_a_full_disk_loses_measurements_only(evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the way, training continues without measurements.

    At the end, all training is saved, and the run ends with one line and exit code 1.
    """
    folder, cache = evaluation.folder / "full", evaluation.folder / "full_cache"
    cache.mkdir()
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0"),
        *("run.max_steps=12", "evaluation.every_images=32", "evaluation.few_images=16", "tracking.log_every_steps=1"),
        *(f"evaluation.cache_dir={cache}", "evaluation.at_end=true"),
    ]
    monkeypatch.setenv("JITSCALE_FAULTS", "slow:step=1:times=1000:seconds=0.5")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(cache)], check=True)
    try:
        ranks = start_ranks(2, *command)
        wait_for_steps(ranks, folder, 1)
        with suppress(OSError), (cache / "filling").open("wb") as file:
            file.write(bytes(2**23))
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [1, 1], outputs
        assert "Traceback" not in "".join(outputs)
        assert outputs[0].count("a measurement failed, training goes on") == 2
        assert outputs[0].count("error: ") == 1
        assert "No space left on device" in outputs[0].splitlines()[-1]
        assert outputs[0].splitlines()[-1].endswith("start the same command again to do the rest")
        assert [path.name for path in complete_checkpoints(folder)][-1] == "step_00000012"
        assert not (folder / "complete_train.json").exists()
        (cache / "filling").unlink()
        (folder / "complete_train.json").mkdir()
        said = run_ranks(2, *command, expect=1)
        assert (folder / "result.json").exists()
        assert re.search(r"error: .*complete_train.json.*; the trained state is saved", said)
        assert "Traceback" not in said
    finally:
        subprocess.run(["umount", str(cache)], check=True)


@pytest.mark.slow
def test_a_signal_ends_a_measurement_of_a_step_that_is_not_saved(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that is not finite is saved only at the end.

    The run stops after the next block, and does not finish the measurement.
    """
    folder = evaluation.folder / "unsaved"
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0"),
        *("run.max_steps=5", "evaluation.every_images=24", "evaluation.few_images=100000"),
    ]
    monkeypatch.setenv("JITSCALE_FAULTS", "nan:step=3:rank=1")
    ranks = start_ranks(2, *command)
    said = line = ""
    while re.match(r"generate: .* [1-9]\d*/", line) is None:
        line = ranks[0].stdout.readline()  # type: ignore[union-attr]
        assert line, said
        said += line
    assert not complete_checkpoints(folder)
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [130, 130], outputs
    assert "saved at step 3" in outputs[0]
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000003"]
