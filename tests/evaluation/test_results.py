"""Only the configured final evaluation of a run writes its result.json, whichever command measures."""

import json
from pathlib import Path

import pytest
import torch

from jitscale import evaluate
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.config import Config, load_config, to_yaml
from jitscale.evaluation.final import evaluate_model
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import digit_images
from tests.support.tiny import OVERRIDES
from tools import evaluate_fid

SETTINGS = (
    *("engine.precision=fp32", "ema.decays=[0.9999]", "evaluation.weights=ema_0.9999", "run.device=cpu"),
    *("run.max_steps=60", "data.batch_size=8", "data.num_workers=0", "evaluation.steps=1", "evaluation.method=euler"),
    *("evaluation.features=digits", "evaluation.num_images=16", "evaluation.block_size=8", "tracking.wandb=off"),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A finished run without a result, and its configuration."""
    folder = tmp_path_factory.mktemp("run")
    images, labels = digit_images(16)
    write_shards(images[:20], labels[:20], folder / "shards")
    (folder / "empty.yaml").write_text("{}\n")
    places = (f"run.dir={folder}", f"data.shards={folder / 'shards'}")
    config = load_config(folder / "empty.yaml", [*OVERRIDES, *SETTINGS, *places])
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(0)
    state = JiT(config.model).state_dict()
    shapes, sets = {name: tuple(p.shape) for name, p in state.items()}, ["model", "ema_0.9999"]
    write_streamed(step_folder(folder, 60), Progress(60, 480, 0, None), config, shapes, sets, lambda _, n: state[n])
    return folder, config


@pytest.mark.slow
def test_only_the_configured_evaluation_writes_the_result(
    run: tuple[Path, Config], caplog: pytest.LogCaptureFixture
) -> None:
    folder, config = run
    result, at = folder / "result.json", ["--checkpoint", str(folder)]
    assert evaluate.main(["--run", str(folder), "evaluation.seed=1"]) == 0
    assert not result.exists(), "another evaluation is not the run's result, even if the run has none"
    assert evaluate_fid.main(at) == 0
    written = result.read_bytes()
    assert json.loads(written)["protocol"]["seed"] == 0
    assert sum("ema_0.9999 after 60 steps is 99%" in record.message for record in caplog.records) == 2
    for name, command in {
        "a weight set": lambda: evaluate.main(["--run", str(folder), "--weights", "model"]),
        "another number of images": lambda: evaluate.main(["--run", str(folder), "evaluation.num_images=12"]),
        "other features": lambda: evaluate.main(["--run", str(folder), "evaluation.features=glyphs"]),
        "a sweep": lambda: evaluate_fid.main([*at, "--sweep", "guidance=1,2", "--coarse", "12", "--keep", "1"]),
        "fewer images": lambda: evaluate_fid.main([*at, "--fine", "12"]),
        "a study": lambda: evaluate_model(
            JiT(config.model).eval(), "untrained", config, World(0, 1, 0, torch.device("cpu")), folder
        ),
    }.items():
        before = set((folder / "results").glob("*.json"))
        command()
        assert result.read_bytes() == written, name
        new = set((folder / "results").glob("*.json")) - before
        assert len(new) == (0 if name == "fewer images" else 1), f"{name}: the result is stored under its protocol"
    result.unlink()
    assert evaluate.main(["--run", str(folder)]) == 0
    assert result.read_bytes() == written
