"""Experiments in miniature: workers train, upgrade and measure runs, and resume them after a stop."""

import base64
import json
import multiprocessing
import random
import shutil
import sys
import time
from dataclasses import replace
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jitscale.config import ema_name, load_config
from jitscale.errors import ExitCode, UserError
from jitscale.model.flops import training_flops
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from jitscale.preparation.glyphs import GLYPH_CLASSES, Glyphs
from jitscale.tracking import read_held_out
from studies import bf16, guidance, manifold, routing, samplers, upgrade, upsampling
from studies.run import ROOT, Run, flops_of, images_at
from studies.tasks import OUTCOME, Task, difference, outcomes_of
from studies.ways import Measured, Ways
from tests.support.forking import Process
from tests.support.processes import group_ended
from tests.support.slow import slow_unless
from tools.experiments import EXPERIMENTS, as_text, main

TINY = ("model.hidden_size=32", "model.depth=3", "model.num_heads=2", "model.bottleneck_dim=8", "run.max_images=64")
TINY += ("data.batch_size=16", "evaluation.num_images=16", "evaluation.block_size=16", "evaluation.steps=2")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("glyphs")
    for size in (32, 64):
        glyphs = Glyphs(30, size)
        write_shards(glyphs, glyphs.labels, folder / str(size), class_names=GLYPH_CLASSES)
    return f"data.shards={folder}/{{resolution}}"


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are forks of one process that has already imported everything. This avoids starting new interpreters."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jitscale.training.trainer", "studies.tasks"])
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


@pytest.mark.usefixtures("forked_workers")
def test_runs_and_measurements(shards: str, tmp_path: Path) -> None:
    own = (*TINY, shards)
    low = Run("low_s0", "glyphs_32.yaml", own, evaluation=("evaluation.reference_size=64",), strip=2)
    high = Run("high_s0", "glyphs_64.yaml", own, after="low_s0", measured_every=32)
    changed: dict[str, Any] = {"kernel": "smooth", "as_initial": True}
    fresh = Run("fresh_s0", "glyphs_64.yaml", (*own, "run.init_ema=false"), after="low_s0", **changed)
    with pytest.raises(UserError, match="3 of 3 runs are left after 0 minutes; the same command continues"):
        outcomes_of([fresh, high, low], tmp_path, workers=1, minutes=0)
    found = outcomes_of([fresh, high, low], tmp_path, workers=2)
    assert set(found) == {"low_s0", "high_s0", "fresh_s0"}
    assert [m["images"] for m in found["high_s0"]["measurements"]] == [0, 32, 64]
    assert [m["images"] for m in found["low_s0"]["measurements"]] == [64]
    with Image.open(BytesIO(base64.b64decode(found["low_s0"]["measurements"][0]["strip"]))) as strip:
        assert (strip.mode, strip.size) == ("P", (2 * 32 + 2 * 2, 32 + 2))
    assert all(m["fid"] > 0 and m["num_real_images"] == 30 for o in found.values() for m in o["measurements"])
    assert found["high_s0"]["flops_an_image"] > found["low_s0"]["flops_an_image"]
    assert json.loads((tmp_path / "low_s0" / OUTCOME).read_text()) == found["low_s0"]
    # No run is trained twice: the recorded outcome is returned.
    recorded = {**found["low_s0"], "training_seconds": -1.0}
    (tmp_path / "low_s0" / OUTCOME).write_text(json.dumps(recorded))
    assert outcomes_of([high, low], tmp_path, workers=1) == {"low_s0": recorded, "high_s0": found["high_s0"]}


@pytest.mark.usefixtures("forked_workers")
def test_a_run_that_fails_is_an_error(shards: str, tmp_path: Path) -> None:
    broken = Run("broken_s0", "glyphs_64.yaml", (*TINY, "data.shards=/nowhere"))
    with pytest.raises(UserError, match="/nowhere"):
        outcomes_of([broken], tmp_path, workers=1)


@pytest.mark.slow
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path) -> None:
    program = (
        "import multiprocessing\n"
        "from pathlib import Path\n"
        "from studies.manifold import Toy\n"
        "from studies.tasks import outcomes_of\n"
        "if __name__ == '__main__':\n"
        "    fork = multiprocessing.get_context('fork')\n"
        "    multiprocessing.get_context = lambda method: fork\n"  # The test is not about the start of an interpreter.
        "    toys = [Toy(f'd2_x_s{seed}', 2, 'x', seed, steps=10**6) for seed in range(2)]\n"
        f"    outcomes_of(toys, Path({str(tmp_path)!r}), workers=2)\n"
    )
    (tmp_path / "program.py").write_text(program)
    process = Process([str(tmp_path / "program.py")], start_new_session=True)
    # The first worker writes this file.
    while not (tmp_path / "log.txt").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert group_ended(process.pid)


@pytest.mark.slow
def test_the_figure_and_the_table_of_the_upgrade(tmp_path: Path) -> None:
    outcomes: dict[str, Any] = {}
    random.seed(0)
    for run in (run for seed in range(2) for run in upgrade.tasks(seed)):
        images = run.load(tmp_path).run.max_images or 0
        at = [0] if run.after else []
        at += range(run.measured_every, images + 1, run.measured_every) if run.measured_every else [images]
        outcomes[run.name] = {
            "flops_an_image": 1e8,
            "training_seconds": 1.0,
            "measurements": [
                {"images": n, "fid": 10 + 1e5 / (n + 1e3) + random.random(), "fid_floor": 0.5, "label_agreement": 0.5}
                for n in at
            ],
        }
    summary = json.loads(json.dumps(upgrade.summarise(outcomes)))
    upgrade.draw(summary, tmp_path / "figure.png")
    check_picture(tmp_path / "figure.png")
    upgrade.draw(summary, tmp_path / "again.png")
    assert (tmp_path / "figure.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    described = "\n".join(upgrade.describe(summary))
    assert "scratch_64" in described
    assert "pi-bicubic" in described
    outcomes["tuned_64_s0"]["measurements"][2]["fid"] = 0.0
    shares = upgrade.summarise(outcomes)["share_of_scratch"]["tuned_64"]
    assert shares[0] == pytest.approx(2 * upgrade.TUNED / 8 / upgrade.SCRATCH)


def check_picture(path: Path) -> None:
    """The picture is sharp on a page, has a white background and is small."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "P")
        assert 600 < picture.width <= 2000
        assert picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert path.stat().st_size < 150_000


def tiny_png() -> str:
    png = BytesIO()
    Image.fromarray(np.zeros((6, 20, 3), np.uint8)).save(png, format="png")
    return base64.b64encode(png.getvalue()).decode()


def invented(task: Task, folder: Path) -> dict[str, Any]:
    """An outcome in the form that the task returns.

    Tasks without the trainer are executed at a small size; the numbers of all others are random.
    """
    if isinstance(task, manifold.Toy):
        return replace(task, steps=3, samples=50).execute(folder)
    if isinstance(task, upsampling.Resampling):
        return replace(task, images=40).execute(folder)
    seconds = {"training_seconds": 1.0, "measuring_seconds": 1.0}
    if isinstance(task, guidance.Sweep):
        settings = product(guidance.DECAYS, guidance.INTERVALS, guidance.SCALES)
        names = {guidance._key(ema_name(d), [float(x) for x in i.split(":")], s) for d, i, s in settings}
        return {"fid": {name: 1 + random.random() for name in sorted(names)}, **seconds}
    if isinstance(task, Ways):
        found = {"evaluations": 9, "label_agreement": 0.5}
        ways = {name: {**found, "fid": 1 + random.random(), "error": random.random()} for name in task.ways}
        return {"ways": ways, **seconds}
    assert isinstance(task, Run)
    config = task.load(folder)
    end = config.run.max_images or 0
    at = [*range(task.measured_every, end, task.measured_every), end] if task.measured_every else [end]
    found = {"fid_floor": 0.5, "label_agreement": 0.5, "held_out": 0.2, "strip": tiny_png() if task.strip else None}
    measurements = [{"images": n, "fid": 10 + random.random(), **found} for n in at]
    outcome = {"flops_an_image": 1e8, "measurements": measurements, **seconds}
    if isinstance(task, bf16.Watched):
        losses = {key: [random.random() for _ in range(bf16.POINTS)] for key in bf16.LOSSES}
        outcome |= {"images": [end * (n + 1) // bf16.POINTS for n in range(bf16.POINTS)], **losses}
    return outcome


@pytest.mark.parametrize(
    "name", [slow_unless(name in ("bottleneck", "upsampling"), name) for name in EXPERIMENTS if name != "upgrade"]
)
def test_every_experiment_has_tasks_a_figure_and_a_table(name: str, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    random.seed(0)
    tasks = [task for seed in range(2) for task in experiment.tasks(seed)]
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    assert all(task.after is None or task.after in names for task in tasks)
    assert all(task.cost(tmp_path) > 0 for task in tasks)
    outcomes = {task.name: invented(task, tmp_path) for task in tasks}
    summary = json.loads(json.dumps(experiment.summarise(outcomes)))
    experiment.draw(summary, tmp_path / "figure.png")
    check_picture(tmp_path / "figure.png")
    assert len(experiment.describe(summary)) > 2


@pytest.mark.parametrize("name", [slow_unless(name in ("manifold", "failing"), name) for name in EXPERIMENTS])
def test_the_figure_of_the_page_is_drawn_from_the_stored_numbers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = ROOT / f"docs/experiments/{name}.json"
    assert numbers.stat().st_size < 62_000
    assert as_text(json.loads(numbers.read_text())) == numbers.read_text()
    shutil.copy(numbers, tmp_path)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["experiments.py", name, "--figure-only", "--output", str(tmp_path)])
    assert main() == ExitCode.DONE
    check_picture(tmp_path / f"{name}.png")


def test_noise_of_many_dimensions_cannot_be_predicted(tmp_path: Path) -> None:
    """The toy's claim at a small size: in 512 dimensions x-prediction learns, e-prediction does not."""
    error = {}
    for space in "xe":
        found = manifold.Toy(f"d512_{space}_s0", 512, space, seed=0, steps=50, samples=200).execute(tmp_path)
        error[space] = found["distance"] + found["outside"]
    assert 10 * error["x"] < error["e"]


def test_upsampled_images_have_a_large_distance_from_real_ones(tmp_path: Path) -> None:
    found = upsampling.Resampling("resampled_s0", seed=0, images=300).execute(tmp_path)["found"]
    for kernel, sources in found.items():
        distances = [sources[str(source)]["distance"] for source in upsampling.SOURCES]
        assert distances == sorted(distances, reverse=True), kernel
        assert distances[0] > 5


@pytest.mark.slow
def test_large_patches_need_x_prediction(tmp_path: Path) -> None:
    """The paper's claim at a small size: x-prediction is far better than e-prediction."""
    digits, labels = digit_images(32)
    write_shards(digits, labels, tmp_path / "digits", class_names=DIGIT_CLASSES)
    own = (f"data.shards={tmp_path / 'digits'}", "run.max_images=14400", "evaluation.num_images=128")
    own += ("evaluation.steps=10", "optim.lr=2e-3")
    runs = [
        Run(f"large_{space}_v_s0", "digits_32.yaml", (*own, f"diffusion.prediction={space}", "diffusion.loss=v"))
        for space in "xe"
    ]
    found = outcomes_of(runs, tmp_path / "runs", workers=2)
    fid = {space: found[f"large_{space}_v_s0"]["measurements"][-1]["fid"] for space in "xe"}
    assert 10 * fid["x"] < fid["e"]


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.slow
def test_a_network_is_swept_after_its_training(shards: str, tmp_path: Path) -> None:
    own = (*TINY, shards, "evaluation.block_size=10", "ema.decays=[0.9,0.99,0.995,0.999]")
    run = Run("trained_s0", "glyphs_32.yaml", own)
    sweep = guidance.Sweep("swept_s0", run, samples=10, after=run.name)
    found = outcomes_of([sweep, run], tmp_path, workers=1)
    fid = found["swept_s0"]["fid"]
    assert len(fid) == len(guidance.DECAYS) * (1 + (len(guidance.SCALES) - 1) * len(guidance.INTERVALS))
    assert all(value > 0 for value in fid.values())


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.slow
def test_ways_of_sampling_are_measured_with_one_network(shards: str, tmp_path: Path) -> None:
    own = (*TINY, shards, "data.held_out=0.2", "evaluation.held_out_every_images=64")
    run = Run("trained_s0", "glyphs_32.yaml", own)
    ways = {"as trained": (), "guided ab2": ("evaluation.method=ab2", "evaluation.guidance_scale=1.5")}
    measured = Measured("measured_s0", run, ways, after=run.name)
    found = outcomes_of([measured, run], tmp_path, workers=1)
    at_end = found["trained_s0"]["measurements"][-1]
    by_way = found["measured_s0"]["ways"]
    assert by_way["as trained"]["fid"] == at_end["fid"]
    # Two steps take three evaluations in both cases: Heun and Euler take three; ab2 takes two, and the one at t = 0.5
    # is guided, so it counts twice.
    assert [by_way[way]["evaluations"] for way in ways] == [3, 3]
    assert at_end["held_out"] == read_held_out(tmp_path / "trained_s0")[-1]["held_out/ema_0.995"]

    errors = samplers.Errors("errors_s0", run, {"exact": samplers.EXACT, **ways}, images=2, after=run.name)
    error = {way: numbers["error"] for way, numbers in errors.execute(tmp_path)["ways"].items()}
    assert error["exact"] == 0
    assert 0 < error["as trained"] != error["guided ab2"] > 0


def test_the_number_of_images_for_equal_compute() -> None:
    every, routed = (
        training_flops(load_config(ROOT / "configs" / routing.CONFIG, settings).model)
        for settings in (routing.BASE, routing.ROUTED)
    )
    assert routed < 0.7 * every
    assert flops_of(routing.CONFIG, routing.ROUTED) == routed
    assert flops_of(routing.CONFIG, routing.ROUTED, 0.75) == 0.75 * routed + 0.25 * every
    images = images_at(640 * every, routing.CONFIG, routing.ROUTED, 0.75)
    spent = images * (0.75 * routed + 0.25 * every)
    assert images % 64 == 0
    assert 640 * every - 64 * every < spent <= 640 * every


def test_differences_are_taken_within_a_seed() -> None:
    """Both ways share the data and the noise of a seed.

    So the variation between seeds is not an error of the difference.
    """
    assert difference([1.0, 2.0, 6.0], [1.5, 2.5, 6.5]) == pytest.approx((0.5, 0.0))
    assert difference([0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / 3**0.5))


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.slow
def test_losses_of_both_precisions_on_the_same_data(shards: str, tmp_path: Path) -> None:
    own = (*TINY, shards, "run.max_images=128", "evaluation.held_out_every_images=32", "tracking.log_every_steps=1")
    runs = [replace(task, config="glyphs_32.yaml", settings=(*task.settings, *own)) for task in bf16.tasks(0)]
    runs = [replace(run, settings=(*run.settings, "ema.decays=[0.99]", "evaluation.weights=ema_0.99")) for run in runs]
    found = outcomes_of(runs, tmp_path, workers=2)
    autocast, weights = found["autocast_s0"], found["bf16_s0"]
    assert autocast["images"] == weights["images"] == [32, 64, 96, 128]
    for key in bf16.LOSSES:
        assert len(autocast[key]) == 4
        assert weights[key] == pytest.approx(autocast[key], rel=0.05)
        assert weights[key] != autocast[key]
    lines = [json.loads(line) for line in (tmp_path / "bf16_s0" / "metrics.jsonl").read_text().splitlines()]
    first = [line["loss"] for line in lines if "loss" in line and line["images"] <= 32]
    assert len(first) == 2
    assert weights["loss"][0] == pytest.approx(sum(first) / 2)
