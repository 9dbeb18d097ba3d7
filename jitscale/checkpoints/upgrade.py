"""Changes the resolution of a network: resizes the layers that depend on the patch size, and preserves the function.

For a higher resolution let k = new patch / old patch, let D be average pooling of a patch by k, and U an upsampling
that D reverses (D U = 1). With the old patch embedding W and output layer V, the new ones are W D and U V. Before any
training, pooling the new network's output gives the old network's output:

    D net'(z', t, y) = net(D z', t, y)

The same holds for the middle output layer. If the network predicts x - S e (asym, with S = P P^T), the velocity is
preserved if D S' = S D. For pooling by area means and an integer k, D D^T = 1 / k^2. Then P' = k D^T P has orthonormal
columns, and S' = P' P'^T satisfies the condition. For other kernels and ratios there is no such S'; they are refused
unless the rank is 0 or full.

The kernels `nearest` and `smooth` pool by area means. This turns noise of standard deviation k into noise of standard
deviation 1, so the noise scale is multiplied by k. In `nearest`, U is the pseudo-inverse of D (for integer k the
repetition of pixels). In `smooth`, U is bicubic interpolation, corrected so that D U = 1. In `pi-bilinear` and
`pi-bicubic`, U is an interpolation and D its pseudo-inverse (Beyer et al. 2023, FlexiViT, section 3.4); this does not
preserve the standard deviation of the noise.

For a lower resolution, D and U change places: the new layers are W U and D V, and the new subspace is D P / k. It is
orthonormal only if P has no detail within the new pixels, which holds if P came from an upgrade.

An upgrade is linear in the weights, so it applies to every average too. The checkpoint is written tensor by tensor.

Shapes: A channels of an image, P old patch, Q new patch (pixels per side), C hidden size, R rank of the subspace.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from jitscale.checkpoints.checked import checked_output
from jitscale.checkpoints.format import Progress, complete_checkpoints, step_folder
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import (
    FAR_FROM_ORTHONORMAL,
    MOMENTS,
    SUBSPACE,
    StoredWeights,
    check_finite,
    check_fits,
    names_in,
    shapes_of,
)
from jitscale.config import Config, has_fitted_subspace, network_differences, patch_elements, to_yaml
from jitscale.errors import CheckpointError, ConfigError, UserError

PATCH_EMBEDDING = "x_embedder.proj1.weight"
OUTPUT_LAYERS = ("final_layer.linear", "middle_layer.linear")
RESIZED = (PATCH_EMBEDDING, *(f"{layer}.{part}" for layer in OUTPUT_LAYERS for part in ("weight", "bias")), SUBSPACE)
KERNELS = ("smooth", "nearest", "pi-bilinear", "pi-bicubic")  # the first is the default
AREA_MEANS = KERNELS[:2]  # the kernels that pool by area means
MODES = ("patch", "tokens")


@dataclass(frozen=True)
class Upgrade:
    """A map from the weights of one network to those of another resolution."""

    mode: str  # `patch` resizes patches and keeps the number of tokens; `tokens` keeps patches and adds tokens
    ratio: Fraction  # new resolution / old resolution
    enter: torch.Tensor  # (P, Q) float64, from a row of new pixels to old ones, before the patch embedding
    leave: torch.Tensor  # (Q, P) float64, from a row of old pixels to new ones, after the output layer

    @property
    def resized(self) -> tuple[str, ...]:
        """Names of the parameters that change."""
        return RESIZED if self.mode == "patch" and self.ratio != 1 else ()

    def tensor(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor `name` of the new network, in the precision of the old one, `tensor`; computed in float64.

        These change: the patch embedding (bottleneck, A, P, P), an output layer's weight (P * P * A, C) and bias
        (P * P * A,), and the subspace (P * P * A, R), with rows in the order row, column, channel. Any other tensor is
        returned unchanged. Raises a CheckpointError if the new subspace is not orthonormal.
        """
        if name not in self.resized:
            return tensor
        exact = tensor.double()
        if name == PATCH_EMBEDDING:
            resized = torch.einsum("bcij,iq,jr->bcqr", exact, self.enter, self.enter)
        elif name == SUBSPACE:
            resized = self._subspace(exact)
        else:
            resized = _on_both_axes(exact, self.leave)
        return resized.to(tensor.dtype)

    def _subspace(self, old: torch.Tensor) -> torch.Tensor:
        """The subspace (Q * Q * A, R) of the new network from the `old` one (P * P * A, R)."""
        grows, scale = self.ratio > 1, float(max(self.ratio, 1 / self.ratio))
        new = scale * _on_both_axes(old, self.enter.T if grows else self.leave)
        deviation = float((new.T @ new - torch.eye(new.shape[1], dtype=new.dtype)).abs().max())
        if not deviation <= FAR_FROM_ORTHONORMAL:  # also true for NaN
            size = len(self.leave)
            what = f"the subspace in patches of {size} pixels per side is not orthonormal (by {deviation:.1e})"
            why = "the old one is damaged" if grows else "it holds detail that these pixels lose"
            raise CheckpointError(f"{what}: {why}; start from {'a sound checkpoint' if grows else 'random weights'}")
        return new

    def pool(self, images: torch.Tensor) -> torch.Tensor:
        """Pool images (B, A, H, W) of the new resolution, patch by patch, to the old resolution."""
        if self.mode == "tokens":
            return images
        old, new = self.enter.shape
        patches = images.unflatten(3, (-1, new)).unflatten(2, (-1, new))  # (B, A, G, Q, G, Q)
        enter = self.enter.to(images.dtype)
        pooled = torch.einsum("bcgqhr,iq,jr->bcgihj", patches, enter, enter)
        return pooled.reshape(*images.shape[:2], images.shape[2] // new * old, images.shape[3] // new * old)

    def noise_deviation(self) -> float:
        """Root mean square of the standard deviation of pooled noise, relative to the noise of the old training.

        1 means that the old layers see the noise that they were trained with. The new noise is `ratio` times the old
        one, as configurations must set it.
        """
        return float(self.ratio) * float(self.enter.square().sum(dim=1).mean())


def plan_upgrade(old: Config, new: Config, kernel: str = KERNELS[0], mode: str | None = None) -> Upgrade:
    """The upgrade from the network of `old`, with which the weights were trained, to the network of `new`.

    `kernel`, one of `KERNELS`, resizes patches. `mode` is one of `MODES`; None: the patch sizes decide. Raises a
    ConfigError if settings other than resolution and patch size differ, the sizes fit no mode, the noise scale is not
    the ratio times the old one, or asym's subspace cannot be preserved.
    """
    differing = "; ".join(network_differences(old, new, ignored=("image_size", "patch_size", "position_grid", "rank")))
    if differing:
        what = f"an upgrade changes only image and patch size, but the target also differs in {differing}"
        raise ConfigError(f"{what}; give the target the old network's values")
    old_patch, new_patch = old.model.patch_size, new.model.patch_size
    ratio, patches = Fraction(new.model.image_size, old.model.image_size), Fraction(new_patch, old_patch)
    meant = "patch" if patches == ratio else "tokens" if patches == 1 else None
    if meant is None:
        grown = f"{float(ratio):g} x {old_patch}, as the image size grows (the number of tokens stays)"
        raise ConfigError(f"model.patch_size={new_patch} must be {grown}, or stay {old_patch} (tokens are added)")
    if ratio != 1 and mode not in (None, meant):
        what = f"--mode {mode}: the target's patches of {new_patch} pixels mean mode {meant}"
        other = old_patch if meant == "patch" else "larger"
        raise ConfigError(f"{what}; give a target of the same image size with model.patch_size={other}")
    grid = old.model.position_grid or old.model.image_size // old_patch
    if meant == "tokens" and new.model.position_grid != grid:
        why = "so that the position encodings of more tokens are interpolated"
        what = f"model.position_grid={new.model.position_grid} must be {grid}, {why}"
        raise ConfigError(f"{what}; add model.position_grid={grid}")
    noise_scale = float(ratio) * old.diffusion.noise_scale
    if not math.isclose(new.diffusion.noise_scale, noise_scale):
        why = f"since pooling divides the noise by {float(ratio):g}"
        what = f"diffusion.noise_scale={new.diffusion.noise_scale} must be {float(ratio):g} x the old one, {why}"
        raise ConfigError(f"{what}; add diffusion.noise_scale={noise_scale:g}")
    _check_rank(old, new, ratio if meant == "patch" else Fraction(1), kernel)
    if meant == "tokens":
        same = torch.eye(old_patch, dtype=torch.float64)
        return Upgrade(meant, ratio, same, same)
    return Upgrade(meant, ratio, *operators(old_patch, new_patch, kernel))


def write_upgraded(
    stored: StoredWeights, target: Config, upgrade: Upgrade, *, keep_moments: bool = True
) -> tuple[Path, list[str]]:
    """Upgrade the verified `stored`, and write it as a run at step 0 into `target.run.dir`, with all weight sets.

    The optimizer's moments are zero for resized parameters; without `keep_moments`, none are written. Returns the
    checkpoint's folder, and the names of the sets in it, moments included.

    Raises a UserError if the target's folder holds checkpoints. Raises a CheckpointError if the source is damaged, not
    finite or not the network of its config, if there is not enough room, or if the target cannot be written or fails
    its check.
    """
    run_dir = Path(target.run.dir)
    if complete_checkpoints(run_dir):
        raise UserError(f"{run_dir}: holds checkpoints already; choose another output")
    check_fits(stored, stored.config)  # otherwise the target would lack the same parameters as the source
    moments = stored.moments if keep_moments and target.optim.name == "adamw" else ()
    sets = [*stored.weight_sets, *moments]
    check_finite(stored, sets)
    new = shapes_of(target)
    steps, names = stored.optimizer_step if moments else 0, stored.class_names
    progress = Progress(step=0, images=0, optimizer_step=steps, data=None, class_names=names)
    with tqdm(total=sum(len(names_in(name, new)) for name in sets), unit="tensor", desc="upgrade") as bar:

        def tensor(set_name: str, parameter: str) -> torch.Tensor:
            bar.update()
            if set_name in MOMENTS and parameter in upgrade.resized:
                return torch.zeros(new[parameter])
            return upgrade.tensor(parameter, stored.tensor(set_name, parameter))

        with checked_output(run_dir, target, sets) as staged:
            write_streamed(step_folder(staged, 0), progress, target, new, sets, tensor)
            (staged / "config.yaml").write_text(to_yaml(target))
    return step_folder(run_dir, 0), sets


def operators(old: int, new: int, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """`enter` (old, new) and `leave` (new, old), in float64, for patches of `old` and `new` pixels per side.

    Raises a ConfigError if `kernel` is not one of `KERNELS`.
    """
    small, large = min(old, new), max(old, new)
    if kernel not in KERNELS:
        raise ConfigError(f"--kernel {kernel}: choose one of {', '.join(KERNELS)}")
    pool = _area_means(small, large)
    if kernel == "nearest":
        enlarge = torch.linalg.pinv(pool)
    elif kernel == "smooth":
        interpolation = _interpolation(small, large, "bicubic")
        enlarge = interpolation @ torch.linalg.inv(pool @ interpolation)
    else:
        enlarge = _interpolation(small, large, kernel.removeprefix("pi-"))
        pool = torch.linalg.pinv(enlarge)
    return (pool, enlarge) if new >= old else (enlarge, pool)


def _check_rank(old: Config, new: Config, ratio: Fraction, kernel: str) -> None:
    """Refuse a rank that means another prediction, and an upgrade that does not preserve the subspace.

    `ratio` is new patch / old patch.
    """
    if old.diffusion.prediction != "asym":
        return
    rank, asked = old.diffusion.rank, new.diffusion.rank
    all_old, all_new = patch_elements(old.model), patch_elements(new.model)
    expected = all_new if rank == all_old else rank
    if asked != expected:
        full = f": full rank, as {rank} is for the old patch" if rank == all_old else ", the old one"
        raise ConfigError(f"diffusion.rank={asked} must be {expected}{full}; add diffusion.rank={expected}")
    if not has_fitted_subspace(old.model, old.diffusion) or ratio == 1:
        return
    if not has_fitted_subspace(new.model, new.diffusion):
        what = f"diffusion.rank={rank}: below the {all_old} numbers of the old patch, but full rank for the new one"
        raise ConfigError(f"{what}, which is another prediction; choose larger patches")
    what = f"diffusion.rank={rank}: the subspace is preserved only"
    if max(ratio, 1 / ratio).denominator != 1:
        raise ConfigError(f"{what} where patches grow or shrink by a whole number, not by {ratio}; choose another size")
    if kernel not in AREA_MEANS:
        raise ConfigError(f"{what} where pooling takes the mean of areas; choose --kernel {' or '.join(AREA_MEANS)}")


def _on_both_axes(rows: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """Multiply both axes of patches by `axis` (Q, P); `rows` (P * P * A, ...) are in the order row, column, channel."""
    patch = axis.shape[1]
    resized = torch.einsum("ijd,qi,rj->qrd", rows.reshape(patch, patch, -1), axis, axis)
    return resized.reshape(-1, *rows.shape[1:])


def _area_means(small: int, large: int) -> torch.Tensor:
    """(small, large): each of the `small` pixels is the mean over the area that it covers in the `large` ones."""
    width = large / small
    starts = torch.arange(small, dtype=torch.float64)[:, None] * width
    pixels = torch.arange(large, dtype=torch.float64)[None]
    overlap = torch.minimum(starts + width, pixels + 1) - torch.maximum(starts, pixels)
    return overlap.clamp(min=0) / width


def _interpolation(small: int, large: int, kernel: str) -> torch.Tensor:
    """(large, small): torch's interpolation along one axis of an image (align_corners=False)."""
    rows = torch.eye(small, dtype=torch.float64).view(small, 1, small, 1)
    return F.interpolate(rows, size=(large, 1), mode=kernel, align_corners=False).view(small, large).T
