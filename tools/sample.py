"""Draw images of a checkpoint: one PNG each, and a grid with a row for each class.

    python tools/sample.py --checkpoint runs/jit_b_256 --classes 207 360 --per-class 8 --guidance 3.0 --output samples

A class is a number or a name. The names are those that the weights know, or else those in the manifest at the run's
data.shards. An id always gives the same image, up to the rounding of another batch: its noise is a function of (seed,
id), and its class is the id modulo the number of classes. An evaluation with the same settings measures the same
images.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import installed

import torch
from PIL import Image
from tqdm import tqdm

from jitscale.checkpoints.opening import open_weights, read_guide
from jitscale.command import Parser, natural, path_text, positive
from jitscale.config import CHOICES, SETTINGS, Config, EvaluationConfig
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.class_names import class_numbers
from jitscale.evaluation.features import as_pictures, to_uint8
from jitscale.evaluation.generate import autocast, configured_sampler, generate, ready_to_sample, tile
from jitscale.parallel import choose_device

LARGEST_ID = 2**63 - 1
MOST_IMAGES = 1_000_000
FLAGS = {  # settings of `evaluation` that an option overrides, and the name of the option
    **{name: name for name in ("method", "steps", "seed", "guide")},
    **{"guidance_scale": "guidance", "guidance_interval": "interval", "time_shift": "time-shift"},
    **{"internal_guidance": "internal", "internal_interval": "internal-interval"},
}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, draw the images, and write them."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="PATH", help="a run's folder, or any stored weights"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a YAML file with the network, if PATH has no configuration"
    )
    parser.add_argument("--weights", metavar="NAME", help="model, ema_<decay> or power_<width>; default: the run's")
    parser.add_argument("--classes", nargs="+", metavar="C", help="numbers or names; default: the first 10")
    parser.add_number("--per-class", 8, "images for each class")
    parser.add_argument(
        "--first", type=natural, default=0, metavar="N", help="start with this image of each class, counted from 0"
    )
    parser.add_argument("--seed", type=int, help="seed of the noise; default: the run's evaluation.seed")
    parser.add_argument("--method", choices=CHOICES["evaluation.method"], help="sampler; default: the run's")
    parser.add_argument("--steps", type=positive, metavar="N", help="steps of the sampler; default: the run's")
    shift = "the times are t / (t + (1 - t) S), uniform if S is 1; default: the run's"
    parser.add_argument("--time-shift", type=float, metavar="S", help=shift)
    scale = "guidance scale, 1 for none; default: the run's"
    parser.add_argument("--guidance", type=float, dest="guidance_scale", metavar="W", help=scale)
    times = "times between which guidance acts; default: the run's"
    parser.add_argument("--interval", type=float, nargs=2, dest="guidance_interval", metavar="T", help=times)
    inner = "scale of internal guidance (it needs model.middle_head), 1 for none; default: the run's"
    parser.add_argument("--internal", type=float, dest="internal_guidance", metavar="W", help=inner)
    times = "times between which internal guidance acts; default: the run's"
    parser.add_argument("--internal-interval", type=float, nargs=2, metavar="T", help=times)
    parser.add_argument(
        "--guide", type=path_text, metavar="PATH", help="autoguidance by the network in PATH; default: the run's"
    )
    parser.add_number("--batch", 16, "images in one batch")
    parser.add_argument("--device", choices=CHOICES["run.device"], default="auto", help="device; default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty folder")
    options = parser.parse_args(arguments)

    stored = open_weights(options.checkpoint, options.config)
    stored.verify()
    evaluation = evaluation_of(options, stored.config)
    ids = ids_of(options.classes, options.per_class, options.first, stored.config, stored.class_names)
    weights = stored.choose(options.weights)
    _make_empty(options.output)
    if caution := stored.caution(weights):
        print(f"warning: {caution}", file=sys.stderr)
    device = choose_device(options.device)
    model = ready_to_sample(stored.network(weights, device), stored.config, device)
    sampler = configured_sampler(evaluation, model.diffusion)
    guide = read_guide(replace(stored.config, evaluation=evaluation), stored.class_names, device=device)
    if guide is not None:
        guide = ready_to_sample(guide, stored.config, device)
    drawn: list[torch.Tensor] = []
    with tqdm(total=len(ids), unit="img", desc="sample") as progress, autocast(stored.config, device):
        for start in range(0, len(ids), options.batch):
            part = ids[start : start + options.batch]
            images = to_uint8(generate(model, sampler, part, evaluation.seed, guide), part).cpu()
            for picture, number in zip(as_pictures(images), part, strict=True):
                label = number % max(1, model.config.num_classes)
                Image.fromarray(picture).save(options.output / f"class_{label:04d}_id_{number:08d}.png")
            drawn.append(images)
            progress.update(len(part))
    grid = options.output / "grid.png"
    Image.fromarray(tile(torch.cat(drawn), options.per_class)).save(grid)
    print(f"{grid}: {len(ids)} images, {stored.path}, weights {weights}, {sampler}, seed {evaluation.seed}")
    return ExitCode.DONE


def _make_empty(folder: Path) -> None:
    """Create the folder. Raises a UserError if it holds files or cannot be created."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        filled = any(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --output") from error
    if filled:
        raise UserError(f"{folder}: holds files already; choose another --output")


def ids_of(
    texts: list[str] | None, per_class: int, first: int, config: Config, class_names: list[str] | None
) -> list[int]:
    """The ids of the images of these classes, class by class; `class_names` are those of the weights, if known.

    Raises a UserError if a class is unknown or an id is too large.
    """
    classes = max(1, config.model.num_classes)  # a network without classes has one row
    wanted = range(min(10, classes)) if texts is None else class_numbers(texts, classes, config, class_names)
    if (last := (first + per_class) * classes) > LARGEST_ID:
        raise UserError(f"--first {first} --per-class {per_class}: ids up to {last}, the largest is {LARGEST_ID}")
    if (count := per_class * len(wanted)) > MOST_IMAGES:
        raise UserError(f"--per-class {per_class}: {count} images, one grid has at most {MOST_IMAGES}; draw fewer")
    return [label + (first + n) * classes for label in wanted for n in range(per_class)]


def evaluation_of(options: argparse.Namespace, config: Config) -> EvaluationConfig:
    """The run's sampling settings with the options applied. Raises a UserError if a setting refuses a value."""
    asked = {name: value for name in FLAGS if (value := getattr(options, name)) is not None}
    for name, value in asked.items():
        for _, refused, limit, remedy in SETTINGS[f"evaluation.{name}"].problems(name, value):
            shown = " ".join(map(str, refused)) if isinstance(refused, list) else refused
            raise UserError(f"--{FLAGS[name]} {shown}: {limit}; {remedy}")
    chosen = replace(config.evaluation, **asked)
    unguided = config.model.num_classes == 0 or config.diffusion.label_drop == 0
    if chosen.guidance_scale != 1 and chosen.guide is None and unguided:
        fault = "this network has no prediction without the label to guide by"
        raise UserError(f"--guidance {chosen.guidance_scale}: {fault}; give --guidance 1 or a --guide")
    if chosen.internal_guidance != 1 and config.model.middle_head == 0:
        fault = "this network has no middle output layer to guide by (model.middle_head=0)"
        raise UserError(f"--internal {chosen.internal_guidance}: {fault}; give --internal 1")
    return chosen


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
