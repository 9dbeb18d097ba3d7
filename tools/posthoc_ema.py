"""Make averages of any EMA length from the snapshots of a run, finished or running (EDM2, arXiv 2312.02696).

    python -m jitscale.train --config C.yaml run.dir=R ema.power_widths=[0.05,0.1] ema.snapshot_every_images=4000000
    python tools/posthoc_ema.py --run R --widths 0.03 0.05:0.25:0.05 --output R/posthoc
    python -m jitscale.evaluate --checkpoint R/posthoc/power_0.100.safetensors --config C.yaml run.dir=R/posthoc/0.100

A width is the standard deviation of the average relative to the length of the run: 0.1 after 600 epochs is 60 epochs.
The command writes one safetensors file for each width. jitscale.evaluate and jitscale.load_model read it.

The command prints for each width:
  expected error  distance between the reconstructed weighting of the run's history and the wanted one, relative to the
                  wanted one. It holds for weights that are independent from image to image; slow changes are
                  reconstructed at least ten times better. It falls about with the square of the number of snapshots.
  sum error       difference between the sum of the snapshots' coefficients and 1, before they are scaled to 1
  amplification   sum of the coefficients' absolute values: the factor by which the snapshots' float32 rounding grows
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import installed

import numpy as np
import torch
from tqdm import tqdm

from jitscale.checkpoints.checked import checked_output
from jitscale.checkpoints.format import Checkpoint
from jitscale.checkpoints.power_averages import Reconstruction, solve
from jitscale.checkpoints.saving import complete_snapshots
from jitscale.checkpoints.streams import atomic_safetensors
from jitscale.checkpoints.weights import check_finite, description, elements, shape_differences
from jitscale.command import Parser, refuse_existing
from jitscale.config import WIDEST_POWER, power_name
from jitscale.errors import CheckpointError, ExitCode, UserError, exit_with_message

BLOCK = 2**20  # elements of a parameter that are mixed at once: 8 MiB in float64 for each width
COARSE_ERROR, WORST_ERROR = 5e-2, 0.5  # above the first the width is marked as coarse, above the second refused
MOST_WIDTHS = 200


def main() -> int:
    """Parse the command line and write the averages."""
    parser = Parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run's folder with snapshots/")
    widths_help = "widths such as 0.1, or FROM:TO:STEP, which includes both ends"
    parser.add_argument("--widths", nargs="+", required=True, metavar="WIDTH", help=widths_help)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the .safetensors files")
    at_help = "make the averages as they were at the snapshot after N images; default: the newest snapshot"
    parser.add_argument("--at-images", type=int, metavar="N", help=at_help)
    options = parser.parse_args()

    widths = parse_widths(options.widths)
    files = [options.output / f"{power_name(width)}.safetensors" for width in widths]
    refuse_existing(*files)
    snapshots = open_snapshots(options.run, options.at_images)

    inputs = [(snapshot, name) for snapshot in snapshots for name in snapshot.weight_sets]
    images = np.array([snapshot.progress.images for snapshot, _ in inputs], np.float64)
    stored = np.array([float(name.removeprefix("power_")) for _, name in inputs])
    solution = solve(images, stored, images.max(), np.array(widths))
    source = f"{options.run}: {len(snapshots)} snapshots of {int(images[0])} to {int(images[-1])} images"
    report(widths, solution, source)
    write(files, inputs, widths, solution)
    print("\n".join(["written:", *(f"  {file}" for file in files)]))
    return ExitCode.DONE


def parse_widths(texts: Sequence[str]) -> list[float]:
    """The widths that `texts` name, each once, in order. Raises a UserError if a text names none."""
    widths: list[float] = []
    for text in texts:
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 3 and 0 < numbers[0] <= numbers[1] < math.inf and numbers[2] > 0:
            low, high, step = numbers
            count = math.floor((high - low) / step + 1e-6) + 1
            if count > MOST_WIDTHS:
                raise UserError(f"--widths {text}: {count} widths, {MOST_WIDTHS} at most; give a larger step")
            found = [round(low + index * step, 9) for index in range(count)]
        elif len(numbers) == 1:
            found = numbers
        else:
            raise UserError(f"--widths {text}: must be a number or FROM:TO:STEP; for example 0.1 or 0.05:0.25:0.05")
        if wrong := [width for width in found if not 0 < width < WIDEST_POWER]:
            what = f"{wrong[0]} is no width of a power function; widths lie in (0, {WIDEST_POWER:.4f})"
            end = f"at {WIDEST_POWER:.4f} it would be a plain mean over the run"
            raise UserError(f"--widths {text}: {what} ({end}); give a width in between, for example 0.1")
        widths += found
    return list(dict.fromkeys(widths))


def open_snapshots(run: Path, at_images: int | None) -> list[Checkpoint]:
    """The snapshots up to `at_images`, verified, oldest first.

    Raises a UserError if there are fewer than two, none at `at_images`, or if they are of different networks.
    """
    folders = complete_snapshots(run)
    if not folders:
        remedy = "train with ema.power_widths=[0.05,0.1] and ema.snapshot_every_images"
        raise CheckpointError(f"{run}: no snapshots (no {run / 'snapshots'}/images_*); {remedy}")
    if at_images is not None and at_images not in folders:
        nearest = min(folders, key=lambda images: abs(images - at_images))
        raise UserError(f"--at-images {at_images}: {run} has no snapshot there; the nearest is {nearest}")
    chosen = [folder for images, folder in folders.items() if at_images is None or images <= at_images]
    if len(chosen) < 2:
        what = f"{len(chosen)} snapshot up to {at_images or max(folders)} images, but a reconstruction needs 2 or more"
        raise CheckpointError(f"{run}: {what}; train on, or lower ema.snapshot_every_images")
    snapshots = [Checkpoint(folder) for folder in chosen]
    for snapshot in tqdm(snapshots, unit="snapshot", desc="verify", leave=False):
        snapshot.verify()
        if differing := shape_differences(snapshot.shapes, snapshots[-1].shapes):
            raise CheckpointError(f"{snapshot.path}: weights of another network than {chosen[-1]} ({differing})")
        check_finite(snapshot, snapshot.weight_sets)
    return snapshots


def report(widths: Sequence[float], solution: Reconstruction, source: str) -> None:
    """Print the error of the reconstruction. Raises a UserError if the snapshots cannot express a width."""
    lines = [source, f"  {'weights':<14}{'expected error':>16}{'sum error':>12}{'amplification':>16}"]
    amplifications = np.abs(solution.coefficients).sum(axis=0)
    rows = zip(widths, solution.errors, solution.sum_errors, amplifications, strict=True)
    for width, error, sum_error, amplification in rows:
        line = f"  {power_name(width):<14}{error:>16.1e}{sum_error:>12.1e}{amplification:>16.1f}"
        if error > WORST_ERROR:
            what = f"{source} cannot express it (expected error {error:.0%}, at most {WORST_ERROR:.0%})"
            remedy = "give a width nearer to the tracked ones, or take snapshots more often"
            raise UserError(f"--widths {width}: {what}; {remedy}")
        lines.append(line + ("  coarse: snapshots are far apart for this width" if error > COARSE_ERROR else ""))
    print("\n".join(lines))


def write(
    files: Sequence[Path], inputs: Sequence[tuple[Checkpoint, str]], widths: Sequence[float], solution: Reconstruction
) -> None:
    """Mix the stored sets into one file for each width, block by block of each parameter.

    All files appear together, after they were checked against the config. Raises a CheckpointError if a snapshot is
    damaged, or the output cannot be written or fails the check.
    """
    newest = inputs[-1][0]
    coefficients = torch.from_numpy(solution.coefficients)
    with checked_output(files[0].parent, newest.config, [power_name(width) for width in widths]) as folder:
        folder.mkdir()
        with ExitStack() as stack:
            appends = []
            for file, width, error in zip(files, widths, solution.errors, strict=True):
                source = {"images": newest.progress.images, "width": width, "expected_error": float(error)}
                metadata = {**description(power_name(width), newest.config), "posthoc": json.dumps(source)}
                appends.append(stack.enter_context(atomic_safetensors(folder / file.name, newest.shapes, metadata)))
            bar = tqdm(total=elements(newest.shapes), unit="elements", unit_scale=True, desc="mix")
            progress = stack.enter_context(bar)
            for parameter, shape in newest.shapes.items():
                for low in range(0, math.prod(shape), BLOCK):
                    high = min(low + BLOCK, math.prod(shape))
                    mixed = torch.zeros(len(files), high - low, dtype=torch.float64)
                    for row, (snapshot, name) in zip(coefficients, inputs, strict=True):
                        mixed.addr_(row, snapshot.read(name, parameter, low, high).double())
                    for append, values in zip(appends, mixed.float(), strict=True):
                        append(values)
                    progress.update(high - low)


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
