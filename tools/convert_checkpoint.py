"""Turn weights from one form into another, bit by bit the same.

    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to safetensors --output exported/
    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to huggingface --weights ema_0.9999 --output hub/
    python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to authors --output checkpoint-last.pth
    python tools/convert_checkpoint.py --checkpoint checkpoint-last.pth --to run --output runs/continued \\
        --config configs/jit_h_256.yaml

safetensors: a folder with one file a weight set, and the network's config in its metadata. huggingface: a folder for
`jitscale.checkpoints.hub.HubJiT.from_pretrained` (needs jitscale[hub]). authors: their `checkpoint-last.pth`, with the
optimizer's moments, without the middle output layer. run: a checkpoint that `jitscale.train` continues, with the
averages and moments of the source; a middle output layer that the source lacks begins with a prediction of zero.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import installed

from torch import Tensor
from tqdm import tqdm

from jitscale.checkpoints.authors import METHODS, write_authors_file
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.middle_layer import with_middle_layer_of
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
from jitscale.errors import CheckpointError, ExitCode, UserError, exit_with_message

AUTHORS_DECAYS = (0.9999, 0.9996)  # of model_ema1 and model_ema2


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and convert."""
    parser = Parser(__doc__)
    sources = "a run or step folder, .safetensors files, a Hugging Face folder, the authors' .pth"
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help=sources)
    parser.add_argument("--to", required=True, choices=WRITERS, help="the new form")
    parser.add_argument("--output", type=Path, required=True, metavar="PATH", help="a folder; for authors a file")
    sets = "such as model ema_0.9999 (default: all; huggingface: the one that the run samples from; run: model)"
    parser.add_argument("--weights", nargs="+", metavar="SET", help=sets)
    parser.add_argument("--config", type=Path, metavar="FILE", help="run; else the network if PATH does not say it")
    for number, decay in enumerate(AUTHORS_DECAYS, 1):
        meaning = f"authors: becomes model_ema{number} (default: %(default)s)"
        parser.add_argument(f"--ema{number}", default=ema_name(decay), metavar="SET", help=meaning)
    parser.add_number("--epoch", 0, "authors: the last complete one", int)
    parser.add_number("--images", 0, "run: images that the weights have seen", natural)
    options = parser.parse_args(arguments)

    stored = open_weights(options.checkpoint, options.config)
    stored.verify()
    if options.to in ("run", "authors"):  # the authors' network has no middle output layer, as the default
        stored, change = with_middle_layer_of(stored, _config_of_run(options) if options.to == "run" else Config())
        if change:
            print(change)
    check_tensors(stored)
    try:
        written = WRITERS[options.to](stored, options)
    except OSError as error:
        raise CheckpointError(f"{options.output}: cannot be written ({error}); choose another --output") from error
    print("\n".join([f"{stored.path}: read", "written:", *(f"  {path}" for path in written)]))
    return ExitCode.DONE


def to_safetensors(stored: StoredWeights, options: argparse.Namespace) -> list[Path]:
    """One file a weight set."""
    names = [stored.choose(name) for name in options.weights or stored.weight_sets]
    files = [options.output / f"{name}.safetensors" for name in names]
    refuse_existing(*files)
    check_finite(stored, names)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, file in zip(tqdm(names, unit="set", desc="write"), files, strict=True):
        write_safetensors(file, stored, name)
    return files


def to_huggingface(stored: StoredWeights, options: argparse.Namespace) -> list[Path]:
    """config.json, model.safetensors and a model card."""
    try:
        from jitscale.checkpoints.hub import HubJiT  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"--to huggingface needs {error.name}; pip install 'jitscale[hub]'") from error
    chosen = stored.choose(_one_set(options, "a Hugging Face folder holds one weight set"))
    refuse_existing(options.output / "model.safetensors", options.output / "config.json")
    check_finite(stored, [chosen])
    # The folder holds the subspace, wherever it came from.
    network = HubJiT(stored.config.model, replace(stored.config.diffusion, subspace=None), chosen)
    stored.load_into(network, chosen)
    network.save_pretrained(options.output)
    return [options.output / name for name in ("config.json", "model.safetensors", "README.md")]


def to_authors(stored: StoredWeights, options: argparse.Namespace) -> list[Path]:
    """The authors' `checkpoint-last.pth`."""
    if options.weights is not None:
        raise UserError("--weights: the authors' file holds the model and two averages; choose by --ema1 and --ema2")
    refuse_existing(options.output)
    averages = [name for name in stored.weight_sets if name.startswith("ema_") and is_average(name)]
    for option, name in (("ema1", options.ema1), ("ema2", options.ema2)):
        if name not in averages:
            choice = ", ".join(averages) or "none: the authors format needs an exponential average"
            raise UserError(f"--{option} {name}: not among the averages of {stored.path}; choose one of {choice}")
    named = {key: attrgetter(key) for key in ("diffusion.prediction", "model.position_grid", "model.in_channels")}
    unlike = [f"{key}={of(stored.config)}" for key, of in named.items() if of(stored.config) != of(Config())]
    if unlike:
        theirs = "predicts x of RGB images, with positions of the network's own grid"
        what = f"{stored.path}: {', '.join(unlike)}, and the authors' code {theirs}"
        raise CheckpointError(f"{what}; convert this network --to safetensors")
    check_finite(stored, [stored.choose("model"), options.ema1, options.ema2, *stored.moments])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_authors_file(options.output, stored, options.ema1, options.ema2, options.epoch)
    evaluation = stored.config.evaluation
    if evaluation.method not in METHODS or evaluation.time_shift != 1.0:
        own = f"evaluation.method={evaluation.method} evaluation.time_shift={evaluation.time_shift:g}"
        print(
            f"{stored.path}: {own}, and the authors' code has {' and '.join(METHODS)} at uniform times; samples differ"
        )
    if stored.optimizer_step == 0:
        print(f"{stored.path}: has no moments of the optimizer; those in the new file are empty")
    return [options.output]


def to_run(stored: StoredWeights, options: argparse.Namespace) -> list[Path]:
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
        print("the optimizer's moments begin at zero: there are none of AdamW's that belong to these weights")
    steps = stored.optimizer_step if moments else 0
    progress = Progress(0, options.images, steps, None, class_names=stored.class_names)
    names = {"model": begin, **{name: name for name in (*averages, *moments)}}

    def read(name: str, parameter: str) -> Tensor:
        return stored.tensor(names[name], parameter)

    folder = write_streamed(step_folder(options.output, 0), progress, config, stored.shapes, list(names), read)
    (options.output / "config.yaml").write_text(to_yaml(config))
    return [folder]


WRITERS: dict[str, Callable[[StoredWeights, argparse.Namespace], list[Path]]] = {
    "safetensors": to_safetensors,
    "huggingface": to_huggingface,
    "authors": to_authors,
    "run": to_run,
}


def _config_of_run(options: argparse.Namespace) -> Config:
    if options.config is None:
        raise UserError("--to run needs --config, the YAML file that the run will be started with")
    return load_config(options.config, [f"run.dir={options.output}"])


def _one_set(options: argparse.Namespace, why: str) -> str | None:
    if options.weights is not None and len(options.weights) > 1:
        raise UserError(f"--weights {' '.join(options.weights)}: {why}; name one")
    return options.weights[0] if options.weights else None


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
