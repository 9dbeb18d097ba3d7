"""A tiny training run, started like that of a user, and helpers to compare two such runs."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jitscale.checkpoints.format import Checkpoint, complete_checkpoints
from jitscale.checkpoints.weights import names_in
from jitscale.config import RGB
from jitscale.preparation.array_shards import write_shards
from jitscale.tracking import read_metrics
from tests.support.forking import Process
from tests.support.processes import run_ranks
from tests.support.recorded import check_recorded
from tests.support.tiny import model_yaml

STEPS, BATCH = 24, 12
CONFIG = f"""
{model_yaml(attn_dropout=0.1, proj_dropout=0.1)}
data: {{batch_size: {BATCH}, num_workers: 0, window: 16}}
optim: {{lr: 1.0e-3, schedule: cosine, warmup_images: 48, grad_clip: 10.0}}
engine: {{precision: fp32, micro_batch_size: 3}}
ema: {{decays: [0.9, 0.99]}}
checkpoint: {{every_images: {4 * BATCH}, keep_last: 100}}
evaluation: {{weights: ema_0.9}}
tracking: {{log_every_steps: 1}}
run: {{max_steps: {STEPS}, device: cpu}}
"""


class Job:
    """Runs of one tiny configuration, in one folder."""

    def __init__(self, folder: Path, channels: int = RGB) -> None:
        self.folder = folder
        images = np.random.default_rng(0).integers(0, 256, (75, 16, 16, channels), np.uint8)
        write_shards(images, np.arange(75) % 10, folder / "shards", samples_per_shard=20)
        (folder / "config.yaml").write_text(CONFIG)

    def command(self, run: str, *overrides: str, world_size: int = 2) -> list[str]:
        where = [f"run.dir={self.folder / run}", f"data.shards={self.folder / 'shards'}"]
        share = ["engine.micro_batch_size=2"] if world_size == 3 else []  # The share of a rank is no multiple of 3.
        return ["-m", "jitscale.train", "--config", str(self.folder / "config.yaml"), *where, *share, *overrides]

    def train(self, run: str, *overrides: str, world_size: int = 2, expect: int = 0) -> list[dict[str, Any]]:
        run_ranks(world_size, *self.command(run, *overrides, world_size=world_size), expect=expect)
        check_recorded(self.folder / run)
        return read_metrics(self.folder / run)

    def copy(self, source: str, target: str, steps: int) -> None:
        """Copy a run in its state at the checkpoint of `steps`."""
        shutil.copytree(self.folder / source, self.folder / target)
        for checkpoint in complete_checkpoints(self.folder / target):
            if int(checkpoint.name.removeprefix("step_")) > steps:
                shutil.rmtree(checkpoint)


def losses(metrics: list[dict[str, Any]]) -> list[float]:
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1)), "every step appears once"
    return [line["loss"] for line in metrics]


def same_state(first: Path, second: Path) -> bool:
    a, b = Checkpoint(first), Checkpoint(second)
    assert a.progress == b.progress
    assert a.sets == b.sets
    assert {"model", "ema_0.9", "ema_0.99", "exp_avg", "exp_avg_sq"} <= set(a.sets)
    return all(torch.equal(a.tensor(s, name), b.tensor(s, name)) for s in a.sets for name in names_in(s, a.shapes))


def wait_for_steps(ranks: list[Process], run: Path, steps: int) -> Path:
    """Wait until the run has logged this many steps; returns its metrics.jsonl."""
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
        assert all(rank.poll() is None for rank in ranks), ranks[0].communicate()[0]
        time.sleep(0.002)
    return metrics


def zero_samples(tar: Path, samples: slice) -> int:
    """Overwrite the images of these samples of a shard with zeros; returns their number."""
    entries = np.load(tar.with_suffix(".index.npy"))[samples]
    with tar.open("r+b") as file:
        for entry in entries:
            file.seek(int(entry["offset"]))
            file.write(bytes(int(entry["size"])))
    return len(entries)


def write_chain_inputs(folder: Path, *, samples: int, steps: int) -> None:
    """Write tiny_SIZE.yaml and shards_SIZE to `folder`, for training by tools/submit.py at 16 and at 32 px.

    Args:
        samples: number of images that the evaluation at the end generates.
        steps: number of steps of each training run.
    """
    for size, patch in ((16, 4), (32, 8)):
        (folder / f"tiny_{size}.yaml").write_text(f"""
{model_yaml(image_size=size, patch_size=patch)}
diffusion: {{noise_scale: {size / 16}}}
data: {{batch_size: 12, num_workers: 0, window: 16}}
engine: {{precision: fp32}}
ema: {{decays: [0.9]}}
evaluation: {{weights: ema_0.9, num_images: {samples}, block_size: 5, steps: 2, features: digits}}
tracking: {{log_every_steps: 1}}
run: {{max_steps: {steps}, device: cpu}}
""")
        images = np.random.default_rng(0).integers(0, 256, (30, size, size, 3), np.uint8)
        write_shards(images, np.arange(30) % 10, folder / f"shards_{size}", samples_per_shard=20)
