"""Turn a low-resolution checkpoint into a high-resolution one that computes the same function through pooling.

    python tools/upgrade_resolution.py --checkpoint runs/jit_h_256 --to configs/jit_h_512.yaml --output runs/jit_h_512
    python -m jitscale.train --config configs/jit_h_512.yaml run.dir=runs/jit_h_512

The output is a run folder at step 0. Weights and all averages are resized; the optimizer's moments of resized
parameters start from zero, all others are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from jitscale.config import load_config, to_yaml
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.training.checkpoint import MOMENTS, Progress, complete_checkpoints, whole_fragments, write_checkpoint
from jitscale.upgrade import RESIZED, upgrade_factor, upgrade_tensor
from jitscale.weights.opening import open_checkpoint


def main() -> int:
    """Parse the command line and write the upgraded checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="RUN", help="a run folder or a step folder")
    parser.add_argument("--to", type=Path, required=True, metavar="CONFIG", help="the high-resolution YAML file")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new run's folder")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win over --to")
    options = parser.parse_intermixed_args()

    target = load_config(options.to, [*options.overrides, f"run.dir={options.output}"])
    checkpoint = open_checkpoint(options.checkpoint)
    factor = upgrade_factor(checkpoint.config, target)
    if complete_checkpoints(options.output):
        raise UserError(f"{options.output}: holds checkpoints already; choose another --output")

    sets: dict[str, list[torch.Tensor]] = {name: [] for name in checkpoint.sets}
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in tqdm(checkpoint.shapes, unit="parameter", desc="upgrade"):
        for name, tensors in sets.items():
            new = upgrade_tensor(parameter, checkpoint.tensor(name, parameter), factor)
            if name in MOMENTS and parameter in RESIZED:
                new = torch.zeros_like(new)
            shapes[parameter] = tuple(new.shape)
            tensors.append(new.flatten())
    progress = Progress(step=0, images=0, optimizer_step=checkpoint.progress.optimizer_step, data=None)
    folder = write_checkpoint(options.output, progress, target, whole_fragments(shapes), sets)
    (options.output / "config.yaml").write_text(to_yaml(target))

    old, new_model = checkpoint.config.model, target.model
    print(f"{checkpoint.folder}: {old.image_size} px, patch {old.patch_size}")
    print(f"{folder}: {new_model.image_size} px, patch {new_model.patch_size}")
    print(f"  resized by {factor}: {', '.join(RESIZED)}")
    print(f"  kept: the other {len(shapes) - len(RESIZED)} parameters of each of {', '.join(checkpoint.weight_sets)}")
    print(f"  noise scale: {checkpoint.config.diffusion.noise_scale} -> {target.diffusion.noise_scale}")
    print(f"next: python -m jitscale.train --config {options.to} run.dir={options.output}")
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
