"""The other scripts: packing in an array, upgrading and fine-tuning, evaluating."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.data.shards import ShardSet
from tests.slurm.conftest import Runs
from tests.support import ROOT

pytestmark = pytest.mark.cluster

HIGH = """
defaults: [LOW]
model: {image_size: 32, patch_size: 8}
diffusion: {noise_scale: 2.0}
run: {max_steps: 4}
"""
SMALL = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--time=10", "--mem-per-cpu=800")


def submit(runs: Runs, *arguments: str) -> str:
    common = (f"--chdir={ROOT}", f"--output={runs.folder / 'logs'}/%x_%j.log")
    return runs.cluster.sbatch(*common, *arguments, env=runs.environment())


def logs(runs: Runs) -> str:
    return "\n".join(path.read_text(errors="replace")[-1500:] for path in (runs.folder / "logs").glob("*_*.log"))


def test_pack_upgrade_finetune_evaluate(runs: Runs, unbroken: list[dict[str, Any]]) -> None:
    """Pack images to shards of 32 px, upgrade the run of 16 px to that resolution, fine-tune it, and evaluate it."""
    folder, cluster = runs.folder, runs.cluster
    rng = np.random.default_rng(0)
    for label in range(10):
        (folder / f"photos/{label:02d}").mkdir(parents=True)
        for number in range(4):
            image = rng.integers(0, 256, (40, 36, 3), np.uint8)
            Image.fromarray(image).save(folder / f"photos/{label:02d}/{number}.png")
    packing = ["--input", str(folder / "photos"), "--output", str(folder / "packed"), "--resolution=32", "--codec=raw"]
    array = submit(runs, "--array=1-2", "--cpus-per-task=1", "slurm/pack_shards.sh", *packing, "--samples-per-shard=10")
    cluster.wait_for((folder / "packed/manifest.json").exists, 90, f"not packed: {logs(runs)}")
    assert ShardSet.open(folder / "packed", 10, 32).num_samples == 40
    assert cluster.wait(f"{array}_1") == "COMPLETED"

    (folder / "high.yaml").write_text(HIGH.replace("LOW", str(folder / "unbroken/config")))
    words = [str(folder / name) for name in ("unbroken", "high.yaml", "high")]
    job = submit(runs, *SMALL, "slurm/upgrade_and_finetune.sh", *words, f"data.shards={folder / 'packed'}")
    assert cluster.wait(job, seconds=120) == "COMPLETED", logs(runs)
    assert Checkpoint(complete_checkpoints(folder / "high")[-1]).progress.step == 4

    settings = ["features=digits", "num_images=20", "block_size=5", "steps=2", "sweep=null"]
    words = ["--run", str(folder / "high"), *(f"evaluation.{setting}" for setting in settings)]
    job = submit(runs, *SMALL, "slurm/evaluate.sh", *words)
    assert cluster.wait(job, seconds=120) == "COMPLETED", logs(runs)
    assert not (folder / "high/result.json").exists(), "the run's own settings configure another evaluation"
    (result,) = (folder / "high/results").glob("digits_20_*.json")
    assert np.isfinite(json.loads(result.read_text())["fid"])
