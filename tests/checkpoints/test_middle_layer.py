"""Weights whose middle output layer differs from the network's.

The final prediction stays; the new layer starts at zero.
"""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import jitscale
from jitscale.checkpoints.authors import optimizer_order
from jitscale.checkpoints.format import Checkpoint, Progress, step_folder
from jitscale.checkpoints.hub import HubJiT
from jitscale.checkpoints.middle_layer import with_middle_layer_of
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import MOMENTS, StoredWeights, check_fits, names_in, shapes_of
from jitscale.config import Config, DiffusionConfig, EmaConfig, ModelConfig, to_yaml
from jitscale.errors import CheckpointError
from jitscale.model.jit import JiT
from jitscale.training.persistence import check_resumable, initial_weights
from tests.support import FILES
from tests.support.tiny import MODEL
from tests.support.weights import convert

ASYM = DiffusionConfig(prediction="asym", rank=5)


def settings(middle_head: int, diffusion: DiffusionConfig | None = None) -> Config:
    config = Config(model=replace(MODEL, depth=3, middle_head=middle_head), diffusion=diffusion or DiffusionConfig())
    config.run.max_steps, config.ema, config.evaluation.weights = 1, EmaConfig(decays=[0.9, 0.99]), "ema_0.9"
    return config


def written(folder: Path, config: Config) -> Checkpoint:
    """A run whose weight sets and moments all hold random numbers."""
    torch.manual_seed(0)
    shapes, sets = shapes_of(config), ("model", "ema_0.9", "ema_0.99", *MOMENTS)
    progress = Progress(7, 84, 7, None)
    return Checkpoint(
        write_streamed(step_folder(folder, 7), progress, config, shapes, sets, lambda _, key: torch.rand(shapes[key]))
    )


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([0, 5, 10])


def same(found: StoredWeights, expected: StoredWeights) -> bool:
    """Everything except the middle layer of `expected` is bit-equal."""
    return all(
        torch.equal(found.tensor(name, key), expected.tensor(name, key))
        for name in [*expected.weight_sets, *expected.moments]
        for key in names_in(name, expected.shapes)
        if not key.startswith("middle_layer.")
    )


@pytest.mark.parametrize("diffusion", [None, ASYM])
@pytest.mark.parametrize(
    ("before", "now", "line"),
    [
        (0, 2, "it has no middle output layer; the one of model.middle_head=2 begins with a prediction of zero"),
        (1, 2, "its middle output layer is left out; the one of model.middle_head=2 begins with a prediction of zero"),
        (1, 0, "its middle output layer is left out"),
    ],
)
def test_final_predictions_stay_bit_equal(
    before: int, now: int, line: str, diffusion: DiffusionConfig | None, tmp_path: Path
) -> None:
    source, config = written(tmp_path, settings(before, diffusion)), settings(now, diffusion)
    found, said = with_middle_layer_of(source, config)
    assert said == f"{source.path}: {line}"
    check_fits(found, config)
    assert found.shapes == shapes_of(config)
    assert (found.weight_sets, found.default) == (source.weight_sets, "ema_0.9")
    assert found.optimizer_step == 7
    assert same(found, source)
    for name in source.weight_sets:
        network = found.network(name)
        expected = source.network(name)(*inputs())
        assert torch.equal(network(*inputs()), expected)
        if now > 0:
            final, middle = network(*inputs(), middle=True)
            assert torch.equal(final, expected)
            assert not middle.any()
            middle_layer = JiT(config.model).middle_layer.state_dict()
            for key, value in middle_layer.items():
                full = f"middle_layer.{key}"
                assert torch.equal(found.tensor(name, full), value), "the layer equals a fresh one of `JiT.initialize`"
                assert torch.equal(found.read(name, full, 3, 9), value.flatten()[3:9])
                assert not found.tensor("exp_avg", full).any()
                assert not found.tensor("exp_avg_sq", full).any()
    first = next(iter(source.shapes))
    assert torch.equal(found.read("model", first, 3, 9), source.read("model", first, 3, 9))


def test_the_layer_of_the_same_block_is_kept(tmp_path: Path) -> None:
    for head in (0, 2):
        source = written(tmp_path / str(head), settings(head))
        assert with_middle_layer_of(source, settings(head)) == (source, None)


def test_the_new_layer_trains(tmp_path: Path) -> None:
    found, _ = with_middle_layer_of(written(tmp_path, settings(0)), settings(2))
    network = found.network("model").train()
    network(*inputs(), middle=True)[1].sub(1).square().mean().backward()
    assert network.middle_layer.linear.weight.grad.std() > 0


def test_an_incomplete_layer_is_refused_as_another_network(tmp_path: Path) -> None:
    network = JiT(settings(1).model)
    tensors = {key: p.detach() for key, p in network.named_parameters() if key != "middle_layer.linear.bias"}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = open_weights(tmp_path / "model.safetensors", settings(1))
    with pytest.raises(CheckpointError, match=r"middle_layer\.linear\.bias: absent there"):
        check_fits(with_middle_layer_of(stored, settings(1))[0], settings(1))


def begun(source: Path, config: Config, caplog: pytest.LogCaptureFixture) -> StoredWeights:
    config.run.init_from = str(source)
    caplog.clear()
    with caplog.at_level("INFO"):
        found = initial_weights(config, SimpleNamespace(rank=0, size=1, is_main=True))  # type: ignore[arg-type]
    assert found is not None
    return found


def test_a_run_begins_with_weights_of_any_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Some files do not describe their network. Then the run's own settings are used."""
    source = written(tmp_path / "run", settings(0))
    plain = {key: source.tensor("model", key).contiguous() for key in source.shapes}
    save_file(plain, tmp_path / "model.safetensors")
    for path in (tmp_path / "run", tmp_path / "model.safetensors"):
        found = begun(path, settings(2), caplog)
        assert caplog.text.count("begins with a prediction of zero") == 1
        assert torch.equal(found.network("model")(*inputs()), source.network("model")(*inputs()))
    with_layer = written(tmp_path / "with", settings(1))
    assert same(begun(tmp_path / "with", settings(0), caplog), with_layer)
    assert caplog.text.count("its middle output layer is left out") == 1
    begun(tmp_path / "with", settings(1), caplog)
    assert caplog.text == ""


def test_a_run_resumes_with_its_own_layer_only(tmp_path: Path) -> None:
    for before, now in ((0, 2), (1, 2), (2, 0)):
        checkpoint = written(tmp_path / str(before), settings(before))
        check_resumable(checkpoint, settings(before))
        what = rf"trained with model\.middle_head={before}, the config says {now}; restore it, or start a new run\.dir"
        with pytest.raises(CheckpointError, match=rf"{what} with run\.init_from={checkpoint.path}$"):
            check_resumable(checkpoint, settings(now))
        other = settings(now)
        other.model.num_classes = 5
        with pytest.raises(CheckpointError, match=r"another network \(model\.num_classes: 10 -> 5\)"):
            check_resumable(checkpoint, other)


# Conversions


def yaml(folder: Path, config: Config) -> Path:
    path = folder / f"head_{config.model.middle_head}.yaml"
    path.write_text(to_yaml(config))
    return path


@pytest.mark.parametrize("diffusion", [None, ASYM])
def test_converting_to_a_run_with_the_layer_and_back(
    diffusion: DiffusionConfig | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = written(tmp_path / "without", settings(0, diffusion))
    to = yaml(tmp_path, settings(2, diffusion))
    found = open_weights(convert(source.path, "run", tmp_path / "with", "--config", to))
    assert capsys.readouterr().out.count("begins with a prediction of zero") == 1
    check_fits(found, settings(2, diffusion))
    assert found.optimizer_step == 7
    assert same(found, source)
    assert not found.tensor("exp_avg", "middle_layer.linear.weight").any()
    back = convert(found.path, "run", tmp_path / "back", "--config", yaml(tmp_path, settings(0, diffusion)))
    assert "its middle output layer is left out" in capsys.readouterr().out
    again = open_weights(back)
    assert again.shapes == source.shapes
    assert same(again, source)
    convert(found.path, "run", tmp_path / "copy", "--config", to)
    assert "middle output layer" not in capsys.readouterr().out


def test_the_authors_format_leaves_the_layer_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file in the authors' format can also become a run that has the layer."""
    source, averages = written(tmp_path / "run", settings(2)), ("--ema1", "ema_0.9", "--ema2", "ema_0.99")
    file = convert(source.path, "authors", tmp_path / "last.pth", *averages)
    assert "its middle output layer is left out" in capsys.readouterr().out
    to = yaml(tmp_path, settings(2))
    stored = open_weights(file, to)
    assert stored.config.model == settings(0).model
    assert same(stored, with_middle_layer_of(source, settings(0))[0])
    assert sorted(optimizer_order(stored.shapes)) == sorted(shapes_of(settings(0)))
    run = open_weights(convert(file, "run", tmp_path / "again", "--config", to))
    assert "begins with a prediction of zero" in capsys.readouterr().out
    assert run.optimizer_step == 7
    final, middle = run.network("model")(*inputs(), middle=True)
    assert torch.equal(final, source.network("model")(*inputs()))
    assert not middle.any()


def test_a_run_with_the_layer_starts_from_a_file_of_the_authors(caplog: pytest.LogCaptureFixture) -> None:
    described = torch.load(FILES / "jit_tiny_euler.reference.pt", weights_only=True)["config"]
    model = {key: value for key, value in described.items() if key in vars(ModelConfig())}
    config = Config(model=ModelConfig(**model, middle_head=1))
    config.diffusion.noise_scale, config.run.max_steps = described["noise_scale"], 1
    file = FILES / "jit_tiny_euler.checkpoint-last.pth"
    found = begun(file, config, caplog)
    assert caplog.text.count("begins with a prediction of zero") == 1
    expected = open_weights(file, replace(config, model=replace(config.model, middle_head=0)))
    assert same(found, expected)


def test_the_authors_format_refuses_another_prediction(tmp_path: Path) -> None:
    written(tmp_path / "run", settings(2, ASYM))
    what = re.escape("diffusion.prediction=asym, and the authors' code predicts x")
    with pytest.raises(CheckpointError, match=f"{what}.*; convert this network --to safetensors$") as error:
        convert(tmp_path / "run", "authors", tmp_path / "last.pth", "--ema1", "ema_0.9", "--ema2", "ema_0.99")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "last.pth").exists()


@pytest.mark.parametrize("form", ["safetensors", "huggingface"])
def test_exports_keep_the_layer_and_the_subspace(form: str, tmp_path: Path) -> None:
    source = written(tmp_path / "run", settings(2, replace(ASYM, subspace="/home/somebody/p.safetensors")))
    more = ("--samples", 0) if form == "huggingface" else ()  # The weights are far too large for sampling.
    folder = convert(source.path, form, tmp_path / "out", "--weights", "ema_0.9", *more)
    loaded: list[Any] = [jitscale.load_model(folder, weights="ema_0.9")]
    if form == "huggingface":
        loaded.append(HubJiT.from_pretrained(folder).eval())
    else:
        loaded.append(jitscale.load_model(folder / "ema_0.9.safetensors"))
    expected = source.network("ema_0.9")
    before = expected(*inputs(), middle=True)
    assert before.shape == (2, 3, 3, 16, 16)
    for network in loaded:
        assert torch.equal(network(*inputs(), middle=True), before)
        assert torch.equal(network.subspace, source.tensor("ema_0.9", "subspace"))
        images = jitscale.sample(network, [1, 2], steps=3)
        assert torch.equal(images, jitscale.sample(expected, [1, 2], steps=3))
        assert (network.config, network.diffusion) == (expected.config, ASYM)
    assert not any(b"/home/somebody" in file.read_bytes() for file in folder.iterdir())
