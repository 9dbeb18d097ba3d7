"""`python -m jitscale.evaluate` in real processes: the result does not depend on the number of processes."""

import json
import shutil
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jitscale.model.jit import JiT
from tests.support.evaluations import CHECKPOINT, Evaluation
from tests.support.processes import run_ranks, start_ranks
from tests.support.tiny import MODEL


def assert_same_features(evaluation: Evaluation, first: str, second: str) -> None:
    a, b = evaluation.blocks(first), evaluation.blocks(second)
    assert a.keys() == b.keys()
    for name in a:
        x, y = np.load(a[name]), np.load(b[name])
        assert all(np.array_equal(x[key], y[key]) for key in x.files), name


def test_the_result_records_its_protocol(alone: dict[str, Any]) -> None:
    assert alone["num_images"] == 70
    assert alone["num_real_images"] == 200
    assert alone["fid"] > 3 * alone["fid_floor"] > 0
    assert alone["kid"] > 3 * abs(alone["kid_floor"])
    guidance = {"guidance_scale": 2.0, "guidance_interval": [0.1, 1.0]}
    internal = {"internal_guidance": 1.0, "internal_interval": [0.0, 1.0]}
    assert alone["best"] == {"weights": "ema_0.9999", **guidance, **internal}
    assert [row["fid"] for row in alone["table"]] == [alone["fid"]]
    reference = alone["reference"]
    assert reference["stored"] == {"codec": "png", "resolution": 16, "crop": None}
    assert (reference["crop"], reference["image_size"], reference["images"]) == ("adm", 16, 200)
    assert 1.0 <= alone["inception_score"] <= 10.0
    assert 0.0 <= alone["label_agreement"] <= 1.0
    protocol = alone["protocol"]
    assert (protocol["weights"], protocol["noise_scale"]) == ("ema_0.9999", 1.0)
    sampler = {"method": "heun", "steps": 3, "prediction": "x", "t_eps": 0.05, "time_shift": 1.0}
    assert protocol["sampler"] == {**sampler, **guidance, **internal}
    assert protocol["labels"] == "balanced"
    assert (protocol["precision"], protocol["float8"], protocol["device"]) == ("fp32", False, "cpu")
    assert len(protocol["features_sha256"]) == len(protocol["weights_sha256"]) == 64


@pytest.mark.parametrize("world_size", [2, 3])
def test_features_do_not_depend_on_the_number_of_ranks(
    evaluation: Evaluation, alone: dict[str, Any], world_size: int
) -> None:
    """The features are bit-equal. The last block is not full."""
    assert evaluation.run(f"world_{world_size}", world_size=world_size) == alone
    assert len(evaluation.blocks("alone")) == 9
    assert_same_features(evaluation, "alone", f"world_{world_size}")


def test_internal_guidance_with_a_multistep_sampler(evaluation: Evaluation) -> None:
    """A sweep over it and over classifier-free guidance.

    Two ranks get bit-equal results, although points share steps and their history.
    """
    torch.manual_seed(0)
    network = JiT(replace(MODEL, depth=3, middle_head=1))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_file(network.state_dict(), evaluation.folder / "middle.safetensors")
    settings = ["model.middle_head=1", "evaluation.method=ab2", "evaluation.steps=4", "evaluation.num_images=16"]
    settings += ["evaluation.guidance_interval=[0.3,1.0]", 'evaluation.sweep=["guidance=1,2","internal=1,1.5"]']
    found = {}
    for name, ranks in (("middle_1", 1), ("middle_2", 2)):
        command = evaluation.command(name, *settings)
        command = [part.replace(str(CHECKPOINT), str(evaluation.folder / "middle.safetensors")) for part in command]
        said = run_ranks(ranks, *command)
        assert "internal guidance" in said[said.index("best: ") :]
        found[name] = json.loads((evaluation.folder / name / "result.json").read_text())
    assert found["middle_1"] == found["middle_2"]
    assert_same_features(evaluation, "middle_1", "middle_2")
    table = found["middle_1"]["table"]
    assert [(row["internal_guidance"], row["guidance_scale"]) for row in table] == [(1, 1), (1, 2), (1.5, 1), (1.5, 2)]
    assert len({row["fid"] for row in table}) == 4


def test_stored_statistics_replace_the_images(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Two ranks make the statistics, one rank uses them.

    A file with only mu and sigma works too. Statistics of another network are refused.
    """
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
        ("config.yaml.npz", "no statistics of features"),
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
    (evaluation.folder / "statistics/complete_evaluate.json").unlink()
    (evaluation.folder / "statistics/complete_evaluate.json").mkdir()
    nowhere = str(evaluation.folder / "config.yaml/real.npz")
    for rank_0_cannot_write in (
        [*command[:-1], nowhere, shards],
        evaluation.command("statistics", f"evaluation.reference={path}"),
    ):
        said = run_ranks(2, *rank_0_cannot_write, expect=2)
        assert said.count("error: ") == 1
        assert "Traceback" not in said


def test_further_networks_see_the_same_images(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """The numbers of the main network do not change. The reference is images or their statistics."""
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
    assert "no statistics of features_glyphs (no mu_glyphs; it holds mu, sigma)" in run_ranks(1, *without, expect=2)


def test_images_that_are_not_finite_are_named(evaluation: Evaluation) -> None:
    weights = torch.load(CHECKPOINT, weights_only=False)
    for key in ("model", "model_ema1", "model_ema2"):
        weights[key]["net.y_embedder.embedding_table.weight"][4] = float("nan")  # Only class 4 is affected.
    torch.save(weights, evaluation.folder / "nan.pth")
    command = [part.replace(str(CHECKPOINT), str(evaluation.folder / "nan.pth")) for part in evaluation.command("nan")]
    said = run_ranks(2, *command, expect=2)
    assert "error: generated images with values that are not finite, ids " in said
    assert any(f"ids {ids};" in said for ids in ("4", "14", "12, 14"))
    assert not (evaluation.folder / "nan/result.json").exists()


def test_a_sweep_shares_its_images_with_evaluations(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Two ranks sweep. Images that exist are not generated again. The best setting is measured on more images."""
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
    assert len({row["weights"] for row in coarse}) == 3, (
        "the model and two averages, each with one interval if guidance is off"
    )
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
    assert len(rows) == 2, "with as many images for the best setting, it gets no row of its own"


def guided(row: dict[str, Any]) -> bool:
    """Like `alone`, for a guide."""
    return row["guidance_scale"] == 2.0 and row["guidance_interval"] == [0.1, 1.0]


def test_labels_are_as_configured(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    """Labels are balanced by id, random, or as frequent as in the data (by its manifest). t_eps is a setting."""
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


def test_an_interrupted_evaluation_resumes_on_other_ranks(evaluation: Evaluation, alone: dict[str, Any]) -> None:
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
    assert all(now[name].stat().st_mtime_ns == time for name, time in kept.items()), (
        "finished blocks are not generated again"
    )


def test_other_weights_or_settings_do_not_reuse_blocks(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    other = evaluation.run("alone", "--weights=ema_0.9996")
    assert other["protocol"]["weights_sha256"] != alone["protocol"]["weights_sha256"]
    assert other["fid"] != alone["fid"]
    unguided = evaluation.run("alone", "evaluation.guidance_scale=1.0")
    assert unguided["fid"] != alone["fid"]


def test_an_evaluation_of_more_images_continues_one_of_fewer(evaluation: Evaluation, alone: dict[str, Any]) -> None:
    shutil.copytree(evaluation.folder / "world_2", evaluation.folder / "more")
    before = evaluation.blocks("more")
    assert evaluation.run("more", "evaluation.num_images=80")["num_images"] == 80
    assert before.keys() < evaluation.blocks("more").keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.features=null"], "evaluation.features=null: no network"),
        (["--weights=ema_0.5"], "no weight set 'ema_0.5'"),
        (["evaluation.reference=/nowhere"], "/nowhere: "),
        (["evaluation.num_images=9"], "Inception Score has 10 splits"),
        (["model.hidden_size=64"], "do not fit the network"),
    ],
)
def test_mistakes_of_an_evaluation(evaluation: Evaluation, overrides: list[str], message: str) -> None:
    said = run_ranks(1, *evaluation.command("mistakes", *overrides), expect=2)
    assert sum(line.startswith("error: ") and message in line for line in said.splitlines()) == 1, said
