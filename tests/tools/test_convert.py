"""tools/convert_checkpoint.py converts every form of the weights into every other one, bit by bit."""

import argparse
import json
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import jitscale
import jitscale.config
from jitscale.checkpoints.authors import _arguments, optimizer_order
from jitscale.checkpoints.format import Progress
from jitscale.checkpoints.hub import HubJiT
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import MOMENTS, StoredWeights, description
from jitscale.config import Config, EvaluationConfig
from jitscale.errors import CheckpointError, UserError
from jitscale.model.jit import JiT
from tests.support import FILES, ROOT
from tests.support.tiny import MODEL
from tests.support.weights import convert

STEPS = 5


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML file that describes the network in the authors' file."""
    described = torch.load(FILES / "jit_tiny_euler.reference.pt", weights_only=True)["config"]
    model = {key: value for key, value in described.items() if key in vars(jitscale.config.ModelConfig())}
    settings = {
        "model": model,
        "diffusion": {"noise_scale": described["noise_scale"], "label_drop": 0.0},
        "ema": {"decays": [0.9999, 0.9996]},
        "run": {"max_steps": 9},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture
def authors_file(tmp_path: Path, config: Path) -> Path:
    """The authors' file with moments; the stored file has none."""
    content = load(FILES / "jit_tiny_euler.checkpoint-last.pth")
    parameters = [value for key, value in content["model"].items() if key != "net.pos_embed"]
    vectors = [p for p in parameters if p.ndim == 1]
    ordered = [*vectors, *(p for p in parameters if p.ndim > 1)]
    torch.manual_seed(0)
    content["optimizer"]["state"] = {
        index: {"step": torch.tensor(float(STEPS)), **{moment: torch.rand_like(p) for moment in MOMENTS}}
        for index, p in enumerate(ordered)
    }
    torch.save(content, tmp_path / "checkpoint-last.pth")
    return tmp_path / "checkpoint-last.pth"


def assert_equal_weights(found: StoredWeights, expected: StoredWeights) -> None:
    assert set(found.weight_sets) == set(expected.weight_sets)
    assert found.shapes == expected.shapes
    assert found.config.model == expected.config.model
    assert found.config.diffusion == expected.config.diffusion
    for name in expected.weight_sets:
        for parameter in expected.shapes:
            assert torch.equal(found.tensor(name, parameter), expected.tensor(name, parameter)), (name, parameter)


def test_the_authors_file_through_a_run_and_back(authors_file: Path, config: Path, tmp_path: Path) -> None:
    run = convert(authors_file, "run", tmp_path / "run", "--config", config)
    stored = open_weights(run)
    assert stored.optimizer_step == STEPS
    again = load(convert(run, "authors", tmp_path / "again.pth", "--epoch", 3))
    before = load(authors_file)
    for key in ("model", "model_ema1", "model_ema2"):
        assert again[key].keys() == before[key].keys()
        assert all(torch.equal(again[key][name], value) for name, value in before[key].items()), key
    assert again["optimizer"]["state"].keys() == before["optimizer"]["state"].keys()
    for index, state in before["optimizer"]["state"].items():
        assert all(torch.equal(again["optimizer"]["state"][index][name], value) for name, value in state.items())
    groups = [[group["params"] for group in content["optimizer"]["param_groups"]] for content in (again, before)]
    assert groups[0] == groups[1]
    assert again["epoch"] == 3
    kept = {key: value for key, value in vars(before["args"]).items() if key in vars(again["args"])}
    named = {key: value for key, value in vars(again["args"]).items() if key in kept}
    differing = {key for key in kept if kept[key] != named[key]}
    # The file does not describe the sampler, so its settings come from the run's config.
    assert differing <= {"model", "sampling_method", "num_sampling_steps", "cfg", "interval_min", "interval_max"}


def test_the_authors_have_no_multistep_sampler() -> None:
    for method, written in (("euler", "euler"), ("ab2", "heun"), ("2m", "heun")):
        config = Config(model=MODEL, evaluation=EvaluationConfig(method=method))
        assert _arguments(config, [0.9999, 0.9996]).sampling_method == written


def test_the_optimizers_of_both_sides_agree_on_the_order(authors_file: Path, config: Path) -> None:
    stored = open_weights(authors_file, config)
    order = optimizer_order(stored.shapes)
    assert sorted(order) == sorted(stored.shapes)
    state = load(authors_file)["optimizer"]["state"]
    assert [tuple(state[index]["exp_avg"].shape) for index in range(len(order))] == [stored.shapes[n] for n in order]


def test_safetensors_and_back(authors_file: Path, config: Path, tmp_path: Path) -> None:
    original = open_weights(authors_file, config)
    folder = convert(authors_file, "safetensors", tmp_path / "exported", "--config", config)
    assert sorted(file.name for file in folder.iterdir()) == [
        "ema_0.9996.safetensors",
        "ema_0.9999.safetensors",
        "model.safetensors",
    ]
    exported = open_weights(folder)
    assert_equal_weights(exported, original)
    assert exported.optimizer_step == 0
    run = convert(folder, "run", tmp_path / "run", "--config", config)
    assert_equal_weights(open_weights(run), original)
    assert_equal_weights(open_weights(convert(run, "safetensors", tmp_path / "twice")), original)
    single = open_weights(folder / "ema_0.9996.safetensors")
    assert single.weight_sets == ["ema_0.9996"]


def test_hugging_face_folder(authors_file: Path, config: Path, tmp_path: Path) -> None:
    options = ("--config", config, "--weights", "ema_0.9996")
    folder = convert(authors_file, "huggingface", tmp_path / "hub", *options)
    original = open_weights(authors_file, config)
    expected = original.network("ema_0.9996")
    network = HubJiT.from_pretrained(folder)
    assert network.config == expected.config
    assert network.diffusion == expected.diffusion
    found, again = dict(network.named_parameters()), open_weights(folder)
    assert again.weight_sets == ["ema_0.9996"]
    for name in original.shapes:
        tensor = original.tensor("ema_0.9996", name)
        assert torch.equal(found[name], tensor)
        assert torch.equal(again.tensor("ema_0.9996", name), tensor)
    images = jitscale.sample(network, [1], steps=2)
    assert torch.equal(images, jitscale.sample(expected, [1], steps=2))
    network.save_pretrained(tmp_path / "saved_again")
    assert (tmp_path / "saved_again/config.json").read_text() == (folder / "config.json").read_text()
    assert "library_name: jitscale" in (folder / "README.md").read_text()
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("t_embedder.mlp.0.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"do not fit.*config\.json.*t_embedder\.mlp\.0\.bias"):
        HubJiT.from_pretrained(folder)


def test_refusals(authors_file: Path, config: Path, tmp_path: Path) -> None:
    exported = convert(authors_file, "safetensors", tmp_path / "exported", "--config", config)
    with pytest.raises(UserError, match=r"model\.safetensors: exists already"):
        convert(authors_file, "safetensors", exported, "--config", config)
    with pytest.raises(CheckpointError, match="give its config"):
        convert(authors_file, "safetensors", tmp_path / "more")
    with pytest.raises(CheckpointError, match=r"no weight set 'ema_1'; choose one of model, ema_0\.9996, ema_0\.9999"):
        convert(exported, "safetensors", tmp_path / "more", "--weights", "ema_1")
    with pytest.raises(UserError, match="--to run needs --config"):
        convert(exported, "run", tmp_path / "more")
    other = tmp_path / "other.yaml"
    other.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    with pytest.raises(UserError, match=r"another network \(model\.hidden_size: 32 -> 64\)"):
        convert(exported, "run", tmp_path / "more", "--config", other)
    other.write_text(config.read_text().replace('"noise_scale": 2.0', '"noise_scale": 1.0'))
    with pytest.raises(UserError, match=r"trained with diffusion\.noise_scale=2\.0, the config says 1\.0"):
        convert(exported, "run", tmp_path / "more", "--config", other)
    with pytest.raises(UserError, match=r"--ema1 ema_0\.5: not among .*ema_0\.9996, ema_0\.9999"):
        convert(exported, "authors", tmp_path / "more.pth", "--ema1", "ema_0.5")
    with pytest.raises(UserError, match="holds one weight set"):
        convert(exported, "huggingface", tmp_path / "more", "--weights", "model", "ema_0.9996")
    (exported / "copy.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="several files hold the same weight set"):
        open_weights(exported)
    (exported / "copy.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"copy\.safetensors: not a readable safetensors file"):
        open_weights(exported)
    assert not (tmp_path / "more").exists()
    assert not (tmp_path / "more.pth").exists()


def test_weights_of_another_network_are_refused_in_every_form(config: Path, tmp_path: Path) -> None:
    """Each file claims to have the config's network. Files whose names only have prefixes are converted."""
    torch.manual_seed(0)
    settings = jitscale.config.load_config(config)
    network = JiT(settings.model, settings.diffusion)
    sound = {name: p.detach().clone() for name, p in network.named_parameters()}
    first, *others = sound
    infinite = torch.full_like(sound[first], float("inf"))
    wrong = {
        "another": ({"pos_embed": torch.zeros(1, 4, 32)}, "do not fit the network"),
        "extra": ({**sound, "extra": torch.zeros(3)}, r"extra: \(3,\) there, absent"),
        "positions": (
            {**sound, "pos_embed": torch.zeros(1, 16, 32)},
            "pos_embed differs from this network's position table",
        ),
        "more": ({**sound, "pos_embed": torch.zeros(1, 25, 32)}, r"pos_embed: \(1, 25, 32\) there, absent"),
        "missing": ({name: sound[name] for name in others}, f"{first}: absent there"),
        "nan": ({**sound, first: infinite * 0}, f"{first} of the set model holds values that are not finite"),
        "inf": ({**sound, first: infinite}, "not finite"),
        "fp8": ({**sound, first: sound[first].to(torch.float8_e4m3fn)}, r"is quantised \(float8_e4m3fn\)"),
        "complex": ({**sound, first: sound[first].to(torch.complex64)}, "holds complex numbers"),
        "integers": ({**sound, first: sound[first].long()}, r"is quantised \(int64\)"),
        "twice": ({**sound, f"module.{first}": sound[first].clone()}, "with and without the prefixes"),
    }
    for name, (tensors, message) in wrong.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        for form in ("safetensors", "run", *(["huggingface"] if name == "nan" else [])):
            with pytest.raises(CheckpointError, match=message):
                convert(tmp_path / f"{name}.safetensors", form, tmp_path / "out", "--config", config)
    assert not (tmp_path / "out").exists()
    for prefix in (
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "transformer.",
        "net.",
        "module.net.",
        "net._orig_mod.",
    ):
        save_file({f"{prefix}{name}": p for name, p in sound.items()}, tmp_path / "wrapped.safetensors")
        run = open_weights(convert(tmp_path / "wrapped.safetensors", "run", tmp_path / prefix, "--config", config))
        assert all(torch.equal(run.tensor("model", name), p) for name, p in sound.items())


@pytest.mark.parametrize(
    "metadata",
    [
        {"model": "{"},
        {"model": "{}"},
        {"model": "{}", "diffusion": "3"},
        {"model": '{"depth": "many"}', "diffusion": "{}"},
        {"model": '{"depth": 0}', "diffusion": "{}"},
        {"model": '{"unknown": 1}', "diffusion": "{}"},
        {"model": "{}", "diffusion": '{"prediction": "${oc.env:HOME}"}'},
        {"model": "{}", "diffusion": '{"noise_scale": NaN}'},
        {"model": "[" * 100_000, "diffusion": "{}"},
        {"weights": "../model"},
        {"weights": "exp_avg"},
    ],
)
def test_metadata_without_a_valid_network_are_a_one_line_error(
    metadata: dict[str, str], config: Path, tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "strange.safetensors", metadata=metadata)
    with pytest.raises(UserError) as error:
        open_weights(tmp_path / "strange.safetensors", config)
    assert str(tmp_path / "strange.safetensors") in str(error.value)
    assert os.environ["HOME"] not in str(error.value).replace(str(tmp_path), "")


def test_wrapped_and_strange_files_of_the_authors(config: Path, tmp_path: Path) -> None:
    """Prefixes of wrappers are removed at any level. All other deviations are a one-line error."""
    content = load(FILES / "jit_tiny_euler.checkpoint-last.pth")
    expected, path, args = (
        open_weights(FILES / "jit_tiny_euler.checkpoint-last.pth", config),
        tmp_path / "c.pth",
        content["args"],
    )

    def opened(**changes: Any) -> StoredWeights:
        torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
        return open_weights(path, config)

    for before, after in (("net.", "module.net."), ("net.", "net._orig_mod."), ("net.", "module._orig_mod.net.")):
        sets = ("model", "model_ema1", "model_ema2")
        renamed = {key: {name.replace(before, after, 1): p for name, p in content[key].items()} for key in sets}
        assert_equal_weights(opened(**renamed), expected)
    assert_equal_weights(opened(args=vars(args)), expected)
    numbers = {"noise_scale": np.float64(2), "img_size": np.int64(32), "t_eps": np.float32(args.t_eps)}
    assert opened(args=argparse.Namespace(**{**vars(args), **numbers})).config.diffusion.noise_scale == 2.0
    assert opened(args={**vars(args), "seed": np.uint8(3)}, epoch=np.int32(3)).weight_sets == expected.weight_sets
    first = content["model_ema1"]
    assert_equal_weights(opened(model_ema1=list(first.values())), expected)
    learned = tuple(tensor for name, tensor in first.items() if name != "net.pos_embed")
    assert_equal_weights(opened(model_ema1=learned), expected)
    lost = dict(list(content["model_ema1"].items())[:-1])
    refused = [
        ({"model_ema1": lost}, "model_ema1 holds another network than model"),
        ({"model_ema1": list(lost.values())}, "model_ema1 holds another network than model"),
        ({"model_ema1": list(lost.values())[2:]}, "model_ema1 is a list of 54 tensors, but the model has 57"),
        ({"model_ema1": [1] * 57}, "model_ema1 holds 'net.pos_embed', which is not a tensor"),
        (
            {"model_ema1": {**content["model_ema1"], "net.pos_embed": torch.ones(1, 16, 32)}},
            "differs from this network's position table",
        ),
        (
            {"model_ema1": {**content["model_ema1"], "net.pos_embed": torch.ones(1, 9, 32)}},
            "pos_embed of model_ema1 has",
        ),
        ({"model_ema2": None}, "'model_ema2' is missing"),
        ({"args": None}, "'args' is missing"),
        ({"args": {**vars(args), "P_mean": "x"}}, "not the authors' format"),
        ({"args": {**vars(args), "t_eps": 0.0}}, "diffusion.t_eps=0"),
        ({"args": {**vars(args), "model": "JiT-B/16"}}, "in_context_start=4 must be"),
        (
            {"args": {**vars(args), "noise_scale": np.zeros(2)}},
            "not a readable checkpoint.*it holds numpy.*_reconstruct",
        ),
        ({"epoch": Path("3")}, "not a readable checkpoint.*it holds pathlib"),
        ({"model": {"net.a": 1}}, "holds 'net.a', which is not a tensor"),
        ({"optimizer": [1]}, "not the authors' format"),
        ({"args": {**vars(args), "ema_decay1": float("nan")}}, r"its averages have the decays \[nan"),
        ({"args": {**vars(args), "ema_decay2": -3.0}}, r"its averages have the decays \[0.9999, -3.0\]"),
    ]
    for changes, message in refused:
        with pytest.raises(UserError, match=message) as error:
            opened(**changes)
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)
        assert "options" not in str(error.value), "the message must not repeat torch's advice to execute the file"


def test_a_number_of_numpy_1_is_read(config: Path, tmp_path: Path) -> None:
    """numpy 2 writes another module name than numpy 1, which wrote most of the authors' files."""
    content = load(FILES / "jit_tiny_euler.checkpoint-last.pth")
    torch.save({**content, "epoch": np.int64(3)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            found = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in found
                found = found.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, found)
    assert open_weights(tmp_path / "old.pth", config).weight_sets == ["model", "ema_0.9999", "ema_0.9996"]


@pytest.mark.parametrize("step", [float("inf"), float("nan"), -5.0, [1.0, 2.0]])
def test_an_invalid_optimizer_step_is_a_one_line_error(authors_file: Path, config: Path, step: Any) -> None:
    content = load(authors_file)
    content["optimizer"]["state"][0]["step"] = torch.tensor(step)
    torch.save(content, authors_file)
    with pytest.raises(CheckpointError, match="not the authors' format"):
        open_weights(authors_file, config)


def test_an_unknown_set_becomes_the_model_or_is_left_out(
    authors_file: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = open_weights(authors_file, config)
    tensors = {parameter: stored.tensor("model", parameter) for parameter in stored.shapes}
    (both := tmp_path / "both").mkdir()
    for name in ("model", "best"):
        save_file(tensors, both / f"{name}.safetensors", description(name, stored.config))
    for source, begin, left_out in ((both, "model", True), (both / "best.safetensors", "best", False)):
        run = open_weights(convert(source, "run", tmp_path / f"run_{begin}", "--config", config))
        assert run.weight_sets == ["model"]
        assert ("left out: best" in capsys.readouterr().out) == left_out
    with pytest.raises(CheckpointError, match="no weight set 'best'; make it the model"):
        write_streamed(tmp_path / "new", Progress(0, 0, 0, None), stored.config, {}, ["best"], stored.tensor)


def test_only_the_papers_network_gets_the_name_of_its_size() -> None:
    model = jitscale.config.load_config(ROOT / "configs/jit_b_64.yaml").model
    assert _arguments(jitscale.config.Config(model=model), [0.9, 0.99]).model == "JiT-B/4"
    other = replace(model, in_context_start=6)
    assert _arguments(jitscale.config.Config(model=other), [0.9, 0.99]).model == "JiT-12x768/4"


def test_an_output_that_cannot_be_written_is_reported(authors_file: Path, config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written \("):
        convert(authors_file, "safetensors", tmp_path / "file" / "out", "--config", config)
    with pytest.raises(CheckpointError, match=r"cannot be written \("):
        convert(authors_file, "run", tmp_path / "file" / "run", "--config", config)


def test_an_average_alone_becomes_a_runs_model(authors_file: Path, config: Path, tmp_path: Path) -> None:
    average = convert(authors_file, "safetensors", tmp_path / "out", "--weights", "ema_0.9999", "--config", config)
    run = open_weights(convert(average / "ema_0.9999.safetensors", "run", tmp_path / "run", "--config", config))
    assert run.weight_sets == ["model", "ema_0.9999"]
    assert run.optimizer_step == 0
    for name in run.shapes:
        assert torch.equal(run.tensor("model", name), run.tensor("ema_0.9999", name))
    chosen = convert(authors_file, "run", tmp_path / "chosen", "--config", config, "--weights", "ema_0.9996")
    assert open_weights(chosen).optimizer_step == 0, "the moments belong to the model"
    with pytest.raises(UserError, match="--ema1 and --ema2"):
        convert(run.path, "authors", tmp_path / "out.pth", "--weights", "model")


def test_damage_is_found_before_the_export(authors_file: Path, config: Path, tmp_path: Path) -> None:
    run = convert(authors_file, "run", tmp_path / "run", "--config", config)
    step = run / "checkpoints/step_00000000"
    for name in ("rank_00000.safetensors", "config.yaml"):
        sound = (step / name).read_bytes()
        (step / name).write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
        with pytest.raises(CheckpointError, match=rf"{name}: its content has changed since it was written"):
            convert(run, "safetensors", tmp_path / "out")
        (step / name).write_bytes(sound)
    with pytest.raises(CheckpointError, match=r"neither a \.safetensors file nor one of torch"):
        convert(config, "safetensors", tmp_path / "out", "--config", config)
