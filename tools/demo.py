"""The main job in minutes, on real images: shards, training, upgrade to twice the resolution, evaluation.

    python tools/demo.py

Two processes on the CPU, or one for each GPU, train a small JiT on scikit-learn's handwritten digits at 32 px with
the configuration configs/demo.yaml; the checkpoint is upgraded to 64 px and fine-tuned with configs/demo_64.yaml. The
same command continues a demo that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.checkpoints.opening import read_weights
from jitscale.config import Config, load_config
from jitscale.data.digits import DIGIT_CLASSES
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.final import evaluate_model
from jitscale.evaluation.generate import configured_sampler, sample_grid
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.tracking import read_metrics

ROOT = Path(__file__).parents[1]


def main() -> int:
    """Parse the command line and run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--images", type=int, help="images seen at 32 px; default: as configured")
    parser.add_argument("--finetune-images", type=int, help="images seen at 64 px; default: as configured")
    parser.add_argument("--samples", type=int, help="images generated for each evaluation; default: as configured")
    options = parser.parse_args()

    started = time.perf_counter()
    output = options.output
    _say("write shards")
    low_settings = _settings(output / "32px", _shards(output, 32), options.images, options.samples)
    high_settings = _settings(output / "64px", _shards(output, 64), options.finetune_images, options.samples)
    low = load_config(ROOT / "configs/demo.yaml", low_settings)
    high = load_config(ROOT / "configs/demo_64.yaml", high_settings)

    _say("train at 32 px, then evaluate")
    _train("configs/demo.yaml", low_settings, low.data.batch_size)
    if not complete_checkpoints(output / "64px"):
        _say("upgrade to 64 px")
        arguments = ["--checkpoint", low.run.dir, "--to", "configs/demo_64.yaml", "--output", high.run.dir]
        _run([sys.executable, "tools/upgrade_resolution.py", *arguments, *high_settings])
    _say("fine-tune at 64 px, then evaluate")
    _train("configs/demo_64.yaml", high_settings, high.data.batch_size)
    _say("evaluate the untrained network, for comparison")
    untrained = _evaluate_untrained(low, output / "untrained")

    trained = {name: json.loads((output / name / "result.json").read_text()) for name in ("32px", "64px")}
    result = {
        "seconds": round(time.perf_counter() - started, 1),
        "fid_floor": trained["32px"]["fid_floor"],
        "times_better_than_untrained": {name: untrained["fid"] / r["fid"] for name, r in trained.items()},
        "untrained": untrained,
        **trained,
    }
    (output / "result.json").write_text(json.dumps(result, indent=2))
    _draw_samples([low, high], output / "samples.png")
    _draw_losses([low, high], output / "loss.png")
    _print_summary(result)
    print(f"pictures: {output / 'samples.png'}, {output / 'loss.png'}")
    return ExitCode.DONE


def _shards(output: Path, resolution: int) -> Path:
    """Write the digits at one resolution unless they are there."""
    folder = output.absolute() / f"shards_{resolution}px"
    _run([sys.executable, "tools/make_digits.py", "--resolution", str(resolution), "--output", str(folder)])
    return folder


def _settings(run_dir: Path, shards: Path, images: int | None, samples: int | None) -> list[str]:
    settings = [f"run.dir={run_dir.absolute()}", f"data.shards={shards}"]
    if images is not None:
        settings.append(f"run.max_images={images}")
    if samples is not None:
        settings.append(f"evaluation.num_images={samples}")
    return settings


def _train(config: str, settings: list[str], batch_size: int) -> None:
    """Train on the GPUs, as many as can share a batch evenly, or in two processes on the CPU."""
    most = torch.cuda.device_count() or 2
    processes = max(count for count in range(1, most + 1) if batch_size % count == 0)
    threads = max(1, (os.cpu_count() or 1) // processes)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launcher, "-m", "jitscale.train", "--config", config, *settings]
    _run(command, OMP_NUM_THREADS=str(threads))


def _run(command: list[str], **environment: str) -> None:
    finished = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=False)
    if finished.returncode != 0:
        raise UserError(f"{' '.join(command)}: ended with code {finished.returncode}; see above")


def _say(what: str) -> None:
    print(f"== {what}", flush=True)


def _evaluate_untrained(config: Config, folder: Path) -> dict[str, Any]:
    """The same measurement of the network as it was initialised."""
    torch.manual_seed(config.run.seed)
    model = JiT(config.model, config.diffusion).eval()
    return evaluate_model(model, "untrained", config, World(0, 1, 0, torch.device("cpu")), folder)


def _draw_samples(configs: list[Config], path: Path) -> None:
    """A labelled grid, one row a class, the resolutions side by side."""
    figure, axes = plt.subplots(1, len(configs), figsize=(5.2 * len(configs), 6.6), layout="constrained")
    for axis, config in zip(axes, configs, strict=True):
        model = read_weights(config.run.dir).build()
        sampler = configured_sampler(config.evaluation, config.diffusion)
        size = config.model.image_size
        grid = sample_grid(model, sampler, config.evaluation.seed, World(0, 1, 0, torch.device("cpu")))
        axis.imshow(grid)
        axis.set_yticks((np.arange(len(DIGIT_CLASSES)) + 0.5) * len(grid) / len(DIGIT_CLASSES), DIGIT_CLASSES)
        axis.tick_params(length=0)
        axis.set_xticks([])
        axis.set_ylabel("class asked for")
        axis.set_title(f"{size} x {size} pixels, guidance {config.evaluation.guidance_scale}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_losses(configs: list[Config], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for config in configs:
        metrics = read_metrics(Path(config.run.dir))
        label = f"{config.model.image_size} px"
        axis.plot([line["images"] for line in metrics], [line["loss"] for line in metrics], label=label, linewidth=1)
    axis.set(xlabel="images seen", ylabel=f"training loss ({configs[0].diffusion.loss} space)", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _print_summary(result: dict[str, Any]) -> None:
    print(f"{'':12}{'digits-FID':>12}{'classified as asked':>22}{'inception score':>18}")
    for name in ("untrained", "32px", "64px"):
        row = result[name]
        print(f"{name:12}{row['fid']:12.1f}{row['label_agreement']:22.1%}{row['inception_score']:18.2f}")
    print(f"{'real halves':12}{result['fid_floor']:12.1f}")


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
