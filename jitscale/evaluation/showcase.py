"""Content of a model card: a few samples of the exported weights, and the run's measurements of these weights."""

import io
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from jitscale.checkpoints.opening import read_guide
from jitscale.checkpoints.weights import StoredWeights
from jitscale.config import Config, EvaluationConfig
from jitscale.errors import UserError, first_line
from jitscale.evaluation.evaluator import weights_digest
from jitscale.evaluation.features import to_uint8
from jitscale.evaluation.generate import autocast, configured_sampler, generate, ready_to_sample, tile
from jitscale.model.flops import forward_flops
from jitscale.parallel import choose_device
from jitscale.tracking import distance_of

SAMPLES = 8  # default number of samples
COLUMNS, TOGETHER = 4, 8  # images in a row of the picture; images in a batch
LARGEST_PICTURE = 300_000  # bytes
MOST_FLOPS = 1e13  # limit of the default samples without a GPU: some minutes on two cores


def draw_samples(stored: StoredWeights, set_name: str, config: Config, count: int | None, folder: Path) -> list[Path]:
    """Draw the first `count` images of the evaluation in `config` as one picture in `folder`, of at most 300 KB.

    None means `SAMPLES`, or no picture if that would take long without a GPU; then a line is printed. Returns a list
    with the picture's path, or an empty list. Raises a UserError at images with values that are not finite, and what
    `read_guide` raises.
    """
    device = choose_device(config.run.device)
    evaluation = config.evaluation
    if count is None:
        count = SAMPLES
        evaluations = 2 * evaluation.steps * (2 if evaluation.guidance_scale != 1 else 1)
        flops = count * evaluations * forward_flops(config.model)
        if device.type == "cpu" and flops > MOST_FLOPS:
            what = f"samples: none, because {flops:.1g} FLOP would take long without a GPU"
            print(f"{what}; --samples {count} draws them anyway")
            return []
    if count == 0:
        return []
    model = ready_to_sample(stored.network(set_name, device), config, device)
    sampler, guide = (
        configured_sampler(evaluation, model.diffusion),
        read_guide(config, stored.class_names, device=device),
    )
    parts: list[torch.Tensor] = []
    with torch.no_grad(), autocast(config, device):
        for first in range(0, count, TOGETHER):
            ids = range(first, min(first + TOGETHER, count))
            drawn = generate(model, sampler, ids, evaluation.seed, guide)
            try:
                parts.append(to_uint8(drawn, ids).cpu())
            except UserError as error:
                raise UserError(f"{error}; --samples 0 writes the weights without a picture") from error
    images = torch.cat(parts)
    columns = min(COLUMNS, count)
    empty = images.new_full((-count % columns, *images.shape[1:]), 128)
    return [_written(Image.fromarray(tile(torch.cat([images, empty]), columns)), folder)]


def measured(stored: StoredWeights, set_name: str) -> dict[str, Any] | None:
    """The result of the run of `stored` that was measured with exactly the weights of this set, or None.

    If there are several, result.json is chosen, or else the result with the most images and then the smallest distance.
    Raises a UserError if a result cannot be read.
    """
    if stored.path.parent.name != "checkpoints":
        return None
    run = stored.path.parents[1]
    paths = [run / "result.json", *sorted((run / "results").glob("*.json"))]
    results = [(path, _read(path)) for path in paths if path.exists()]
    if not results:
        return None
    digest = weights_digest(stored.network(set_name))
    own = [(path, result) for path, result in results if result["protocol"].get("weights_sha256") == digest]
    own.sort(key=lambda item: (item[0] != paths[0], -item[1]["num_images"], item[1][distance_of(item[1])]))
    return own[0][1] if own else None


def as_measured(config: Config, result: dict[str, Any]) -> Config:
    """`config` with the sampling settings of `result`; after a sweep, those of the best point."""
    names = {f.name for f in fields(EvaluationConfig)}
    sampler = {name: value for name, value in result["protocol"]["sampler"].items() if name in names}
    return replace(config, evaluation=replace(config.evaluation, **sampler))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        checked = {key: found[key] for key in ("protocol", "reference", "num_images", distance_of(found))}
        checked["protocol"]["sampler"], checked["protocol"]["features"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{path}: is not a result of an evaluation ({first_line(error)})"
        raise UserError(f"{what}; remove it, or measure again") from error
    return dict(found)


def _written(picture: Image.Image, folder: Path) -> Path:
    """Write the picture as PNG; if that is too large, as JPEG; if that is too large too, with fewer pixels."""
    for suffix, options in ((".png", {"optimize": True}), (".jpg", {"quality": 90}), (".jpg", {"quality": 75})):
        content = _encoded(picture, suffix, options)
        if len(content) <= LARGEST_PICTURE:
            break
    while len(content) > LARGEST_PICTURE:
        picture = picture.reduce(2)
        content = _encoded(picture, suffix, options)
    path = folder / f"samples{suffix}"
    path.write_bytes(content)
    return path


def _encoded(picture: Image.Image, suffix: str, options: dict[str, Any]) -> bytes:
    content = io.BytesIO()
    picture.save(content, {".png": "PNG", ".jpg": "JPEG"}[suffix], **options)
    return content.getvalue()
