"""Convert weights from one form into another; they stay the same bit by bit (docs/weights.md).

    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to safetensors --output exported/
    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to huggingface --weights ema_0.9999 --output hub/
    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to diffusers --output diffusers/
    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to authors --output checkpoint-last.pth
    python tools/convert_checkpoint.py --checkpoint checkpoint-last.pth --to run --output runs/continued \\
        --config configs/jit_h_256.yaml

safetensors: a folder with one file per weight set, and the network's config in its metadata. huggingface: a folder for
`jitscale.load_model` and `jitscale.checkpoints.hub.HubJiT.from_pretrained` (needs jitscale[hub]). diffusers: a folder
in the form of its open pull request. Both folders have a model card with samples. authors: their `checkpoint-last.pth`,
with the optimizer's moments. run: a checkpoint that `jitscale.train` continues, with the averages and moments of the
source. The networks of the authors and of diffusers have no middle output layer, so it is left out. If the source of a
run has none and the config asks for one, it begins with a prediction of zero.

The output is opened again and compared with its config before it gets its name.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

import installed

from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from jitscale.checkpoints.authors import METHODS, write_authors_file
from jitscale.checkpoints.checked import checked_output
from jitscale.checkpoints.diffusers import LARGEST_FILE, at_own_positions, write_diffusers
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.middle_layer import with_middle_layer_of
from jitscale.checkpoints.model_card import Card
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import (
    StoredWeights,
    check_finite,
    check_fits,
    check_tensors,
    is_average,
    write_safetensors,
)
from jitscale.command import Parser, natural, refuse_existing
from jitscale.config import Config, ema_name, load_config, to_yaml
from jitscale.errors import CheckpointError, ExitCode, UserError, exit_with_message, first_line
from jitscale.evaluation.showcase import SAMPLES, as_measured, draw_samples, measured

AUTHORS_DECAYS = (0.9999, 0.9996)  # decays of model_ema1 and model_ema2


@dataclass(frozen=True)
class Conversion:
    """A planned output: `write` writes the weight sets `sets` of the network of `config` to a path."""

    config: Config
    sets: Sequence[str]
    write: Callable[[Path], None]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert."""
    options = _parser().parse_args(arguments)
    stored = open_weights(options.checkpoint, options.config)
    stored.verify()
    if options.to in ("run", "authors", "diffusers"):  # their networks have no middle output layer, like the default
        stored, change = with_middle_layer_of(stored, _config_of_run(options) if options.to == "run" else Config())
        if change:
            print(change)
    check_tensors(stored)
    conversion = FORMS[options.to](stored, options)
    with checked_output(options.output, conversion.config, conversion.sets) as staged:
        conversion.write(staged)
        names = [path.relative_to(staged) for path in ([staged] if staged.is_file() else sorted(staged.rglob("*")))]
    written = [options.output / name for name in names]
    print("\n".join([f"{stored.path}: read", "written:", *(f"  {path}" for path in written if path.is_file())]))
    return ExitCode.DONE


def to_safetensors(stored: StoredWeights, options: argparse.Namespace) -> Conversion:
    """One file per weight set."""
    names = [stored.choose(name) for name in options.weights or stored.weight_sets]
    refuse_existing(*(options.output / f"{name}.safetensors" for name in names))
    check_finite(stored, names)

    def write(folder: Path) -> None:
        folder.mkdir()
        for name in tqdm(names, unit="set", desc="write"):
            write_safetensors(folder / f"{name}.safetensors", stored, name)

    return Conversion(stored.config, names, write)


def to_huggingface(stored: StoredWeights, options: argparse.Namespace) -> Conversion:
    """config.json, model.safetensors and a model card."""
    try:
        from jitscale.checkpoints.hub import HubJiT  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"--to huggingface needs {error.name}; pip install 'jitscale[hub]'") from error
    chosen = stored.choose(_one_set(options, "a Hugging Face folder holds one weight set"))
    refuse_existing(options.output / "model.safetensors", options.output / "config.json")
    check_finite(stored, [chosen])

    def write(folder: Path) -> None:
        # The folder holds the subspace, wherever it came from.
        network = HubJiT(stored.config.model, replace(stored.config.diffusion, subspace=None), chosen)
        stored.load_into(network, chosen)
        folder.mkdir()
        _write_card(stored, chosen, options, folder)  # first: save_pretrained writes a card only if there is none
        try:
            network.save_pretrained(folder)
        except SafetensorError as error:  # safetensors raises it for a failed write
            raise OSError(first_line(error)) from error

    return Conversion(stored.config, [chosen], write)


def to_diffusers(stored: StoredWeights, options: argparse.Namespace) -> Conversion:
    """The folder of the pull request, and a model card."""
    chosen = stored.choose(_one_set(options, "a folder of diffusers holds one weight set"))
    refuse_existing(options.output / "model_index.json", options.output / "transformer", options.output / "scheduler")
    config = _known_to_others(stored, "JiT in diffusers")
    check_finite(stored, [chosen])

    def write(folder: Path) -> None:
        folder.mkdir()
        _write_card(stored, chosen, options, folder, is_diffusers=True)
        write_diffusers(folder, stored, chosen, options.max_shard_bytes)

    return Conversion(config, [chosen], write)


def to_authors(stored: StoredWeights, options: argparse.Namespace) -> Conversion:
    """The authors' `checkpoint-last.pth`."""
    if options.weights is not None:
        raise UserError("--weights: the authors' file holds the model and two averages; choose by --ema1 and --ema2")
    refuse_existing(options.output)
    averages = [name for name in stored.weight_sets if name.startswith("ema_") and is_average(name)]
    for option, name in (("ema1", options.ema1), ("ema2", options.ema2)):
        if name not in averages:
            choice = ", ".join(averages) or "none: the authors format needs an exponential average"
            raise UserError(f"--{option} {name}: not among the averages of {stored.path}; choose one of {choice}")
    config = _known_to_others(stored, "the authors' code", "model.in_channels")
    sets = list(dict.fromkeys([stored.choose("model"), options.ema1, options.ema2, *stored.moments]))
    check_finite(stored, sets)
    evaluation = stored.config.evaluation
    if evaluation.method not in METHODS or evaluation.time_shift != 1.0:
        own = f"evaluation.method={evaluation.method} evaluation.time_shift={evaluation.time_shift:g}"
        print(
            f"{stored.path}: {own}, but the authors' code has {' and '.join(METHODS)} at uniform times; samples differ"
        )
    if stored.optimizer_step == 0:
        print(f"{stored.path}: has no moments of the optimizer; the new file has empty ones")
    return Conversion(
        config, sets, lambda path: write_authors_file(path, stored, options.ema1, options.ema2, options.epoch)
    )


def to_run(stored: StoredWeights, options: argparse.Namespace) -> Conversion:
    """A checkpoint at step 0 of a run."""
    config = _config_of_run(options)
    check_fits(stored, config)
    refuse_existing(options.output / "checkpoints")
    chosen = _one_set(options, "one set becomes the run's model")
    begin = stored.choose(chosen or ("model" if "model" in stored.weight_sets else None))
    averages = [name for name in stored.weight_sets if is_average(name)]
    if left_out := {*stored.weight_sets} - {"model", begin, *averages}:
        print(f"{stored.path}: a run has a model and averages; left out: {', '.join(sorted(left_out))}")
    moments = stored.moments if config.optim.name == "adamw" and begin == "model" else ()
    check_finite(stored, [begin, *averages, *moments])
    if not moments:
        print("the optimizer's moments begin at zero: the source has no AdamW moments of these weights")
    steps = stored.optimizer_step if moments else 0
    progress = Progress(0, options.images, steps, None, class_names=stored.class_names)
    names = {"model": begin, **{name: name for name in (*averages, *moments)}}

    def read(name: str, parameter: str) -> Tensor:
        return stored.tensor(names[name], parameter)

    def write(run_dir: Path) -> None:
        write_streamed(step_folder(run_dir, 0), progress, config, stored.shapes, list(names), read)
        (run_dir / "config.yaml").write_text(to_yaml(config))

    return Conversion(config, list(names), write)


FORMS: dict[str, Callable[[StoredWeights, argparse.Namespace], Conversion]] = {
    "safetensors": to_safetensors,
    "huggingface": to_huggingface,
    "diffusers": to_diffusers,
    "authors": to_authors,
    "run": to_run,
}


def _parser() -> Parser:
    parser = Parser(__doc__)
    sources = (
        "a run or step folder, .safetensors, a folder of Hugging Face or diffusers, hf://OWNER/NAME, authors' .pth"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help=sources)
    parser.add_argument("--to", required=True, choices=FORMS, help="the new form")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="a folder; for authors a file")
    sets = "such as model ema_0.9999 (default: safetensors: all; run: model; else the one that the run samples from)"
    parser.add_argument("--weights", nargs="+", metavar="SET", help=sets)
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="run: its configuration; other forms: needed only if PATH does not describe its network",
    )
    for number, decay in enumerate(AUTHORS_DECAYS, 1):
        meaning = f"authors: becomes model_ema{number} (default: %(default)s)"
        parser.add_argument(f"--ema{number}", default=ema_name(decay), metavar="SET", help=meaning)
    parser.add_number("--epoch", 0, "authors: the last complete epoch", int)
    parser.add_number("--images", 0, "run: images that the weights have seen", natural)
    samples = f"images in the model card; default: {SAMPLES}, or 0 if they take long without a GPU"
    parser.add_argument("--samples", type=natural, metavar="N", help=samples)
    of_card = "licence of the weights for the model card, such as mit; default: the card says that none is stated"
    parser.add_argument("--license", metavar="ID", help=of_card)
    size = "diffusers: larger sets are split over several files"
    parser.add_number("--max-shard-bytes", LARGEST_FILE, size)
    return parser


def _config_of_run(options: argparse.Namespace) -> Config:
    if options.config is None:
        raise UserError("--to run needs --config, the YAML file of the run")
    return load_config(options.config, [f"run.dir={options.output}"])


def _one_set(options: argparse.Namespace, why: str) -> str | None:
    if options.weights is not None and len(options.weights) > 1:
        raise UserError(f"--weights {' '.join(options.weights)}: {why}; name one")
    return options.weights[0] if options.weights else None


def _known_to_others(stored: StoredWeights, whose: str, *more: str) -> Config:
    """The config of `stored`. Raises a CheckpointError if the code of others does not have such a network.

    That code predicts x only, and has no stretched positions; `more` names settings that must have their defaults.
    """
    config = replace(stored.config, model=at_own_positions(stored.config.model))
    keys = ("diffusion.prediction", "model.position_grid", *more)
    unlike = [f"{key}={of(config)}" for key in keys if (of := attrgetter(key))(config) != of(Config())]
    if unlike:
        grey = " of RGB images" if "model.in_channels" in more else ""
        what = f"{', '.join(unlike)}, and {whose} predicts x{grey}, with positions of the network's own grid"
        raise CheckpointError(f"{stored.path}: {what}; convert this network --to safetensors")
    return config


def _write_card(
    stored: StoredWeights, set_name: str, options: argparse.Namespace, folder: Path, *, is_diffusers: bool = False
) -> None:
    """Write README.md into `folder`, with a picture of samples and the measurements of the run, if there are any."""
    config = stored.config
    if options.config is not None:
        config = replace(load_config(options.config), model=config.model, diffusion=config.diffusion)
    result = measured(stored, set_name)
    if result is not None:
        config = as_measured(config, result)
    picture = draw_samples(stored, set_name, config, options.samples, folder)
    count = SAMPLES if options.samples is None else options.samples
    name = picture[0].name if picture else None
    card = Card(config, set_name, name, count, result, options.license, is_diffusers)
    (folder / "README.md").write_text(card.text)


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
