"""`python -m jitscale.evaluate` in real processes: the result does not depend on how many there are."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.data.digits import DIGIT_CLASSES, digit_images
from jitscale.data.packing import write_shards
from jitscale.files import exclusive
from tests.support import FILES
from tests.support.processes import run_ranks, start_ranks
from tests.support.runs import zero_samples
from tests.support.tiny import model_yaml

CHECKPOINT = FILES / "jit_tiny_heun.checkpoint-last.pth"
CONFIG = """
MODEL
engine: {precision: fp32}
ema: {decays: [0.9999, 0.9996]}
evaluation: {features: digits, num_images: 70, block_size: 8, steps: 3, guidance_scale: 2.0}
run: {max_steps: 1, device: cpu}
""".replace("MODEL", model_yaml(depth=3))


class Evaluation:
    """The authors' checkpoint measured against digits of 16 px."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        images, labels = digit_images(16)
        write_shards(images[:200], labels[:200], folder / "shards", samples_per_shard=64, class_names=DIGIT_CLASSES)
        (folder / "config.yaml").write_text(CONFIG)

    def command(self, output: str, *overrides: str) -> list[str]:
        return [
            "-m",
            "jitscale.evaluate",
            f"--checkpoint={CHECKPOINT}",
            f"--config={self.folder / 'config.yaml'}",
            f"run.dir={self.folder / output}",
            f"evaluation.reference={self.folder / 'shards'}",
            *overrides,
        ]

    def run(self, output: str, *overrides: str, world_size: int = 1) -> dict[str, Any]:
        run_ranks(world_size, *self.command(output, *overrides))
        return json.loads((self.folder / output / "result.json").read_text())

    def blocks(self, output: str) -> dict[str, Path]:
        return {str(path.relative_to(self.folder / output)): path for path in self.folder.glob(f"{output}/**/*.npz")}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def alone(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.run("alone")


def assert_same_features(evaluation: Evaluation, first: str, second: str) -> None:
    a, b = evaluation.blocks(first), evaluation.blocks(second)
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.load(a[name]), np.load(b[name])
        assert all(np.array_equal(x[key], y[key]) for key in x.files), name


def test_the_result_says_how_it_was_made(alone: dict[str, Any]) -> None:
    assert alone["num_images"] == 70
    assert alone["num_real_images"] == 200
    assert alone["fid"] > 3 * alone["fid_floor"] > 0
    assert alone["kid"] > 3 * abs(alone["kid_floor"])
    assert alone["best"] == {"weights": "ema_0.9999", "guidance_scale": 2.0, "guidance_interval": [0.1, 1.0]}
    assert [row["fid"] for row in alone["table"]] == [alone["fid"]]
    reference = alone["reference"]
    assert reference["stored"] == {"codec": "png", "resolution": 16, "crop": None}
    assert (reference["crop"], reference["image_size"], reference["images"]) == ("adm", 16, 200)
    assert 1.0 <= alone["inception_score"] <= 10.0
    assert 0.0 <= alone["label_agreement"] <= 1.0
    protocol = alone["protocol"]
    assert (protocol["weights"], protocol["noise_scale"]) == ("ema_0.9999", 1.0)
    assert protocol["sampler"]["guidance_scale"] == 2.0
    assert (protocol["labels"], protocol["sampler"]["t_eps"]) == ("balanced", 0.05)
    assert (protocol["precision"], protocol["float8"], protocol["device"]) == ("fp32", False, "cpu")
    assert len(protocol["features_sha256"]) == len(protocol["weights_sha256"]) == 64


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_features(
    evaluation: Evaluation, alone: dict[str, Any], world_size: int
) -> None:
    """Bitwise, and the last block is not full."""
    assert evaluation.run(f"world_{world_size}", world_size=world_size) == alone
    assert len(evaluation.blocks("alone")) == 9
    assert_same_features(evaluation, "alone", f"world_{world_size}")


def test_statistics_made_once_stand_for_the_images(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Made by two ranks, used by one; also a file with mu and sigma only; of another network they are refused."""
    path = evaluation.folder / "real.npz"
    shards = f"evaluation.reference={evaluation.folder / 'shards'}"
    command = ["tools/make_reference.py", "--config", str(evaluation.folder / "config.yaml"), "--output", str(path)]
    said = run_ranks(2, *command, shards)
    assert '"images": 200' in said
    result = evaluation.run("statistics", f"evaluation.reference={path}")
    assert result["fid"] == pytest.approx(alone["fid"], rel=1e-9)
    assert result["fid_floor"] == alone["fid_floor"]
    assert result["reference"]["features_sha256"] == alone["protocol"]["features_sha256"]
    assert "kid" not in result
    assert "kid" in alone
    with np.load(path) as content:
        np.savez(evaluation.folder / "plain.npz", mu=content["mu"], sigma=content["sigma"])
        np.savez(evaluation.folder / "small.npz", mu=content["mu"][:5], sigma=content["sigma"][:5, :5])
    plain = evaluation.run("statistics", f"evaluation.reference={evaluation.folder / 'plain.npz'}")
    assert plain["fid"] == result["fid"]
    for name, message in (
        ("small.npz", "the network digits has 64 features"),
        ("config.yaml.npz", "no statistics with mu and sigma"),
    ):
        said = run_ranks(
            1, *evaluation.command("refused", f"evaluation.reference={evaluation.folder / name}"), expect=2
        )
        assert message in said
    other = run_ranks(
        1, *evaluation.command("refused", f"evaluation.reference={path}", "evaluation.features=glyphs"), expect=2
    )
    assert "evaluation.features=glyphs has" in other
    assert "exists already" in run_ranks(1, *command, shards, expect=2)


def test_further_networks_see_the_same_images(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Beside the main one, whose numbers do not change; against images and against their statistics."""
    more = "evaluation.more_features=[glyphs]"
    result = evaluation.run("further", more, world_size=2)
    assert {key: result[key] for key in ("fid", "kid", "inception_score")} == {
        key: alone[key] for key in ("fid", "kid", "inception_score")
    }
    assert set(result) - set(alone) == {"fd_glyphs", "fd_glyphs_floor"}
    assert result["fd_glyphs"] > 3 * result["fd_glyphs_floor"] > 0
    path = evaluation.folder / "further.npz"
    command = ["tools/make_reference.py", "--config", str(evaluation.folder / "config.yaml"), "--output", str(path)]
    run_ranks(1, *command, f"evaluation.reference={evaluation.folder / 'shards'}", more)
    again = evaluation.run("further", more, f"evaluation.reference={path}")
    assert again["fd_glyphs"] == pytest.approx(result["fd_glyphs"], rel=1e-9)
    assert "mu_glyphs" in np.load(path)
    with np.load(path) as content:
        np.savez(evaluation.folder / "lacking.npz", mu=content["mu"], sigma=content["sigma"])
    without = evaluation.command("refused", more, f"evaluation.reference={evaluation.folder / 'lacking.npz'}")
    assert "mu_glyphs is not a file in the archive" in run_ranks(1, *without, expect=2)


def test_images_that_are_not_finite_are_named(evaluation: Evaluation) -> None:
    weights = torch.load(CHECKPOINT, weights_only=False)
    for key in ("model", "model_ema1", "model_ema2"):
        weights[key]["net.y_embedder.embedding_table.weight"][4] = float("nan")  # class 4 alone
    torch.save(weights, evaluation.folder / "nan.pth")
    command = [part.replace(str(CHECKPOINT), str(evaluation.folder / "nan.pth")) for part in evaluation.command("nan")]
    said = run_ranks(2, *command, expect=2)
    assert "error: generated images with values that are not finite, ids " in said
    assert any(f"ids {ids};" in said for ids in ("4", "14", "12, 14"))
    assert not (evaluation.folder / "nan/result.json").exists()


def test_a_sweep_shares_its_images_with_evaluations(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """On two ranks; what was generated before is not made again, and the best setting is measured on more images."""
    shutil.copytree(evaluation.folder / "alone", evaluation.folder / "sweep")
    before = {name: path.stat().st_mtime_ns for name, path in evaluation.blocks("sweep").items()}
    tool = ["tools/evaluate_fid.py", *evaluation.command("sweep")[2:]]
    sweep = ["--sweep", "guidance=1,2", "ema=all", "interval=0.1:1.0,0.5:0.9"]
    counts = ["--coarse", "16", "--fine", "70", "--keep", "2"]
    said = run_ranks(2, *tool, *sweep, *counts)
    table = said[said.index("weights ") :].splitlines()
    result = json.loads((evaluation.folder / "sweep/result.json").read_text())
    coarse, fine = result["table"][:9], result["table"][9:]
    assert {row["num_images"] for row in coarse} == {16}
    assert len({row["weights"] for row in coarse}) == 3, "model and two averages; without guidance one interval each"
    assert len(fine) == 2
    assert [row["fid"] for row in fine] == sorted(row["fid"] for row in fine)
    assert all(row["num_images"] == 70 for row in fine)
    assert min(row["fid"] for row in coarse) in [
        row["fid"] for row in coarse for best in fine if all(row[key] == best[key] for key in result["best"])
    ]
    assert (result["fid"], result["best"]) == (fine[0]["fid"], {key: fine[0][key] for key in result["best"]})
    assert "kid" in result
    kept = [path.name for path in (evaluation.folder / "sweep/results").iterdir() if path.name.startswith("sweep_")]
    assert sorted(name.rpartition(".")[2] for name in kept) == ["json", "svg"]
    assert (evaluation.folder / "sweep/sweep.svg").stat().st_size > 1000
    after = evaluation.blocks("sweep")
    assert all(after[name].stat().st_mtime_ns == time for name, time in before.items())
    assert len(after) == 9 + 8 * 2 + sum(7 for best in fine if best["weights"] != "ema_0.9999" or not guided(best))
    again = run_ranks(1, *tool, *sweep, *counts)
    assert again[again.index("weights ") :].splitlines() == table
    assert "no weight set ema_0.5" in run_ranks(1, *tool, "--sweep", "ema=ema_0.5", expect=2)
    said = run_ranks(1, *tool, "--sweep", "guidance=1,2", "--coarse", "16", "--fine", "16")
    rows = [line for line in said[said.index("weights ") :].splitlines() if line.startswith("ema_0.9999 ")]
    assert len(rows) == 2, "as many images for the best: it is no row of its own"


def guided(row: dict[str, Any]) -> bool:
    """As `alone` is."""
    return row["guidance_scale"] == 2.0 and row["guidance_interval"] == [0.1, 1.0]


def test_a_training_is_measured_on_the_way(evaluation: Evaluation) -> None:
    """On few images, without leaving their blocks; and a resumed run does not measure twice."""
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
    assert all(line["fid_16"] > 0 and "fid" not in line for line in lines()), "named by the number of images"
    assert not list(folder.glob("evaluation/*")), (
        "no blocks are left; the real images' statistics lie beside the shards"
    )
    first, second = lines()
    # As if it had been killed between the save of step 6 and the end of its measurement.
    (folder / "evaluations.jsonl").write_text(json.dumps(first) + "\n")
    run_ranks(2, *command, "run.max_images=72")
    assert [line["images"] for line in lines()] == [24, 48, 72]
    assert lines()[:2] == [first, second]


def test_the_end_of_a_training_is_the_configured_sweep(evaluation: Evaluation) -> None:
    """result.json is that one, whoever writes it; what else is measured is kept by protocol and replaces nothing."""
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
    said = run_ranks(2, *command)
    assert "measuring: 2 x 10 images on the way" in said
    assert "4 settings x 16 in a sweep" in said
    assert "ema_0.9999 after 3 steps is 100% the weights that the run began with" in said
    assert "evaluation.num_images=70 is fewer" not in said
    result = json.loads((folder / "result.json").read_text())
    assert len(result["table"]) == 4 + 1
    assert {row["weights"] for row in result["table"]} == {"ema_0.9999", "ema_0.9996"}
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3], "the last step is measured by the final evaluation alone"
    assert lines[2]["fid"] == result["fid"]
    assert len(list((folder / "best_samples").glob("*.png"))) == 1
    written = (folder / "result.json").stat().st_mtime_ns
    run = ["--run-dir", str(folder)]
    run_ranks(1, "-m", "jitscale.evaluate", *run, "--weights=model", "evaluation.num_images=40")
    run_ranks(1, "tools/evaluate_fid.py", "--checkpoint", str(folder), "--sweep", "guidance=1,3", "--coarse", "10")
    assert (folder / "result.json").stat().st_mtime_ns == written
    assert len(list((folder / "results").glob("*.json"))) == 3
    # The finished run is asked for another evaluation: its number replaces none, and is recorded.
    run_ranks(2, *command, "evaluation.num_images=60")
    other = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["fid"], line["num_images"]) for line in lines[2:]] == [(result["fid"], 70), (other["fid"], 60)]
    assert {line["step"] for line in lines[2:]} == {3}
    # A run that shall go on has not ended with its newest checkpoint.
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


GRID = """
import sys
import numpy, torch
from jitscale import parallel
from jitscale.config import load_config
from jitscale.evaluation.generate import configured_sampler, sample_grid
from jitscale.checkpoints.opening import read_weights
from tests.support.processes import leave_after

def main():
    world = parallel.start(torch.device("cpu"))
    config = load_config(sys.argv[1], ["evaluation.steps=2"])
    model = read_weights(sys.argv[2], None, config).build()
    grid = sample_grid(model, configured_sampler(config.evaluation, model.diffusion), 0, world)
    numpy.save(f"{sys.argv[3]}_{world.rank}", grid)
    parallel.stop()

leave_after(main)
"""


def test_ranks_share_a_picture_of_samples(evaluation: Evaluation, tmp_path: Path) -> None:
    """Every rank has the whole of it, with each sample in its place."""
    pictures = []
    for ranks in (1, 3):
        run_ranks(
            ranks, "-c", GRID, str(evaluation.folder / "config.yaml"), str(CHECKPOINT), str(tmp_path / f"{ranks}")
        )
        pictures += [np.load(tmp_path / f"{ranks}_{rank}.npy").astype(int) for rank in range(ranks)]
    first, *others = pictures
    assert first.std() > 10, "samples differ"
    assert all(np.abs(first - other).max() <= 1 for other in others), "up to the rounding of another batch"


def test_what_the_evaluation_lacks_is_said_before_the_first_step(evaluation: Evaluation) -> None:
    """On two ranks; the other refusals are in tests/evaluation/test_measuring.py."""
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
    assert "at_end: true" in run_ranks(1, *command, "evaluation.at_end=true", "--print-config"), "nothing is measured"
    said = run_ranks(2, *command, "evaluation.at_end=false")
    assert "evaluation.at_end=false: nothing is measured on the way either: /tmp/no_weights_here/weights-incept" in said
    assert not (evaluation.folder / "never/evaluations.jsonl").exists()
    assert not (evaluation.folder / "never/result.json").exists()


def test_real_images_are_computed_once_by_runs_side_by_side(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Both wait while a third one has the lock, as a run that computes has; then one of them computes."""
    (name,) = (path.name for path in (evaluation.folder / "shards/real_images").iterdir() if path.name.startswith("d"))
    shards = evaluation.folder / "side_by_side_shards"
    shutil.copytree(evaluation.folder / "shards", shards, ignore=shutil.ignore_patterns("real_images"))
    folder = shards / "real_images" / name
    folder.mkdir(parents=True)
    commands = [evaluation.command(f"side_{side}", f"evaluation.reference={shards}") for side in "ab"]
    with exclusive(folder / ".lock", ""):
        ranks = [rank for command in commands for rank in start_ranks(2, *command)]
        said = ""
        while said.count("another run computes the statistics of these real images; waiting") < 1:
            line = ranks[0].stdout.readline()  # type: ignore[union-attr]
            assert line, said
            said += line
        assert not (folder / "facts.json").exists()
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 4, outputs
    assert sum("real images, digits" in output for output in (said + outputs[0], outputs[2])) == 1
    assert {path.name for path in folder.iterdir()} == {".lock", "statistics.npz", "features.npy", "facts.json"}
    for side in "ab":
        result = json.loads((evaluation.folder / f"side_{side}/result.json").read_text())
        source = {"source": str(shards)}
        assert {**result, "reference": {**result["reference"], **source}} == {
            **alone,
            "reference": {**alone["reference"], **source},
        }
    (folder / "features.npy").write_bytes((folder / "features.npy").read_bytes()[:-1] + b"x")
    assert "features.npy has another sha256" in run_ranks(1, *commands[0], expect=2)


def test_real_images_go_on_after_a_kill(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Parts that are there are not made again, by another number of ranks either; the result has the same bits."""
    shards = evaluation.folder / "killed_shards"
    images, labels = digit_images(16)
    write_shards(images, labels, shards, samples_per_shard=300, class_names=DIGIT_CLASSES)
    asked = f"evaluation.reference={shards}"
    whole = evaluation.run("whole", asked, f"evaluation.cache_dir={evaluation.folder / 'whole_cache'}")

    ranks = start_ranks(2, *evaluation.command("killed", asked))
    while len(parts := sorted(shards.glob("real_images/*/part_*.npz"))) < 2:
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.001)
    for rank in ranks:
        rank.kill()
    for rank in ranks:
        rank.communicate()
    assert len(list(shards.glob("real_images/*/part_*.npz"))) < 15, "the kill came in the middle"
    shutil.copytree(shards, evaluation.folder / "changed_shards")
    result = evaluation.run("killed", asked, world_size=3)
    assert result == whole
    left = {path.name for path in shards.glob("real_images/*/*")}
    assert left == {".lock", "statistics.npz", "features.npy", "facts.json"}, "parts are gone in the end"
    (changed,) = (evaluation.folder / "changed_shards").glob(f"real_images/*/{parts[0].name}")
    content = dict(np.load(changed))
    np.savez(changed, **{**content, "features/real_features_sum": content["features/real_features_sum"] + 100.0})
    other = evaluation.run("changed", f"evaluation.reference={evaluation.folder / 'changed_shards'}")
    assert other["fid_floor"] > whole["fid_floor"], "a part that is there is used as it is"


def test_real_images_are_kept_where_it_is_possible(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """In evaluation.cache_dir; in the run's folder where nothing can be written beside the shards."""
    shards = evaluation.folder / "unwritable_shards"
    shutil.copytree(evaluation.folder / "shards", shards, ignore=shutil.ignore_patterns("real_images"))
    (shards / "real_images").write_text("a file, where even root can make no folder")
    own = evaluation.run("own_cache", f"evaluation.reference={shards}")
    assert list((evaluation.folder / "own_cache/evaluation/real_images").glob("digits_*/facts.json"))
    asked = evaluation.folder / "asked_for"
    there = evaluation.run("asked", f"evaluation.reference={shards}", f"evaluation.cache_dir={asked}")
    assert list(asked.glob("digits_*/facts.json"))
    assert own["fid"] == there["fid"] == alone["fid"]
    command = evaluation.command("bad", f"evaluation.cache_dir={shards / 'real_images' / 'below'}")
    assert "cannot be used" in run_ranks(1, *command, expect=2)


def test_labels_are_as_configured(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Balanced by id, at random, or as frequent as in the data, which the manifest counts; and t_eps is a setting."""
    counts = json.loads((evaluation.folder / "shards/manifest.json").read_text())["class_counts"]
    assert sum(counts) == 200
    found = {}
    for kind in ("random", "data"):
        shards = f"data.shards={evaluation.folder / 'shards'}"
        result = evaluation.run(kind, f"evaluation.labels={kind}", shards, "evaluation.t_eps=0.1")
        assert result["protocol"]["labels"] == kind
        assert result["protocol"]["sampler"]["t_eps"] == 0.1
        assert result["fid"] != alone["fid"]
        found[kind] = np.concatenate([np.load(path)["labels"] for path in evaluation.blocks(kind).values()])
    assert set(found["random"]) <= set(range(10))
    assert not np.array_equal(found["random"], np.arange(72) % 10)
    assert not np.array_equal(found["random"], found["data"])
    command = evaluation.command("lacking", "evaluation.labels=data", "evaluation.reference=tests/files/no.npz")
    assert "tests/files/no.npz: no statistics" in run_ranks(1, *command, expect=2)


def test_a_signal_ends_a_measurement_on_the_way(evaluation: Evaluation) -> None:
    """At once, with the step saved; the next start makes up for the measurement."""
    folder = evaluation.folder / "signalled"
    command = [
        *("-m", "jitscale.train", f"--config={evaluation.folder / 'config.yaml'}", f"run.dir={folder}"),
        *(f"data.shards={evaluation.folder / 'shards'}", "data.batch_size=8", "data.num_workers=0"),
        *("run.max_steps=5", "evaluation.every_images=24"),
    ]
    (rank,) = start_ranks(1, *command, "evaluation.few_images=100000")
    said = line = ""
    while re.match(r"generate: .* [1-9]\d*/", line) is None:  # an image is made
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
    """Weights of others and earlier steps replace no result.json of a run; a run that goes on has none."""
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
    assert not (folder / "result.json").exists(), "the run has gone on"
    said = run_ranks(1, "tools/evaluate_fid.py", f"--checkpoint={folder / 'checkpoints/step_00000001'}", config)
    assert "these weights are not the end of the run" in said
    assert not (folder / "result.json").exists()
    assert len(list((folder / "results").glob("*.json"))) == 2, "the first step's, twice the same, and theirs"


def test_an_interrupted_evaluation_goes_on_with_other_ranks(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    shutil.copytree(evaluation.folder / "alone", evaluation.folder / "interrupted")
    (evaluation.folder / "interrupted" / "result.json").unlink()
    kept = {}
    for number, (name, path) in enumerate(sorted(evaluation.blocks("interrupted").items())):
        if number % 3 == 0:
            path.unlink()
        else:
            kept[name] = path.stat().st_mtime_ns
    ranks = start_ranks(2, *evaluation.command("interrupted"))
    while len(evaluation.blocks("interrupted")) == len(kept):
        assert all(rank.poll() is None for rank in ranks)
        time.sleep(0.002)
    for rank in ranks:
        rank.kill()
        rank.communicate()
    assert not (evaluation.folder / "interrupted" / "result.json").exists()
    assert evaluation.run("interrupted", world_size=2) == alone
    assert_same_features(evaluation, "alone", "interrupted")
    now = evaluation.blocks("interrupted")
    assert all(now[name].stat().st_mtime_ns == time for name, time in kept.items()), "what was there is not made again"


def test_a_bad_reference_image_on_another_rank_is_said(evaluation: Evaluation) -> None:
    """Its block is rank 1's; rank 0 must neither wait for ever nor lose the message."""
    folder = evaluation.folder / "bad_reference"
    shutil.copytree(evaluation.folder / "shards", folder, ignore=shutil.ignore_patterns("real_images"))
    tar = sorted(folder.glob("*.tar"))[0]
    zero_samples(tar, slice(9, 10))
    offset = np.load(tar.with_suffix(".index.npy"))[9]["offset"]
    command = evaluation.command("bad", f"evaluation.reference={folder}")
    said = run_ranks(2, *command, expect=2)
    assert f"error: {tar}: byte {offset}: sample 9 cannot be decoded" in said


def test_other_weights_or_settings_do_not_reuse_blocks(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    other = evaluation.run("alone", "--weights=ema_0.9996")
    assert other["protocol"]["weights_sha256"] != alone["protocol"]["weights_sha256"]
    assert other["fid"] != alone["fid"]
    unguided = evaluation.run("alone", "evaluation.guidance_scale=1.0")
    assert unguided["fid"] != alone["fid"]


def test_more_images_continue_from_fewer(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    shutil.copytree(evaluation.folder / "world_2", evaluation.folder / "more")
    before = evaluation.blocks("more")
    assert evaluation.run("more", "evaluation.num_images=80")["num_images"] == 80
    assert before.keys() < evaluation.blocks("more").keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.features=null"], "evaluation.features is null"),
        (["--weights=ema_0.5"], "no weight set 'ema_0.5'"),
        (["evaluation.reference=/nowhere"], "/nowhere: "),
        (["evaluation.num_images=9"], "is too few for the 10 splits"),
        (["model.hidden_size=64"], "do not fit the network"),
    ],
)
def test_mistakes(evaluation: Evaluation, overrides: list[str], message: str) -> None:
    said = run_ranks(1, *evaluation.command("mistakes", *overrides), expect=2)
    assert sum(line.startswith("error: ") and message in line for line in said.splitlines()) == 1, said
