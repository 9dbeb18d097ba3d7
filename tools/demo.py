"""Show the whole workflow on real images in minutes: shards, training, upgrade to twice the resolution, evaluation.

    python tools/demo.py

Two processes on the CPU, or one process for each GPU, train a small JiT on scikit-learn's handwritten digits at 32 px,
with configs/demo.yaml. The checkpoint is upgraded to 64 px and fine-tuned with configs/demo_64.yaml. If the demo is
interrupted, the same command continues it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import installed

import numpy as np
import torch
from PIL import Image

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.command import Parser, positive, run_python, usable_cores
from jitscale.config import Config, EvaluationConfig, load_config
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.final import evaluate_model
from jitscale.figures import figure
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.preparation.array_shards import write_shards_once
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images
from jitscale.tracking import BEST_SAMPLES, read_metrics

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, 0, torch.device("cpu"))


def main() -> int:
    """Parse the command line and run all stages."""
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    count: Any = {"type": positive, "metavar": "N"}
    parser.add_argument("--images", **count, help="images seen at 32 px; default: as configured")
    parser.add_argument("--finetune-images", **count, help="images seen at 64 px; default: as configured")
    parser.add_argument("--samples", **count, help="images generated for each evaluation; default: as configured")
    parser.add_argument("--sampler-steps", **count, help="steps of the sampler; default: as configured")
    options = parser.parse_args()

    started = time.perf_counter()
    output = options.output
    _say("write shards")
    low_settings = _settings(output, 32, options.images, options)
    high_settings = _settings(output, 64, options.finetune_images, options)
    low = load_config(ROOT / "configs/demo.yaml", low_settings)
    high = load_config(ROOT / "configs/demo_64.yaml", high_settings)

    _say("train at 32 px, then evaluate")
    _train("configs/demo.yaml", low_settings, low.data.batch_size)
    if not complete_checkpoints(output / "64px"):
        _say("upgrade to 64 px")
        arguments = ["--checkpoint", low.run.dir, "--to", "configs/demo_64.yaml", "--output", high.run.dir]
        run_python("tools/upgrade_resolution.py", *arguments, *high_settings, cwd=ROOT)
    _say("fine-tune at 64 px, then evaluate")
    _train("configs/demo_64.yaml", high_settings, high.data.batch_size)
    _say("evaluate the untrained network, for comparison")
    torch.manual_seed(low.run.seed)
    network = JiT(low.model, low.diffusion).eval()
    untrained = evaluate_model(network, "untrained", low, ALONE, output / "untrained")

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
    print(f"{'':12}{'digits-FID':>12}{'classified as asked':>22}{'inception score':>18}")
    for name, row in {"untrained": untrained, **trained}.items():
        print(f"{name:12}{row['fid']:12.1f}{row['label_agreement']:22.1%}{row['inception_score']:18.2f}")
    print(f"{'real halves':12}{result['fid_floor']:12.1f}")
    print(f"pictures: {output / 'samples.png'}, {output / 'loss.png'}")
    return ExitCode.DONE


def _settings(output: Path, resolution: int, images: int | None, options: argparse.Namespace) -> list[str]:
    """The settings of the run at one resolution; its shards are written unless they exist."""
    output = output.absolute()
    shards = output / f"shards_{resolution}px"
    digits, labels = digit_images(resolution)
    known = {"class_names": DIGIT_CLASSES, "dataset": "digits"}
    said = write_shards_once(digits, shards, labels=labels, samples_per_shard=256, **known)
    print(said, flush=True)
    samples, steps = options.samples, options.sampler_steps
    # At most half of the samples, so that both processes on the CPU have a block.
    block = None if samples is None else min(EvaluationConfig().block_size, (samples + 1) // 2)
    counts = {"run.max_images": images, "evaluation.num_images": samples, "evaluation.block_size": block}
    counts["evaluation.steps"] = steps
    places = [f"run.dir={output / f'{resolution}px'}", f"data.shards={shards}"]
    return places + [f"{key}={count}" for key, count in counts.items() if count is not None]


def _train(config: str, settings: list[str], batch_size: int) -> None:
    """Train on as many GPUs as divide the batch evenly, or in two processes on the CPU."""
    most = torch.cuda.device_count() or 2
    processes = max(count for count in range(1, most + 1) if batch_size % count == 0)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    threads = str(max(1, usable_cores() // processes))
    run_python(*launcher, "-m", "jitscale.train", "--config", config, *settings, cwd=ROOT, OMP_NUM_THREADS=threads)


def _say(what: str) -> None:
    print(f"== {what}", flush=True)


def _draw_samples(configs: list[Config], path: Path) -> None:
    """Draw the final pictures of samples, one row for each class, with the resolutions side by side."""
    with figure(path, panels=len(configs), width=5.2, height=6.6) as axes:
        for axis, config in zip(axes, configs, strict=True):
            pictures = sorted((Path(config.run.dir) / BEST_SAMPLES).glob("*.png"))  # sorted by images seen
            if not pictures:
                raise UserError(f"{config.run.dir}: has no picture of samples; remove it and start again")
            grid = Image.open(pictures[-1])
            axis.imshow(grid)
            axis.grid(visible=False)
            axis.set_yticks((np.arange(len(DIGIT_CLASSES)) + 0.5) * grid.height / len(DIGIT_CLASSES), DIGIT_CLASSES)
            size = config.model.image_size
            title = f"{size} x {size} pixels, guidance {config.evaluation.guidance_scale}"
            axis.set(xticks=[], ylabel="requested class", title=title)


def _draw_losses(configs: list[Config], path: Path) -> None:
    with figure(path, panels=1, width=7, height=4) as (axis,):
        for config in configs:
            points = [(line["images"], line["loss"]) for line in read_metrics(Path(config.run.dir))]
            axis.plot(*zip(*points, strict=True), label=f"{config.model.image_size} px", linewidth=1)
        axis.set(xlabel="images seen", ylabel=f"training loss ({configs[0].diffusion.loss} space)", yscale="log")
        axis.legend()


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
