"""Upgrade a checkpoint to another resolution. Averaged down, the output of the new network equals that of the old one.

    python tools/upgrade_resolution.py --checkpoint runs/jit_h_256 --to configs/finetune_h_512.yaml --output runs/h_512
    python -m jitscale.train --config configs/finetune_h_512.yaml run.dir=runs/h_512

PATH is a run or step folder, safetensors files, a Hugging Face folder, or the authors' .pth file. The output is a run
folder at step 0, with all weight sets. The optimizer's moments of resized parameters start from zero; the other moments
are kept. docs/upgrade.md derives the method.
"""

import shlex
from pathlib import Path

import installed

import torch
from PIL import Image

import jitscale
from jitscale.checkpoints import upgrade
from jitscale.checkpoints.format import complete_checkpoints
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.weights import MOMENTS, SUBSPACE, StoredWeights, check_fits, elements
from jitscale.command import Parser
from jitscale.config import Config, image_shape, load_config
from jitscale.diffusion.objective import project, to_spaces
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.features import as_pictures
from jitscale.model.jit import JiT, network_holding

LARGEST_WHOLE_CHECK = 200_000_000  # parameters; the check of a whole network holds two of them: 1.6 GB
PREVIEW_IMAGES, PREVIEW_STEPS = 8, 25


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the upgraded checkpoint."""
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="the weights to upgrade")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the network of PATH, if PATH does not say it")
    parser.add_argument("--to", type=Path, required=True, metavar="CONFIG", help="the YAML file of the new resolution")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new run's folder")
    parser.add_argument("--mode", choices=upgrade.MODES, help="resize patches or add tokens; default: by CONFIG")
    kernels = upgrade.KERNELS
    parser.add_argument("--kernel", choices=kernels, default=kernels[0], help="of patches; default: %(default)s")
    parser.add_argument("--reset-moments", action="store_true", help="discard all moments of the optimizer")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="draw samples before and after, one row each")
    parser.add_overrides("settings that override --to")
    options = parser.parse_intermixed_args(arguments)

    target = load_config(options.to, [*options.overrides, f"run.dir={options.output}"])
    stored = open_weights(options.checkpoint, options.config)
    plan = upgrade.plan_upgrade(stored.config, target, options.kernel, options.mode)
    check_fits(stored, stored.config)
    if complete_checkpoints(options.output):
        raise UserError(f"{options.output}: holds checkpoints already; choose another --output")
    stored.verify()
    folder, sets = upgrade.write_upgraded(stored, target, plan, keep_moments=not options.reset_moments)
    report(stored, target, plan, folder, sets)
    for name in stored.weight_sets:
        print(f"  self-check of {name}: {self_check(stored, name, target, plan)}")
    if options.preview is not None:
        preview(options.preview, stored, target, plan)
        print(f"  {options.preview}: samples before the upgrade, after it averaged down, and after it")
    settings = [f"run.dir={options.output}", *options.overrides]
    print(f"next: {shlex.join(['python', '-m', 'jitscale.train', '--config', str(options.to), *settings])}")
    return ExitCode.DONE


def report(stored: StoredWeights, target: Config, plan: upgrade.Upgrade, folder: Path, sets: list[str]) -> None:
    """Print which tensors were resized, kept and reset."""
    old, new = stored.config.model, target.model
    print(f"{stored.path}: {old.image_size} px, patch {old.patch_size}")
    print(f"{folder}: {new.image_size} px, patch {new.patch_size}, mode {plan.mode}")
    resized = [name for name in plan.resized if name in stored.shapes]
    if resized:
        print(f"  resized by {plan.ratio}: {', '.join(resized)}")
    else:
        print(f"  resized: nothing; {(new.image_size // new.patch_size) ** 2} tokens of {new.patch_size} px per side")
    kept = len(stored.shapes) - len(resized)
    print(f"  kept: the other {kept} tensors of each of {', '.join(stored.weight_sets)}")
    if not any(name in MOMENTS for name in sets):
        print("  moments of the optimizer: begin at zero (none stored, those of another optimizer, or --reset-moments)")
    elif resized:
        print(f"  moments of the optimizer: zero for the resized parameters, kept for the other {kept}")
    print(f"  noise scale: {stored.config.diffusion.noise_scale:g} -> {target.diffusion.noise_scale:g}")
    if plan.mode == "patch":
        deviation = plan.noise_deviation()
        print(f"  pooled noise has {deviation:.3f} times the standard deviation of the training (1: the same)")
    if plan.mode == "patch" and plan.resized:
        factor = 1 / float(plan.ratio) ** 2
        print(f"  recommended: optim.lr_factor_patch_embedding={factor:.4g} (docs/upgrade.md#learning-rate)")


@torch.no_grad()
def self_check(stored: StoredWeights, name: str, target: Config, plan: upgrade.Upgrade) -> str:
    """The measured difference between the new function, averaged down, and the old one on random input, in words.

    Only the first and the last layers change, so these are always checked. The velocities of the whole networks are
    compared if the network has at most `LARGEST_WHOLE_CHECK` parameters.
    """
    torch.manual_seed(0)
    if plan.mode == "tokens":
        return "nothing was resized"
    enter = plan.enter.float()
    old_patch, new_patch = enter.shape
    embedding = stored.tensor(name, upgrade.PATCH_EMBEDDING)
    patches = torch.randn(16, embedding.shape[1], new_patch, new_patch)
    embedded = torch.einsum("bcqr,dcqr->bd", patches, plan.tensor(upgrade.PATCH_EMBEDDING, embedding))
    entering = _difference(embedded, torch.einsum("bcij,dcij->bd", plan.pool(patches), embedding))
    found = [f"patch embedding {entering:.1e}"]
    for layer, words in zip(upgrade.OUTPUT_LAYERS, ("output layer", "middle output layer"), strict=True):
        if f"{layer}.weight" in stored.shapes:
            found.append(f"{words} {_leaving(stored, name, layer, plan):.1e}")
    if SUBSPACE in stored.shapes:
        found.append(f"subspace {_of_subspace(stored, name, plan):.1e}")
    if elements(stored.shapes) <= LARGEST_WHOLE_CHECK and new_patch >= old_patch:
        found.append(f"whole network {_of_velocities(stored, name, target, plan):.1e}")
    return ", ".join(found)


def _leaving(stored: StoredWeights, name: str, layer: str, plan: upgrade.Upgrade) -> float:
    """The distance of the new output layer's patches, averaged down, from the old ones (or the old ones, pooled)."""
    weight, bias = (stored.tensor(name, f"{layer}.{part}") for part in ("weight", "bias"))
    enter, leave = plan.enter.float(), plan.leave.float()
    old_patch, new_patch = enter.shape
    channels, hidden = len(weight) // old_patch**2, torch.randn(16, weight.shape[1])
    before = (hidden @ weight.T + bias).view(-1, old_patch, old_patch, channels)
    after = hidden @ plan.tensor(f"{layer}.weight", weight).T + plan.tensor(f"{layer}.bias", bias)
    after = after.view(-1, new_patch, new_patch, channels)
    if new_patch >= old_patch:  # pooling reverses the new layer
        return _difference(torch.einsum("bqrc,iq,jr->bijc", after, enter, enter), before)
    return _difference(after, torch.einsum("bijc,qi,rj->bqrc", before, leave, leave))


def _of_subspace(stored: StoredWeights, name: str, plan: upgrade.Upgrade) -> float:
    """The new subspace's distance from orthonormal, or its pooled projections' distance from the old projections."""
    before = stored.tensor(name, SUBSPACE)
    after = plan.tensor(SUBSPACE, before)
    orthonormal = _difference(after.double().T @ after.double(), torch.eye(after.shape[1], dtype=torch.float64))
    old_patch, new_patch = plan.enter.shape
    largest = max(old_patch, new_patch)
    patches = torch.randn(16, stored.config.model.in_channels, largest, largest)
    large, small = (after, before) if new_patch >= old_patch else (before, after)
    pool = plan.enter.float() if new_patch >= old_patch else plan.leave.float()

    def pooled(images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcqr,iq,jr->bcij", images, pool, pool)

    return max(orthonormal, _difference(pooled(project(patches, large)), project(pooled(patches), small)))


def _of_velocities(stored: StoredWeights, name: str, target: Config, plan: upgrade.Upgrade) -> float:
    """The distance of all outputs' pooled velocities from the old network's velocities at the same times."""
    old, new = stored.network(name), upgraded_network(stored, name, target, plan)
    shape, old_settings = image_shape(target.model), stored.config.diffusion
    z, t = target.diffusion.noise_scale * torch.randn(2, *shape), torch.tensor([0.2, 0.7])
    y = torch.tensor([0, old.null_label])

    def velocities(network: JiT, z: torch.Tensor) -> list[torch.Tensor]:
        middle = network.config.middle_head > 0
        outputs, space = network(z, t, y, middle=middle), old_settings.prediction
        return [
            to_spaces(output, z, t, space, old_settings.t_eps, network.subspace).v
            for output in (outputs if middle else [outputs])
        ]

    pairs = zip(velocities(new, z), velocities(old, plan.pool(z)), strict=True)
    return max(_difference(plan.pool(after), before) for after, before in pairs)


def upgraded_network(stored: StoredWeights, name: str, target: Config, plan: upgrade.Upgrade) -> JiT:
    """The new network with one weight set, in eval mode."""
    weights = {key: plan.tensor(key, stored.tensor(name, key)) for key in stored.shapes}
    return network_holding(weights, target.model, target.diffusion)


def preview(path: Path, stored: StoredWeights, target: Config, plan: upgrade.Upgrade) -> None:
    """Draw samples of the old network, of the new one pooled, and of the new one, from the same noise."""
    name = stored.default
    new = upgraded_network(stored, name, target, plan)
    shape = image_shape(target.model)
    noise = torch.randn(PREVIEW_IMAGES, *shape, generator=torch.Generator().manual_seed(0))
    labels = [index % max(1, target.model.num_classes) for index in range(PREVIEW_IMAGES)]
    after = jitscale.sample(new, labels, noise=noise, steps=PREVIEW_STEPS)
    rows = [after]
    if plan.mode == "patch":
        seen = plan.pool(target.diffusion.noise_scale * noise)
        before = jitscale.sample(stored.network(name), labels, noise=seen, noise_scale=1.0, steps=PREVIEW_STEPS)
        rows = [before, plan.pool(after), after]
    shown = [torch.nn.functional.interpolate(row, size=shape[1:], mode="nearest") for row in rows]
    grid = torch.cat([torch.cat(list(row), dim=2) for row in shown], dim=1)
    pixels = as_pictures(((grid.clamp(-1, 1) + 1) * 127.5).round().byte()[None])[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference relative to that of `expected`."""
    return float((found - expected).norm() / expected.norm().clamp(min=1e-12))


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
