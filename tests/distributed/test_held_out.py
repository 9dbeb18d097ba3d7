"""The held-out loss of real runs: equal on any number of ranks, computed once per step, no effect on training."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.preparation.array_shards import write_shards
from jitscale.tracking import read_held_out, read_metrics
from tests.support.forking import Process
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import BATCH, STEPS, Job, losses, same_state, zero_samples
from tests.support.slow import slow_unless

EVERY = 4 * BATCH  # as often as checkpoints are saved
# 20 samples make four blocks. Three ranks get uneven shares of them, and the last block is not full.
SETTINGS = ["data.held_out=0.2", f"evaluation.held_out_every_images={EVERY}", "evaluation.block_size=6"]
SETS = ("model", "ema_0.9", "ema_0.99")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(tmp_path_factory.mktemp("held_out"))


@pytest.fixture(scope="module")
def measured(job: Job) -> list[dict[str, Any]]:
    """All measurements of an uninterrupted run of two ranks."""
    job.train("measured", *SETTINGS)
    return read_held_out(job.folder / "measured")


def without_held_out(run: Path, step: int) -> None:
    """Change the run as if it had been killed between the save of `step` and the end of its measurement."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["step"] < step or (line["step"] == step and "loss" in line)]
    assert len(kept) < len(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_every_set_is_measured_without_an_effect_on_training(job: Job, measured: list[dict[str, Any]]) -> None:
    """Dropout is on. The same samples are held out in a run without measurements."""
    assert [(line["step"], line["images"]) for line in measured] == [(s, s * BATCH) for s in range(4, STEPS + 1, 4)]
    for line in measured:
        assert {f"held_out/{name}" for name in SETS} <= set(line)
        assert sum(key.count("/") == 2 for key in line) == 8 * len(SETS)
        assert 8 < line["held_out_samples"] < 75 - 40
        assert line["held_out_samples"] % 6, "the last block is not full"
        assert line["held_out_bad_samples"] == 0
    assert len({line["held_out/ema_0.9"] for line in measured}) == len(measured), (
        "the weights change between measurements"
    )
    assert len({measured[-1][f"held_out/{name}"] for name in SETS}) == len(SETS)
    unmeasured = job.train("unmeasured", *SETTINGS[:1])
    assert losses(unmeasured) == losses(read_metrics(job.folder / "measured"))
    last = f"checkpoints/step_{STEPS:08d}"
    assert same_state(job.folder / "unmeasured" / last, job.folder / "measured" / last)


@pytest.mark.parametrize(("world_size", "stage"), [(1, 1), slow_unless(False, 2, 1), (3, 3)])
def test_any_number_of_ranks_measures_the_same(
    job: Job, measured: list[dict[str, Any]], world_size: int, stage: int
) -> None:
    """The values are bit-equal. A measurement lost by a kill is made later, and none is made twice."""
    name = f"again_{world_size}"
    saved = STEPS - 4 if world_size == 2 else STEPS  # Two ranks continue in the same way as the unbroken run.
    job.copy("measured", name, steps=saved)
    without_held_out(job.folder / name, saved)
    assert read_held_out(job.folder / name) == measured[: saved // 4 - 1]
    # The second start finds all measurements done.
    for _ in range(2 if world_size == 1 else 1):
        job.train(name, *SETTINGS, f"engine.zero_stage={stage}", world_size=world_size)
        assert read_held_out(job.folder / name) == measured
    assert losses(read_metrics(job.folder / name)) == losses(read_metrics(job.folder / "measured"))


def test_shards_may_be_held_out(job: Job) -> None:
    """The held-out shards contain a bad image, on two ranks. Their number does not change the order of training."""
    images = np.random.default_rng(1).integers(0, 256, (9, 16, 16, 3), np.uint8)
    write_shards(images, np.arange(9), job.folder / "held_16", samples_per_shard=5)
    tar = job.folder / "held_16/shard-000001.tar"
    zero_samples(tar, slice(1, 2))
    pattern = f"data.held_out={job.folder}/held_{{resolution}}"
    ranks = start_ranks(2, *job.command("shards", pattern, *SETTINGS[1:], "run.max_steps=4"))
    said, other = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0], said + other
    (line,) = read_held_out(job.folder / "shards")
    assert (line["held_out_samples"], line["held_out_bad_samples"]) == (8, 1)
    assert re.search(r"held-out loss of ema_0.99: \d\S* on 8 samples", said)
    without = "the held-out loss is measured without it"
    assert (said.count(without), other.count(without)) == (0, 1), "rank 1 reads the bad image and reports it once"
    whole = job.train("whole", "run.max_steps=4")
    assert [one["loss"] for one in read_metrics(job.folder / "shards")] == [one["loss"] for one in whole]
    job.copy("whole", "whole_and_more", steps=4)
    refused = run_ranks(1, *job.command("whole_and_more", pattern), expect=2)
    assert "the data or its order changed (held_out: None -> " in refused


def test_another_held_out_set_is_refused(job: Job, measured: list[dict[str, Any]]) -> None:
    """Held-out samples would be trained on, or the other way round.

    The four cases run in parallel, each in its own process.
    """
    changes = {
        "fraction": ("data.held_out=0.3", "held_out: 0.2 -> 0.3"),
        "none": ("data.held_out=null", "held_out: 0.2 -> None"),
        "shards as new ones": ("data.accept_new_shards=true", "held_out: 0.2 -> 0.3"),
    }
    started = {}
    for name, (override, _) in changes.items():
        job.copy("measured", name, steps=8)
        settings = [f"evaluation.held_out_every_images={0 if name == 'none' else EVERY}", override]
        settings += ["data.held_out=0.3"] if name == "shards as new ones" else []
        started[name] = Process(job.command(name, *settings))
    for name, process in started.items():
        errors, _ = process.communicate(timeout=120)
        said = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert process.returncode == 2, errors
        assert len(said) == 1, errors
        assert f"the data or its order changed ({changes[name][1]}); restore data.shards, data.held_out" in said[0]
        assert len(complete_checkpoints(job.folder / name)) == 2
