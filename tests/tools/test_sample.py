"""tools/sample.py draws the same image for an id, whatever images are drawn next to it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import jitscale
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.config import Config, DataConfig, DiffusionConfig, EvaluationConfig, ModelConfig
from jitscale.errors import ConfigError, UserError
from jitscale.evaluation.class_names import class_numbers
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.generate import configured_sampler, generate, noise_of, ready_to_sample
from jitscale.model.jit import JiT
from jitscale.preparation.array_shards import write_shards
from tests.support.tiny import MODEL
from tools.sample import main

SAMPLING = ["--steps", "3", "--guidance", "2.0", "--method", "euler", "--seed", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JiT]:
    return written(tmp_path_factory.mktemp("run"), MODEL)


def written(folder: Path, model: ModelConfig) -> tuple[Path, JiT]:
    """A run with a random network, and the network."""
    torch.manual_seed(0)
    network = JiT(model, DiffusionConfig()).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = Config(model=model)
    config.evaluation.weights, config.ema.decays, config.run.max_steps = "model", [], 1
    state = network.state_dict()
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    write_streamed(
        step_folder(folder, 1), Progress(1, 8, 0, None), config, shapes, ["model"], lambda _, name: state[name]
    )
    return folder, network


def drawn(run: Path, output: Path, *more: str) -> dict[str, np.ndarray]:
    assert main(["--checkpoint", str(run), "--output", str(output), *SAMPLING, *more]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in output.iterdir()}


def test_an_id_determines_its_image(run: tuple[Path, JiT], tmp_path: Path) -> None:
    folder, network = run
    found = drawn(folder, tmp_path / "a", "--classes", "3", "7", "--per-class", "2", "--batch", "3")
    names = [f"class_{c:04d}_id_{c + 10 * n:08d}.png" for c in (3, 7) for n in (0, 1)]
    assert set(found) == {*names, "grid.png"}
    assert found["grid.png"].shape == (2 * 18, 2 * 18, 3)
    other = drawn(folder, tmp_path / "b", "--classes", "7", "--per-class", "1", "--first", "1", "--batch", "1")
    assert np.abs(other[names[3]].astype(int) - found[names[3]]).max() <= 1, "up to the rounding of another batch size"
    assert np.abs(found[names[0]].astype(int) - found[names[1]]).max() > 10, "another seed gives another noise"
    evaluation = EvaluationConfig(method="euler", steps=3, guidance_scale=2.0, seed=5)
    sampler = configured_sampler(evaluation, network.diffusion)
    with torch.no_grad():
        measured = to_uint8(generate(network, sampler, [17], 5))[0].permute(1, 2, 0).numpy()
    assert np.abs(measured.astype(int) - found[names[3]]).max() <= 1, "an evaluation would measure the same images"


def test_multistep_sampling_with_internal_guidance_on_a_shifted_grid(tmp_path: Path) -> None:
    """The options equal those of the library."""
    folder, network = written(tmp_path / "run", replace(MODEL, middle_head=1))
    options = ["--method", "ab2", "--time-shift", "1.5", "--internal", "1.8", "--internal-interval", "0", "0.7"]
    found = drawn(folder, tmp_path / "a", "--classes", "7", "--per-class", "1", *options)
    settings: dict[str, Any] = {
        "method": "ab2",
        "steps": 3,
        "guidance_scale": 2.0,
        "noise": noise_of(5, [7], (3, 16, 16)),
    }
    settings |= {"time_shift": 1.5, "internal_guidance": 1.8, "internal_interval": (0.0, 0.7)}
    with torch.autocast("cpu", torch.bfloat16):
        expected = np.asarray(jitscale.to_pil(jitscale.sample(network, [7], **settings))[0]).astype(int)
    assert np.abs(found["class_0007_id_00000007.png"] - expected).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], r"--seed -1: must be in \[0, 9223372036854775807\]"),
        (["--seed", str(2**63)], r"--seed 9223372036854775808: must be in"),
        (["--interval", "0.5", "1.5"], r"--interval 1\.5: must be in \[0, 1\]"),
        (["--interval", "nan", "1"], r"--interval nan: must be finite"),
        (["--guidance", "inf"], r"--guidance inf: must be finite"),
        (["--time-shift", "0"], r"--time-shift 0\.0: must be in \[0\.01, 100\]"),
        (["--internal-interval", "0.5", "0.5"], r"--internal-interval 0\.5 0\.5: must be two times"),
        (["--internal", "1.5"], r"--internal 1\.5: this network has no middle output layer .*; give --internal 1$"),
        (["--first", str(10**18)], r"--first 1000000000000000000 --per-class 8: ids up to 1\d+, the largest is 9"),
        (["--per-class", str(10**7)], r"--per-class 10000000: 100000000 images, one grid has at most 1000000"),
        (["--classes", "-1"], "--classes -1: the network has classes 0 to 9"),
        (["--classes", "9" * 5000], "the network has classes 0 to 9"),
        (
            ["--classes", "flags"],
            "--classes flags: no manifest with class names at the run's data.shards; give numbers",
        ),
        (["--weights", "ema_0.5"], "no weight set 'ema_0.5'; choose one of model"),
    ],
)
def test_options_have_the_limits_of_the_settings(
    run: tuple[Path, JiT], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        drawn(run[0], tmp_path / "a", *arguments)
    assert not (tmp_path / "a").exists()


def test_first_is_a_natural_number(run: tuple[Path, JiT], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        drawn(run[0], tmp_path / "a", "--first", "-1")
    assert "argument --first: '-1' is not an integer from 0 on" in capsys.readouterr().err


def named_classes(folder: Path) -> Config:
    names = ["Cats", "Dogs", "Flags", "flags", "Crane", "Crane", "7", "tench, Tinca tinca", "Birds", "Boats"]
    images = np.zeros((10, 16, 16, 3), np.uint8)
    write_shards(images, np.arange(10), folder, class_names=names)
    return Config(model=MODEL, data=DataConfig(shards=str(folder)))


def test_classes_can_be_named(tmp_path: Path) -> None:
    """The manifest has the names. Case matters only for ambiguous names, and digits are always a number."""
    config = named_classes(tmp_path / "shards")
    found = class_numbers(["Flags", "flags", "cats", "Tench, Tinca Tinca", "7", "3"], 10, config)
    assert found == [2, 3, 0, 7, 7, 3]
    for name, message in (
        ("FLAGS", r"--classes FLAGS: is the name of several classes; give the number: 2 \(Flags\), 3 \(flags\)"),
        ("Crane", r"several classes; give the number: 4 \(Crane\), 5 \(Crane\)"),
        ("Dog", "no class has this name; did you mean 'Dogs'"),
        ("tinca", "did you mean 'tench, Tinca tinca'"),
        ("xyzzy", "no class has this name; there are Cats, Dogs"),
    ):
        with pytest.raises(UserError, match=message):
            class_numbers([name], 10, config)
    with pytest.raises(UserError, match="the network has classes 0 to 4"):
        class_numbers(["Boats"], 5, config)
    shutil.rmtree(tmp_path / "shards")
    assert class_numbers(["4"], 10, config) == [4]
    with pytest.raises(UserError, match="no manifest with class names"):
        class_numbers(["Dogs"], 10, config)


def test_mistakes_of_the_sample_command(run: tuple[Path, JiT], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--classes 10: the network has classes 0 to 9"):
        drawn(run[0], tmp_path / "a", "--classes", "10")
    with pytest.raises(UserError, match=r"--interval 0\.5 0\.5: must be two times"):
        drawn(run[0], tmp_path / "a", "--interval", "0.5", "0.5")
    (tmp_path / "kept.txt").write_text("")
    with pytest.raises(UserError, match="holds files already"):
        drawn(run[0], tmp_path, "--classes", "1")
    with pytest.raises(UserError, match=r"kept\.txt: cannot be written"):
        drawn(run[0], tmp_path / "kept.txt", "--classes", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_cuda_graphs_are_refused_without_a_gpu() -> None:
    config = Config(model=MODEL, evaluation=EvaluationConfig(cuda_graphs=True))
    with pytest.raises(ConfigError, match=r"evaluation\.cuda_graphs=true: cpu has none"):
        ready_to_sample(JiT(MODEL), config, torch.device("cpu"))
