"""Folders of Hugging Face diffusers, in the format of its open pull request #13098 (head of 2026-06-28).

    model_index.json, scheduler/scheduler_config.json, README.md
    transformer/config.json
    transformer/diffusion_pytorch_model.safetensors, or above 10 GB several files and an index

No release of diffusers has a JiT class; names and keys follow the proposal. Two older formats are read too: folders of
the community (attn.qkv), and the flat format of April 2026 with the authors' names in one folder, and a config.json
with a `model_type`. Such folders contain code files, which are never opened here. Facts that the format has no key for
are stored under the key `jitscale` of transformer/config.json, which diffusers keeps.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from jitscale.checkpoints.authors import IN_CONTEXT_START, sizes_from_shapes
from jitscale.checkpoints.names import POSITIONS, diffusers_names
from jitscale.checkpoints.streams import TensorFile, atomic_safetensors
from jitscale.checkpoints.weights import StoredWeights
from jitscale.config import Config, DiffusionConfig, ModelConfig, from_dict, network_differences, to_dict
from jitscale.errors import CheckpointError
from jitscale.files import atomic_write
from jitscale.model.layers import NORM_EPS, sincos_position_table

FOLDER, CLASS = "transformer", "JiTTransformer2DModel"
WEIGHTS = "diffusion_pytorch_model"
LARGEST_FILE = 10 * 10**9  # bytes; the limit of diffusers 0.42.1
_VERSION = "0.42.1"  # version of diffusers whose format is written

# Key of transformer/config.json -> field of ModelConfig. Both have the same defaults.
_FIELDS = {
    "sample_size": "image_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_size": "hidden_size",
    "num_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_classes": "num_classes",
    "bottleneck_dim": "bottleneck_dim",
    "in_context_len": "in_context_len",
    "in_context_start": "in_context_start",
    "attention_dropout": "attn_dropout",
    "dropout": "proj_dropout",
}
_FIXED = {"mlp_ratio": 4.0, "norm_eps": NORM_EPS}  # the same for every network here
# Key of the flat format -> its older name. If the older one is present and not null, it is used.
_FLAT = {
    "model_type": "model_name",
    "sample_size": "image_size",
    "num_class_embeds": "num_classes",
    "attention_dropout": "attn_dropout",
    "dropout": "proj_dropout",
}
_SCHEDULER = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}

logger = logging.getLogger(__name__)


def is_diffusers(described: Mapping[str, Any]) -> bool:
    """True if a config.json describes a model of diffusers, of any class."""
    return "_class_name" in described or "model_type" in described


def network_of(
    described: Mapping[str, Any], source: Path, shapes: Mapping[str, tuple[int, ...]], given: Config | None
) -> tuple[Config, str]:
    """The network of a config.json at `source` whose tensors have `shapes` (our names), and the name of its weight set.

    The diffusion settings come from the key `jitscale`, or else from the config `given`, or else they are assumed; then
    a warning says so. Raises a CheckpointError at another class, at keys or values that no JiT here has, or if the
    noise scale is unknown. Raises a ValueError, TypeError or KeyError if the content describes no network.
    """
    found = described.get("_class_name", CLASS)
    if found != CLASS:
        raise CheckpointError(f"{source}: describes a {found}, not a {CLASS}; give a JiT")
    keys = {key: value for key, value in described.items() if not key.startswith("_") and key != "jitscale"}
    model = _flat_network(keys, source, shapes) if "model_type" in keys else _network(keys, source)
    if "jitscale" in described:
        own = described["jitscale"]
        config, name = (
            from_dict({"model": vars(model), "diffusion": dict(own["diffusion"])}, str(source)),
            own["weights"],
        )
    elif given is not None:
        # As with the authors' file, a middle output layer starts from its initial weights: the format has none.
        config, name = replace(given, model=replace(at_own_positions(given.model), middle_head=0)), "model"
        if differing := network_differences(config, Config(model=model)):
            what = f"{source}: describes another network than the config ({'; '.join(differing)})"
            raise CheckpointError(f"{what}; give the config that the weights were trained with")
    else:
        config, name = Config(model=model, diffusion=_assumed(model, source)), "model"
    if config.diffusion.prediction != "x":
        raise CheckpointError(f"{source}: diffusion.prediction={config.diffusion.prediction}; must be x in this form")
    return config, str(name)


def at_own_positions(model: ModelConfig) -> ModelConfig:
    """`model` without `position_grid` if that equals the network's own grid, and so has no effect."""
    own = model.image_size // model.patch_size
    return replace(model, position_grid=None) if model.position_grid == own else model


def named_sets(files: Sequence[TensorFile], name: str) -> dict[str, TensorFile]:
    """The weight sets of a folder: `name` is the set of the plain file; a variant keeps its own name.

    If there is only one file, it is the set `name`, even if it is a variant.
    """
    if len(files) == 1:
        return {name: files[0]}
    stems = {file.stem.removeprefix(WEIGHTS).removeprefix(".") or name: file for file in files}
    return dict(sorted(stems.items(), key=lambda item: item[0] != name))


def write_diffusers(folder: Path, stored: StoredWeights, set_name: str, largest_file: int = LARGEST_FILE) -> None:
    """Write one weight set of `stored`, tensor by tensor. The network must predict x, without another position grid.

    Files have at most `largest_file` bytes, unless one tensor has more. Raises an OSError if that fails.
    """
    config = stored.config
    transformer = {
        **{key: getattr(config.model, field) for key, field in _FIELDS.items()},
        **_FIXED,
        "jitscale": {"weights": set_name, "diffusion": to_dict(config)["diffusion"]},
    }
    for name, class_name, values in (
        (f"{FOLDER}/config.json", CLASS, transformer),
        ("scheduler/scheduler_config.json", "FlowMatchEulerDiscreteScheduler", _SCHEDULER),
        (
            "model_index.json",
            "JiTPipeline",
            {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], FOLDER: ["diffusers", CLASS]},
        ),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _write_json(folder / name, {"_class_name": class_name, "_diffusers_version": _VERSION, **values})
    _write_tensors(folder / FOLDER, stored, set_name, largest_file)


def _network(keys: Mapping[str, Any], source: Path) -> ModelConfig:
    if unknown := sorted(keys - _FIELDS.keys() - _FIXED.keys()):
        what = f"{source}: unknown key {unknown[0]}={keys[unknown[0]]}"
        raise CheckpointError(f"{what}; remove it if it does not change the network")
    _check_fixed(keys, source)
    return ModelConfig(**{field: keys[key] for key, field in _FIELDS.items() if key in keys})


def _check_fixed(keys: Mapping[str, Any], source: Path) -> None:
    for key, value in _FIXED.items():
        if keys.get(key, value) != value:
            what = f"{source}: {key}={keys[key]}, but networks here have {value:g}"
            raise CheckpointError(f"{what}; give such a network")


def _flat_network(keys: Mapping[str, Any], source: Path, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig:
    """The network of the flat format, which names a size of the paper; the shapes determine the rest."""
    said = {key: keys[before] if keys.get(before) is not None else keys.get(key) for key, before in _FLAT.items()}
    size = str(said["model_type"]).partition("/")[0]
    if size not in IN_CONTEXT_START:
        sizes = ", ".join(IN_CONTEXT_START)
        raise CheckpointError(f"{source}: model_type={said['model_type']} must be one of {sizes}")
    model = sizes_from_shapes(shapes, int(said["sample_size"] or 256), IN_CONTEXT_START[size])
    classes = said["num_class_embeds"]
    if classes is not None and classes != model.num_classes:
        raise CheckpointError(f"{source}: num_class_embeds={classes}, but the tensors have {model.num_classes} classes")
    model.attn_dropout, model.proj_dropout = float(said["attention_dropout"] or 0), float(said["dropout"] or 0)
    return model


def _assumed(model: ModelConfig, source: Path) -> DiffusionConfig:
    """The paper's settings for this resolution; a warning names them.

    From 256 pixels on, the pipelines use the same noise scale. Below, one uses sample_size / 256 and another uses 1; a
    wrong noise scale would make images of noise.
    """
    scale = model.image_size / 256
    if scale < 1:
        what = f"{source}: does not say diffusion.noise_scale, and pipelines differ below 256 pixels"
        raise CheckpointError(f"{what}; give the config that the weights were trained with")
    assumed = DiffusionConfig(noise_scale=scale)
    names = ("noise_scale", "t_eps", "mu", "sigma", "label_drop")
    settings = ", ".join(f"{name}={getattr(assumed, name):g}" for name in names)
    logger.warning(
        "%s: does not say how the network was trained; assumed: %s; give a config if this is wrong", source, settings
    )
    return assumed


def _write_tensors(folder: Path, stored: StoredWeights, set_name: str, largest_file: int) -> None:
    model = stored.config.model
    own = {POSITIONS: (1, (model.image_size // model.patch_size) ** 2, model.hidden_size), **stored.shapes}
    files: list[dict[str, tuple[int, ...]]] = [{}]  # our tensors in each file; the parts of a tensor stay together
    held = 0
    for name, shape in own.items():
        if files[-1] and held + 4 * prod(shape) > largest_file:
            files.append({})
            held = 0
        files[-1][name] = shape
        held += 4 * prod(shape)

    def tensor(name: str) -> torch.Tensor:
        if name == POSITIONS:
            return sincos_position_table(model.hidden_size, model.image_size // model.patch_size)[None]
        return stored.tensor(set_name, name)

    weight_map: dict[str, str] = {}
    for number, ours in enumerate(files, 1):
        part = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        file = folder / f"{WEIGHTS}{part}.safetensors"
        shapes: dict[str, tuple[int, ...]] = {}
        for name, shape in ours.items():
            names = diffusers_names(name)
            shapes |= {each: (shape[0] // len(names), *shape[1:]) for each in names}
        with atomic_safetensors(file, shapes, {"format": "pt"}) as append:
            for name in ours:
                append(tensor(name))  # the parts of a tensor are consecutive rows
        weight_map |= dict.fromkeys(shapes, file.name)
    if len(files) > 1:
        total = 4 * sum(prod(shape) for shape in own.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / f"{WEIGHTS}.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in the layout of diffusers."""
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
