"""Evaluations of the authors' tiny network, started like those of a user."""

import json
from pathlib import Path
from typing import Any

from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from tests.support import FILES
from tests.support.processes import run_ranks
from tests.support.tiny import model_yaml

CHECKPOINT = FILES / "jit_tiny_heun.checkpoint-last.pth"
CONFIG = """
MODEL
engine: {precision: fp32}
ema: {decays: [0.9999, 0.9996]}
evaluation: {features: digits, num_images: 70, block_size: 8, steps: 3, guidance_scale: 2.0}
run: {max_steps: 1, device: cpu}
""".replace("MODEL", model_yaml(depth=3))


class Evaluation:
    """Evaluations of the authors' checkpoint against digits of 16 px."""

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
