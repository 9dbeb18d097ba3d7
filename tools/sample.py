"""Draw images of a checkpoint: one PNG each, and a grid with a row for each class.

    python tools/sample.py --checkpoint runs/b --classes 207 360 --per-class 8 --guidance 3.0 --output samples/

An id always gives the same image, up to the rounding of another batch: its noise is a function of (seed, id), its class
is id mod the number of classes. An evaluation with the same settings measures the same images.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import installed

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from jitscale.checkpoints.opening import open_weights, read_guide
from jitscale.command import Parser, positive
from jitscale.config import CHOICES, EvaluationConfig
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.generate import autocast, configured_sampler, generate, ready_to_sample, tile
from jitscale.parallel import choose_device


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, draw and write."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="any form of stored weights")
    parser.add_argument("--config", type=Path, metavar="FILE", help="its network, if PATH does not say it")
    parser.add_argument("--weights", metavar="NAME", help="model, ema_<decay> or power_<width>; default: the run's")
    parser.add_argument("--classes", type=int, nargs="+", metavar="C", help="default: the first 10")
    parser.add_number("--per-class", 8, "images of each class")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="begin with the N-th image of each class")
    parser.add_argument("--seed", type=int, help="of the noise; default: the run's evaluation.seed")
    parser.add_argument("--method", choices=CHOICES["evaluation.method"], help="default: the run's")
    parser.add_argument("--steps", type=positive, metavar="N", help="of the sampler; default: the run's")
    scale = "scale, 1 for none; default: the run's"
    parser.add_argument("--guidance", type=float, dest="guidance_scale", metavar="W", help=scale)
    times = "times between which guidance acts; default: the run's"
    parser.add_argument("--interval", type=float, nargs=2, dest="guidance_interval", metavar="T", help=times)
    parser.add_argument("--guide", metavar="PATH", help="autoguidance by these weights; default: the run's")
    parser.add_number("--batch", 16, "images together")
    parser.add_argument("--device", choices=CHOICES["run.device"], default="auto", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="an empty or new folder")
    options = parser.parse_args(arguments)

    stored = open_weights(options.checkpoint, options.config)
    stored.verify()
    device = choose_device(options.device)
    model = ready_to_sample(stored.network(options.weights), stored.config, device)
    ids = ids_of(options.classes, options.per_class, options.first, model.config.num_classes)
    evaluation = evaluation_of(options, stored.config.evaluation)
    sampler = configured_sampler(evaluation, model.diffusion)
    guide = read_guide(replace(stored.config, evaluation=evaluation))
    if guide is not None:
        guide = ready_to_sample(guide, stored.config, device)
    if options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"{options.output}: holds files already; choose another --output")
    options.output.mkdir(parents=True, exist_ok=True)
    drawn: list[torch.Tensor] = []
    with tqdm(total=len(ids), unit="img", desc="sample") as progress, autocast(stored.config, device):
        for start in range(0, len(ids), options.batch):
            part = ids[start : start + options.batch]
            images = to_uint8(generate(model, sampler, part, evaluation.seed, guide), part).cpu()
            for image, number in zip(images, part, strict=True):
                label = number % max(1, model.config.num_classes)
                pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
                Image.fromarray(pixels).save(options.output / f"class_{label:04d}_id_{number:08d}.png")
            drawn.append(images)
            progress.update(len(part))
    grid = options.output / "grid.png"
    Image.fromarray(tile(torch.cat(drawn), options.per_class)).save(grid)
    print(f"{grid}: {len(ids)} images, {stored.path}, {sampler}, seed {evaluation.seed}")
    return ExitCode.DONE


def ids_of(classes: list[int] | None, per_class: int, first: int, num_classes: int) -> list[int]:
    """Ids of images of these classes, class by class. Raises a UserError at a class that the network does not have."""
    num_classes = max(1, num_classes)  # a network without classes counts as one of a single class
    wanted = range(min(10, num_classes)) if classes is None else classes
    if wrong := [label for label in wanted if not 0 <= label < num_classes]:
        raise UserError(f"--classes {wrong[0]}: the network has classes 0 to {num_classes - 1}")
    return [label + (first + n) * num_classes for label in wanted for n in range(per_class)]


def evaluation_of(options: argparse.Namespace, evaluation: EvaluationConfig) -> EvaluationConfig:
    """The run's settings of sampling, changed by the command line. Raises a UserError at an impossible interval."""
    names = ("method", "steps", "guidance_scale", "guidance_interval", "seed", "guide")
    asked = {name: value for name in names if (value := getattr(options, name)) is not None}
    chosen = replace(evaluation, **asked)
    low, high = chosen.guidance_interval
    if not 0 <= low < high <= 1:
        raise UserError(f"--interval {low} {high}: must be two times 0 <= low < high <= 1")
    return chosen


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
