"""`python -m jitscale.evaluate` in real processes: the result does not depend on how many there are."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jitscale.data.digits import DIGIT_CLASSES, digit_images
from jitscale.data.packing import write_shards
from tests.distributed.processes import ROOT, run_ranks, start_ranks

CHECKPOINT = ROOT / "tests/data/jit_tiny_heun.checkpoint-last.pth"
CONFIG = """
model: {image_size: 16, patch_size: 4, hidden_size: 32, depth: 3, num_heads: 2, bottleneck_dim: 8, in_context_len: 4,
  in_context_start: 1, num_classes: 10}
engine: {precision: fp32}
ema: {decays: [0.9999, 0.9996]}
evaluation: {features: digits, num_images: 70, block_size: 8, steps: 3, guidance_scale: 2.0}
run: {max_steps: 1, device: cpu}
"""


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
    assert 1.0 <= alone["inception_score"] <= 10.0
    assert 0.0 <= alone["label_agreement"] <= 1.0
    protocol = alone["protocol"]
    assert (protocol["weights"], protocol["noise_scale"]) == ("ema_0.9999", 1.0)
    assert protocol["sampler"]["guidance_scale"] == 2.0
    assert (protocol["precision"], protocol["float8"], protocol["device"]) == ("fp32", False, "cpu")
    assert len(protocol["features_sha256"]) == len(protocol["weights_sha256"]) == 64


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_features(
    evaluation: Evaluation, alone: dict[str, Any], world_size: int
) -> None:
    """Bitwise, and the last block is not full."""
    assert evaluation.run(f"world_{world_size}", world_size=world_size) == alone
    assert len(evaluation.blocks("alone")) == 9 + 25
    assert_same_features(evaluation, "alone", f"world_{world_size}")


def test_statistics_made_once_stand_for_the_images(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Made by two ranks, used by one; also a file with mu and sigma only; of another network they are refused."""
    path = evaluation.folder / "real.npz"
    shards = f"evaluation.reference={evaluation.folder / 'shards'}"
    command = ["tools/make_reference.py", "--config", str(evaluation.folder / "config.yaml"), "--output", str(path)]
    said = run_ranks(2, *command, shards)
    assert '"images": 200' in said
    assert not path.with_suffix(".blocks").exists()
    result = evaluation.run("statistics", f"evaluation.reference={path}")
    assert result["fid"] == pytest.approx(alone["fid"], rel=1e-9)
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
    assert set(result) - set(alone) == {"fd_glyphs"}
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
    said = run_ranks(2, *tool, *sweep, "--coarse", "16", "--fine", "70", "--keep", "2")
    table = said[said.index("weights ") :].splitlines()
    found = json.loads((evaluation.folder / "sweep/sweep.json").read_text())
    sets = {result["weights"] for result in found["coarse"]}
    assert len(found["coarse"]) == 3 * len(sets) == 3 * 3, "model and two averages; without guidance one interval"
    assert len(table) == 1 + 9 + 2 + 1
    assert [r["fid"] for r in found["fine"]] == sorted(r["fid"] for r in found["fine"])
    assert all(r["num_images"] == 70 and "kid" in r for r in found["fine"])
    assert json.loads((evaluation.folder / "sweep/result.json").read_text()) == found["fine"][0]
    assert (evaluation.folder / "sweep/sweep.svg").stat().st_size > 1000
    after = evaluation.blocks("sweep")
    assert all(after[name].stat().st_mtime_ns == time for name, time in before.items())
    # The same settings as those of an evaluation: its blocks are among the sweep's, and no others of them were made.
    own = [r for r in found["coarse"] if (r["weights"], r["scale"], r["interval"]) == ("ema_0.9999", 2.0, [0.1, 1.0])]
    assert own[0]["protocol"] == alone["protocol"]
    again = run_ranks(1, *tool, *sweep, "--coarse", "16", "--fine", "70", "--keep", "2")
    assert again[again.index("weights ") :].splitlines() == table


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
    assert all(line["fid"] > 0 for line in lines())
    assert not list(folder.glob("evaluation/samples_*"))
    assert list(folder.glob("evaluation/reference_*/*.npz"))
    assert not list(folder.glob("evaluation/passing"))
    first, second = lines()
    # As if it had been killed between the save of step 6 and the end of its measurement.
    (folder / "evaluations.jsonl").write_text(json.dumps(first) + "\n")
    run_ranks(2, *command, "run.max_images=72")
    assert [line["images"] for line in lines()] == [24, 48, 72]
    assert lines()[:2] == [first, second]


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
    shutil.copytree(evaluation.folder / "shards", folder)
    tar = sorted(folder.glob("*.tar"))[0]
    index = np.load(tar.with_suffix(".index.npy"))
    with tar.open("r+b") as file:
        file.seek(int(index[9]["offset"]))
        file.write(bytes(int(index[9]["size"])))
    command = evaluation.command("bad", f"evaluation.reference={folder}")
    said = run_ranks(2, *command, expect=2)
    assert f"error: {tar}: byte {index[9]['offset']}: sample 9 cannot be decoded" in said


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
