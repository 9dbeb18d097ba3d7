"""tools/convert_checkpoint.py: every form of the weights into every other, bit by bit."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import jitscale
import jitscale.config
from jitscale.checkpoints.authors import optimizer_order
from jitscale.checkpoints.hub import HubJiT
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.weights import MOMENTS, StoredWeights
from jitscale.errors import CheckpointError, UserError
from tests.support import FILES
from tools.convert_checkpoint import main

STEPS = 5


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def convert(source: Path, to: str, output: Path, *more: object) -> Path:
    arguments = ["--checkpoint", source, "--to", to, "--output", output, *more]
    assert main([str(argument) for argument in arguments]) == 0
    return output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The YAML file of the network in the authors' file."""
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
    """A file of the authors with moments, which the stored one was relieved of."""
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
    # what the file does not say of the sampler comes from the run's config
    assert differing <= {"model", "sampling_method", "num_sampling_steps", "cfg", "interval_min", "interval_max"}


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
    with pytest.raises(UserError, match=r"made for diffusion\.noise_scale=2\.0, the config says 1\.0"):
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


def test_an_output_that_cannot_be_written_is_said(authors_file: Path, config: Path, tmp_path: Path) -> None:
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
    assert open_weights(chosen).optimizer_step == 0, "the moments are the model's"
    with pytest.raises(UserError, match="--ema1 and --ema2"):
        convert(run.path, "authors", tmp_path / "out.pth", "--weights", "model")


def test_damage_is_met_before_it_is_exported(authors_file: Path, config: Path, tmp_path: Path) -> None:
    run = convert(authors_file, "run", tmp_path / "run", "--config", config)
    step = run / "checkpoints/step_00000000"
    for name in ("rank_00000.safetensors", "config.yaml"):
        sound = (step / name).read_bytes()
        (step / name).write_bytes(sound[:-9] + bytes([sound[-9] ^ 1]) + sound[-8:])
        with pytest.raises(CheckpointError, match=rf"{name}: its content is not what was written"):
            convert(run, "safetensors", tmp_path / "out")
        (step / name).write_bytes(sound)
    with pytest.raises(CheckpointError, match="neither safetensors nor of torch"):
        convert(config, "safetensors", tmp_path / "out", "--config", config)
