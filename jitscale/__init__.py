"""jitscale trains JiT (plain ViTs on pixels that predict the clean image, arXiv 2511.13720) at any scale.

model = jitscale.load_model("runs/jit_b_256")
images = jitscale.sample(model, labels=[207, 360], guidance_scale=3.0)
jitscale.to_pil(images)[0].save("class_207.png")
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jitscale.installation import explain_missing_packages
from jitscale.versions import __version__

if sys.argv[:1] == ["-m"]:  # python -m jitscale.COMMAND: its imports come next
    explain_missing_packages()
if TYPE_CHECKING:  # importing jitscale stays fast: torch is imported by the first call
    import torch
    from PIL import Image

    from jitscale.checkpoints.opening import ConfigSource
    from jitscale.model.jit import JiT

__all__ = ["__version__", "load_model", "sample", "to_pil"]

logger = logging.getLogger(__name__)


def load_model(path: str | Path, weights: str | None = None, config: ConfigSource | None = None) -> JiT:
    """The network of a checkpoint, in eval mode on the CPU, callable as `model(z, t, y)`.

    `model.weights_name` is the weight set that was loaded. It is also logged, with a warning if the set is an average
    that still consists mostly of the run's initial weights.

    Raises a jitscale.errors.CheckpointError if `path` cannot be read, has no such weight set, or has other sizes.

    Args:
        path: a run folder, a step folder, a .safetensors file, a folder in the form of Hugging Face or diffusers, the
            authors' .pth file, or one of these at hf://OWNER/NAME[@REVISION][/FOLDER].
        weights: `model`, `ema_<decay>` or `power_<width>`; None for the run's `evaluation.weights`, or the authors'
            model_ema1.
        config: needed if the file does not state the sizes: a YAML file, a config object, or a mapping of model fields
            (image_size, patch_size, in_channels, hidden_size, depth, num_heads, bottleneck_dim, in_context_len,
            in_context_start, num_classes) with an optional noise_scale.
    """
    from jitscale.checkpoints.opening import open_weights  # noqa: PLC0415

    stored = open_weights(path, config)
    model = stored.network(weights)
    model.weights_name = stored.choose(weights)
    logger.info("%s: weights %s", stored.path, model.weights_name)
    if caution := stored.caution(model.weights_name):
        logger.warning("%s", caution)
    return model


def sample(
    model: JiT,
    labels: Sequence[int] | torch.Tensor,
    noise: torch.Tensor | None = None,
    seed: int = 0,
    noise_scale: float | None = None,
    method: str = "heun",
    steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.1, 1.0),
    guide: JiT | None = None,
    time_shift: float = 1.0,
    internal_guidance: float = 1.0,
    internal_interval: tuple[float, float] = (0.0, 1.0),
) -> torch.Tensor:
    """Images for `labels`, (B, channels, image_size, image_size) float32; -1 is black and 1 is white; not clamped.

    `to_pil` converts them to pictures. Raises a ValueError if `labels` is empty or not a list of integers in
    [0, num_classes], if the seed is negative, if `noise` has another shape, if the method is unknown, if `time_shift`
    is out of range, or if the network has no middle output layer and `internal_guidance` asks for it.

    Args:
        model: from `load_model`.
        labels: B class indices; `model.null_label` for no class.
        noise: (B, channels, image_size, image_size) standard normal; None draws image i from (seed, i).
        seed: seed of the noise, used if `noise` is None.
        noise_scale: factor on the noise; None for the value of training.
        method: "heun" (2 `steps` - 1 evaluations of the network), or "euler", "2m" or "ab2" (`steps` evaluations; the
            last two are multistep methods of second order).
        steps: intervals of the time grid.
        guidance_scale: 1 for none.
        guidance_interval: times t between which guidance acts.
        guide: a smaller or less trained network, for autoguidance; None: guidance leaves out the label.
        time_shift: s in the times t / (t + (1 - t) s), in [0.01, 100]; with s > 1 more steps lie near the noise.
        internal_guidance: scale of the guidance away from the prediction of the middle output layer of `model`; 1 for
            none. It needs no additional evaluations of the network.
        internal_interval: times t between which internal guidance acts.
    """
    from jitscale.config import image_shape  # noqa: PLC0415
    from jitscale.config.schema import LARGEST_SEED  # noqa: PLC0415
    from jitscale.diffusion.sampler import Sampler  # noqa: PLC0415
    from jitscale.evaluation.generate import checked_labels, noise_of, sample_images  # noqa: PLC0415

    trained, labels = model.diffusion, checked_labels(labels, model.null_label)
    sampler = Sampler(
        method=method,
        steps=steps,
        guidance_scale=guidance_scale,
        guidance_interval=guidance_interval,
        prediction=trained.prediction,
        t_eps=trained.t_eps,
        time_shift=time_shift,
        internal_guidance=internal_guidance,
        internal_interval=internal_interval,
    )
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed: must be in [0, {LARGEST_SEED}], got {seed}")
    if noise is None:
        noise = noise_of(seed, range(len(labels)), image_shape(model.config))
    scale = trained.noise_scale if noise_scale is None else noise_scale
    return sample_images(model, sampler, scale * noise, labels, guide)


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """RGB or grey pictures of the `images` of `sample` (B, 3 or 1, height, width): clamped to [-1, 1] and rounded.

    Raises a ValueError if the shape is another one, or if the values are integers or not finite.
    """
    import torch  # noqa: PLC0415
    from PIL import Image  # noqa: PLC0415

    from jitscale.evaluation.features import as_pictures, to_uint8  # noqa: PLC0415

    return [Image.fromarray(picture) for picture in as_pictures(to_uint8(torch.as_tensor(images)))]
