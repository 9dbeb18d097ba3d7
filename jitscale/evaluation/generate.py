"""Generates images from sample ids, so that no image depends on the number of ranks.

Noise and label of an image are functions of (seed, id); by default the label is id mod classes. Images are generated in
blocks of a fixed size, so that the arithmetic is the same for any world size.

Shapes: B images, A channels, S image size.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from jitscale import parallel
from jitscale.config import Config, DiffusionConfig, EvaluationConfig, image_shape
from jitscale.diffusion.sampler import Sampler
from jitscale.diffusion.steps import State
from jitscale.errors import ConfigError
from jitscale.evaluation.features import as_pictures, to_uint8
from jitscale.keyed_random import Purpose, uniform
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.execution import REMEDY, Execution, prepare
from jitscale.model.jit import JiT
from jitscale.parallel import World

logger = logging.getLogger(__name__)

GRID_COLUMNS, GRID_ROWS = 8, 10  # a picture of samples; a row is a class


def noise_of(seed: int, ids: Sequence[int], shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise for images of `shape` (A, S, S): (B, A, S, S) float32, from Philox with key (seed, id).

    It is drawn on the CPU, because the random numbers of a GPU depend on its number of multiprocessors.
    """
    draws = [np.random.Generator(np.random.Philox(key=[seed, i])).standard_normal(shape, np.float32) for i in ids]
    return torch.from_numpy(np.stack(draws))


def noise_ahead(seed: int, blocks: Sequence[Sequence[int]], shape: tuple[int, int, int]) -> Iterator[torch.Tensor]:
    """`noise_of` the ids of each block; a thread draws it while the device computes the previous block."""
    with ThreadPoolExecutor(1) as thread:
        draws = (thread.submit(noise_of, seed, ids, shape) for ids in blocks)  # lazy: one block ahead
        ahead = next(draws, None)
        while ahead is not None:
            noise, ahead = ahead.result(), next(draws, None)
            yield noise


def labels_of(ids: Sequence[int], num_classes: int) -> torch.Tensor:
    """Labels id mod classes, (B,): balanced in every multiple of the classes; 0, the null label, without classes."""
    return torch.tensor([i % num_classes if num_classes else 0 for i in ids])


def random_labels(ids: Sequence[int], seed: int, counts: Sequence[int]) -> torch.Tensor:
    """Random labels (B,) int64, functions of (seed, id); the probability of a class is proportional to its count."""
    total = sum(counts)
    if total < 1:
        raise ValueError(f"counts: need a class with samples, got {list(counts)}")
    draws = uniform(seed, Purpose.SAMPLED_LABELS, np.asarray(ids))
    return torch.from_numpy(np.searchsorted(np.cumsum(counts) / total, draws, side="right"))


def checked_labels(labels: Sequence[int] | torch.Tensor, null_label: int) -> torch.Tensor:
    """`labels` as (B,) int64. Raises a ValueError unless they are one or more integers in [0, null_label]."""
    needed = f"labels: need one or more integers in [0, {null_label}], such as [0], got"
    try:
        found = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:  # texts, None, lists of different lengths
        raise ValueError(f"{needed} {str(labels)[:60]}") from error
    if found.ndim == 0:
        raise ValueError(f"{needed} the single value {found.item()}; put it into a list")
    if len(found) == 0:
        raise ValueError(f"{needed} an empty list")
    if found.ndim > 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{needed} {found.dtype} of shape {tuple(found.shape)}")
    found = found.long()
    if not bool(((found >= 0) & (found <= null_label)).all()):
        raise ValueError(f"{needed} {found.tolist()}")
    return found


def configured_sampler(evaluation: EvaluationConfig, diffusion: DiffusionConfig) -> Sampler:
    """The configured sampler, for a network that was trained with the settings `diffusion`."""
    low, high = evaluation.guidance_interval
    internal_low, internal_high = evaluation.internal_interval
    return Sampler(
        method=evaluation.method,
        steps=evaluation.steps,
        guidance_scale=evaluation.guidance_scale,
        guidance_interval=(low, high),
        prediction=diffusion.prediction,
        t_eps=diffusion.t_eps if evaluation.t_eps is None else evaluation.t_eps,
        time_shift=evaluation.time_shift,
        internal_guidance=evaluation.internal_guidance,
        internal_interval=(internal_low, internal_high),
    )


def ready_to_sample(model: JiT, config: Config, device: torch.device) -> JiT:
    """Move `model` to `device`, in eval mode, and let it compute as `config.engine` says. Changes and returns `model`.

    Call it once for each network. Raises a ConfigError if the requested attention kernel does not work there, or CUDA
    graphs are requested without a GPU.
    """
    _make_ready(model, config, device)
    return model


def ready_on_all_ranks(model: JiT, config: Config, world: World) -> JiT:
    """`ready_to_sample` on every rank of `world`; a collective call, so not for a network that only rank 0 builds.

    All ranks must compute in the same way; otherwise an image would depend on the rank that makes it. Raises on every
    rank what `ready_to_sample` raises on one, and a ConfigError if the ranks differ.
    """
    execution = parallel.raise_together(lambda: _make_ready(model, config, world.device))
    parallel.require_alike("how the network samples", execution.identity, REMEDY)
    return model


def _make_ready(model: JiT, config: Config, device: torch.device) -> Execution:
    model.to(device).eval()
    execution = prepare(model, config.engine, device, training=False, batch=config.evaluation.block_size)
    text = f"sampling: {execution}"
    if config.evaluation.cuda_graphs:
        if device.type != "cuda":
            raise ConfigError(f"evaluation.cuda_graphs=true: {device} has none; set it to false, or take a GPU")
        model.forward = CudaGraphs(model.forward)  # type: ignore[method-assign, assignment]
        text += ", CUDA graphs"
    _log_once(text)
    return execution


@cache
def _log_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.info("%s", text)


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """Autocast for sampling, in the arithmetic of the network's training."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.engine.precision != "fp32")


def generate(model: JiT, sampler: Sampler, ids: Sequence[int], seed: int, guide: JiT | None = None) -> torch.Tensor:
    """The images of `ids`, (B, A, S, S) float32, on the model's device, not clamped."""
    noise = model.diffusion.noise_scale * noise_of(seed, ids, image_shape(model.config))
    return sample_images(model, sampler, noise, labels_of(ids, model.config.num_classes), guide)


def generate_by_scale(
    model: JiT, samplers: Sequence[Sampler], labels: torch.Tensor, noise: torch.Tensor, guide: JiT | None = None
) -> Iterator[torch.Tensor]:
    """The images of `labels` for each sampler. Samplers differ only in the guidance scale; they share steps before it.

    With labels_of(ids, classes) and noise_of(seed, ids, shape), the images are bitwise equal to those of `generate`.
    """
    first = samplers[0]
    assert all(replace(sampler, guidance_scale=first.guidance_scale) == first for sampler in samplers)
    noise = model.diffusion.noise_scale * noise
    labels = labels.to(model.pos_embed.device)
    shared = first.steps_before_guidance()
    before = first.carry(model, State(noise.to(labels.device)), labels, model.null_label, range(shared))
    for sampler in samplers:
        yield sampler.carry(model, before, labels, model.null_label, range(shared, sampler.steps), guide).z


def sample_images(
    model: JiT, sampler: Sampler, noise: torch.Tensor, labels: torch.Tensor, guide: JiT | None = None
) -> torch.Tensor:
    """Images of `labels` (B,) from `noise` (B, A, S, S), which is already multiplied by the noise scale.

    Raises a ValueError at wrong labels (see `checked_labels`), at noise of another shape, and at internal guidance of a
    network without a middle output layer.
    """
    shape, device = image_shape(model.config), model.pos_embed.device
    if sampler.internal_guidance != 1.0 and model.config.middle_head == 0:
        raise ValueError(
            f"internal_guidance: need a network with a middle output layer (model.middle_head) for "
            f"{sampler.internal_guidance}; give 1.0"
        )
    labels = checked_labels(labels, model.null_label)
    if noise.shape != (len(labels), *shape):
        raise ValueError(f"noise: need shape {(len(labels), *shape)}, got {tuple(noise.shape)}")
    return sampler.sample(model, noise.to(device), labels.to(device), model.null_label, guide)


def grid_ids(num_classes: int) -> list[int]:
    """The ids of the images in a picture of samples, for a network with `num_classes`: one row for each class."""
    classes = max(1, num_classes)
    return [row + column * classes for row in range(min(GRID_ROWS, classes)) for column in range(GRID_COLUMNS)]


def sample_grid(model: JiT, sampler: Sampler, seed: int, most: int, guide: JiT | None = None) -> npt.NDArray[np.uint8]:
    """A picture of samples from `tile`: one row for each of the first `GRID_ROWS` classes.

    A batch has at most `most` images. Raises a UserError at values that are not finite.
    """
    ids = grid_ids(model.config.num_classes)
    together = -(-len(ids) // -(-len(ids) // most))  # batches of about the same size, so that few sizes are compiled
    parts = [ids[first : first + together] for first in range(0, len(ids), together)]
    images = [to_uint8(generate(model, sampler, part, seed, guide), part).cpu() for part in parts]
    return tile(torch.cat(images), GRID_COLUMNS)


def tile(images: torch.Tensor, columns: int) -> npt.NDArray[np.uint8]:
    """One picture (see `as_pictures`) of uint8 images (B, A, S, S), in rows of `columns`, separated by grey lines."""
    line = max(1, images.shape[-1] // 32)
    framed = F.pad(images, (line, line, line, line), value=128)
    rows = framed.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4)  # (A, rows, S, columns, S)
    return as_pictures(rows.flatten(3).flatten(1, 2)[None])[0]
