"""Write a first configuration for your own shards, with the reason next to each setting.

    python tools/new_config.py --shards runs/photos/128px --output photos.yaml
    python tools/new_config.py --shards /data/birds_256 --output birds.yaml --device cuda --gpus 8 --gpu-memory 80GB

It looks at the shards and at this machine. It checks the file as a run does, also against the shards, and prints the
command that starts the run.
"""

import argparse
import tempfile
from pathlib import Path

import installed

import torch

from jitscale.command import Parser, bytes_of, path_text, positive, refuse_existing
from jitscale.config import RGB, load_config
from jitscale.data.shards import ShardSet, open_training_shards
from jitscale.errors import DataError, ExitCode, UserError, data_error, exit_with_message
from jitscale.files import atomic_write
from jitscale.planner.starting import SIZES, Machine, Pictures, as_yaml, start_command, starting_lines

USUAL_MEMORY = 24e9  # bytes, if no GPU is here to ask


def main() -> int:
    """Parse the command line, look at the shards, and write."""
    parser = Parser(__doc__)
    parser.add_argument("--shards", type=path_text, required=True, metavar="DIR", help="as for data.shards")
    parser.add_argument("--output", type=Path, default=Path("my.yaml"), metavar="FILE.yaml", help="(default: my.yaml)")
    sizes = "size of the network (default: by the machine and the number of pictures)"
    parser.add_argument("--size", choices=list(SIZES), help=sizes)
    own = "pixels per side, for shards with pictures of mixed sizes"
    parser.add_argument("--resolution", type=positive, metavar="N", help=own)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--gpus", type=positive, metavar="N", help="GPUs of the run (default: those here, or 1)")
    memory = f"memory of a GPU, such as 80GB (default: that of the GPU here, or {USUAL_MEMORY / 1e9:.0f}GB)"
    parser.add_argument("--gpu-memory", type=bytes_of(), metavar="SIZE", help=memory)
    options = parser.parse_args()
    if options.output.suffix != ".yaml":
        parser.error(f"--output {options.output}: must be called .yaml")
    refuse_existing(options.output)

    machine = _machine(options)
    pictures = _pictures(options.shards, options.resolution)
    lines = starting_lines(pictures, machine, f"runs/{options.output.stem}", options.size)
    head = f"A first run on {options.shards}, written by tools/new_config.py. docs/settings.md explains every setting."
    text = as_yaml(lines, head)
    _check(text, machine)
    with (
        data_error(f"{options.output}: cannot be written", "choose another --output"),
        atomic_write(options.output) as f,
    ):
        f.write(text.encode())
    given = {line.key: line.value for line in lines}
    network = f"{given['model.hidden_size']} wide, {given['model.depth']} blocks"
    print(f"{options.output}: {pictures.count:,} pictures of {pictures.image_size} px; a network {network}")
    print(f"start it with:\n  {start_command(str(options.output), machine)}")
    return ExitCode.DONE


def _machine(options: argparse.Namespace) -> Machine:
    """The machine of the run, by the options or this machine. Raises a UserError if they contradict each other."""
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.device == "cpu" or (options.device == "auto" and not here):
        given = [name for name in ("gpus", "gpu_memory") if getattr(options, name) is not None]
        if given:
            option = f"--{given[0].replace('_', '-')}"
            raise UserError(f"{option}: there is no GPU here, or --device cpu; give --device cuda for another machine")
        return Machine(0)
    memory = options.gpu_memory or USUAL_MEMORY
    if here and options.gpu_memory is None:
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    return Machine(options.gpus or max(1, here), memory)


def _pictures(pattern: str, resolution: int | None) -> Pictures:
    """The content of the shards. Raises a DataError if they do not say it, or `resolution` is missing or too large."""
    shards = ShardSet.open(pattern, 0, resolution, setting="--shards", size_setting="--resolution")
    if shards.classes is None:
        remedy = f"write one with: python tools/index_shards.py {pattern}"
        raise DataError(f"{pattern}: there is no manifest, so the number of classes is not known; {remedy}")
    if shards.stored["resolution"] is None and resolution is None:
        raise DataError(f"{pattern}: its pictures have mixed sizes; give --resolution, for example 256")
    channels = shards.stored_channels or RGB
    return Pictures(pattern, shards.num_samples, shards.classes, shards.image_size, channels)


def _check(text: str, machine: Machine) -> None:
    """Read the file as a run does, and open the shards with it. Raises the errors of both."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "starting.yaml"
        path.write_text(text)
        open_training_shards(load_config(path, world_size=max(1, machine.gpus), needs_shards=True))


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
