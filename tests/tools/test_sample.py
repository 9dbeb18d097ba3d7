"""tools/sample.py: the same images by id, whatever is drawn beside them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.config import Config, DiffusionConfig, EvaluationConfig
from jitscale.errors import ConfigError, UserError
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.generate import configured_sampler, generate, ready_to_sample
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL
from tools.sample import main

SAMPLING = ["--steps", "3", "--guidance", "2.0", "--method", "euler", "--seed", "5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, JiT]:
    torch.manual_seed(0)
    network = JiT(MODEL, DiffusionConfig()).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = Config(model=MODEL)
    config.evaluation.weights, config.ema.decays, config.run.max_steps = "model", [], 1
    state = network.state_dict()
    folder = tmp_path_factory.mktemp("run")
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    write_streamed(
        step_folder(folder, 1), Progress(1, 8, 0, None), config, shapes, ["model"], lambda _, name: state[name]
    )
    return folder, network


def drawn(run: Path, output: Path, *more: str) -> dict[str, np.ndarray]:
    assert main(["--checkpoint", str(run), "--output", str(output), *SAMPLING, *more]) == 0
    return {path.name: np.asarray(Image.open(path)) for path in output.iterdir()}


def test_images_by_id(run: tuple[Path, JiT], tmp_path: Path) -> None:
    folder, network = run
    found = drawn(folder, tmp_path / "a", "--classes", "3", "7", "--per-class", "2", "--batch", "3")
    names = [f"class_{c:04d}_id_{c + 10 * n:08d}.png" for c in (3, 7) for n in (0, 1)]
    assert set(found) == {*names, "grid.png"}
    assert found["grid.png"].shape == (2 * 18, 2 * 18, 3)
    other = drawn(folder, tmp_path / "b", "--classes", "7", "--per-class", "1", "--first", "1", "--batch", "1")
    assert np.abs(other[names[3]].astype(int) - found[names[3]]).max() <= 1, "up to the rounding of another batch"
    assert np.abs(found[names[0]].astype(int) - found[names[1]]).max() > 10, "another noise"
    evaluation = EvaluationConfig(method="euler", steps=3, guidance_scale=2.0, seed=5)
    sampler = configured_sampler(evaluation, network.diffusion)
    with torch.no_grad():
        measured = to_uint8(generate(network, sampler, [17], 5))[0].permute(1, 2, 0).numpy()
    assert np.abs(measured.astype(int) - found[names[3]]).max() <= 1, "what an evaluation would measure"


def test_mistakes(run: tuple[Path, JiT], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--classes 10: the network has classes 0 to 9"):
        drawn(run[0], tmp_path / "a", "--classes", "10")
    with pytest.raises(UserError, match=r"--interval 0\.5 0\.5: must be two times"):
        drawn(run[0], tmp_path / "a", "--interval", "0.5", "0.5")
    (tmp_path / "kept.txt").write_text("")
    with pytest.raises(UserError, match="holds files already"):
        drawn(run[0], tmp_path, "--classes", "1")
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_cuda_graphs_are_refused_where_there_are_none() -> None:
    config = Config(model=MODEL, evaluation=EvaluationConfig(cuda_graphs=True))
    with pytest.raises(ConfigError, match=r"evaluation\.cuda_graphs=true: cpu has none"):
        ready_to_sample(JiT(MODEL), config, torch.device("cpu"))
