"""Opens the weights at a path, in the format of any program that is supported."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from jitscale.checkpoints import diffusers
from jitscale.checkpoints.authors import AuthorsWeights
from jitscale.checkpoints.format import Checkpoint, latest_checkpoint
from jitscale.checkpoints.hub_download import fetched, is_hub_address
from jitscale.checkpoints.names import own_names
from jitscale.checkpoints.split import tensor_files
from jitscale.checkpoints.streams import TensorFile
from jitscale.checkpoints.weights import SafetensorsWeights, StoredWeights, open_safetensors
from jitscale.config import Config, ModelConfig, check_model_config, from_dict, load_config
from jitscale.data.class_order import refuse_other_classes
from jitscale.errors import CheckpointError, ConfigError, UserError, first_line, unreadable
from jitscale.model.jit import JiT
from jitscale.parallel import World

ConfigSource = str | Path | Config | ModelConfig | Mapping[str, Any]

HUB_CONFIG = "config.json"  # a name that huggingface_hub and diffusers fix
HUB_WEIGHTS = "model"  # without .safetensors
# Settings that a flat mapping may hold besides the model fields; they do not describe the network.
_SAMPLING_FIELDS = {"noise_scale", "method", "steps", "guidance_scale", "interval"}


def open_weights(path: str | Path, config: ConfigSource | None = None) -> StoredWeights:
    """The weights at `path`, in any supported form.

    The forms are: a run folder (its newest checkpoint), a step folder, a folder of safetensors files, a Hugging Face
    folder, a folder of diffusers, a .safetensors file, the authors' .pth file, or one of these at hf://OWNER/NAME, an
    address on the Hugging Face hub.

    `config` (a YAML file, a config object, or a mapping of model fields) is needed if the file does not say the sizes,
    or, for safetensors, the diffusion settings.

    Only checkpoints of this project have hashes; each file is verified before its first read. In other forms, flipped
    bits are found only if they break the file.

    Raises a CheckpointError if there are no readable weights or a config is needed, a StorageError if the storage
    fails, a ConfigError at impossible sizes.
    """
    path = fetched(path) if is_hub_address(path) else Path(path)
    try:
        return _open(path, config)
    except OSError as error:
        what = f"{path}: cannot be read ({error.strerror or error}); choose other weights"
        raise unreadable(path, error, what) from error


def _open(path: Path, config: ConfigSource | None) -> StoredWeights:
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a run folder, a step folder or a weights file")
    if path.is_dir():
        return _open_folder(path, config)
    if not path.is_file():
        raise CheckpointError(f"{path}: is a device or a pipe; give a run folder, a step folder or a weights file")
    if path.suffix == ".safetensors":
        return _open_safetensors(path, [open_safetensors(path)], config)
    path.open("rb").close()  # raises the true OSError: is_zipfile would only return False
    if not zipfile.is_zipfile(path):
        what = f"{path}: not a readable checkpoint: neither a .safetensors file nor one of torch.save (a zip archive)"
        raise CheckpointError(f"{what}; give a run folder or such a file")
    return AuthorsWeights(path, None if config is None else _interpret(config).model)


def read_guide(
    config: Config,
    class_names: Sequence[str] | None,
    world: World | None = None,
    device: str | torch.device = "cpu",
) -> JiT | None:
    """The network of `evaluation.guide`, in eval mode on `device`; None if it is not set.

    `class_names` are the classes of the guided network, if known. Each rank of a `world` verifies a share of the files,
    so ranks must call this inside `parallel.raise_together`. Raises a CheckpointError if the guide cannot be read, a
    ConfigError if its images, classes or noise differ from `config`, a DataError if its classes have other numbers.
    """
    evaluation = config.evaluation
    if evaluation.guide is None:
        return None
    stored = open_weights(evaluation.guide)
    if world is not None:
        stored.verify(world.rank, world.size)
    guide = stored.network(evaluation.guide_weights, device)
    compared = [
        ("model.image_size", guide.config.image_size, config.model.image_size),
        ("model.in_channels", guide.config.in_channels, config.model.in_channels),
        ("model.num_classes", guide.config.num_classes, config.model.num_classes),
        ("diffusion.prediction", guide.diffusion.prediction, config.diffusion.prediction),
        ("diffusion.noise_scale", guide.diffusion.noise_scale, config.diffusion.noise_scale),
    ]
    differing = [f"{key}: {its} there, {own} here" for key, its, own in compared if its != own]
    if differing:
        raise ConfigError(f"evaluation.guide={evaluation.guide}: cannot guide this network ({'; '.join(differing)})")
    place, remedy = f"evaluation.guide={evaluation.guide}", "give a guide that was trained on the same shards"
    refuse_other_classes(place, stored.class_names, "the network", class_names, remedy)
    return guide


def _open_folder(folder: Path, config: ConfigSource | None) -> StoredWeights:
    if (folder / "index.json").exists():
        return Checkpoint(folder)
    if (folder / diffusers.FOLDER / HUB_CONFIG).exists():
        return _open_folder(folder / diffusers.FOLDER, config)
    files = tensor_files(folder)
    if not files:
        if (newest := latest_checkpoint(folder)) is not None:
            return newest
        raise CheckpointError(f"{folder}: no complete checkpoint there; give a run folder or a step folder")
    source = folder / HUB_CONFIG
    described = _json(source) if source.exists() else {}
    if diffusers.is_diffusers(described):
        return _open_diffusers(folder, files, described, config)
    if not source.exists() or HUB_WEIGHTS not in [file.stem for file in files]:
        return _open_safetensors(folder, files, config)
    network = _described(described, source)
    weights = next(file for file in files if file.stem == HUB_WEIGHTS)
    return SafetensorsWeights(folder, {str(described.get("weights", "model")): weights}, network)


def _open_diffusers(
    folder: Path, files: list[TensorFile], described: dict[str, Any], config: ConfigSource | None
) -> StoredWeights:
    source, given = folder / HUB_CONFIG, None if config is None else _interpret(config)
    shapes = {own: files[0].shapes()[parts[0]] for own, parts in own_names(files[0].path, files[0].shapes()).items()}
    try:
        network, name = diffusers.network_of(described, source, shapes, given)
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise _undescribed(source, error) from error
    check_model_config(network.model, str(source), network.diffusion)
    return SafetensorsWeights(folder, diffusers.named_sets(files, name), network)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError(f"its content is a {type(found).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise _undescribed(path, error) from error
    return found


def _open_safetensors(path: Path, files: list[TensorFile], config: ConfigSource | None) -> StoredWeights:
    named = {file.metadata.get("weights", "model" if len(files) == 1 else file.stem): file for file in files}
    if len(named) < len(files):
        raise CheckpointError(f"{path}: several files hold the same weight set; keep each set once")
    named = dict(sorted(named.items(), key=lambda item: item[0] != "model"))  # `model` first, as in a checkpoint
    metadata = next(iter(named.values())).metadata
    if "model" in metadata:  # written by `weights.description`
        try:
            described = {key: json.loads(metadata[key]) for key in ("model", "diffusion")}
        except (ValueError, KeyError, RecursionError) as error:
            raise _undescribed(path, error) from error
        return SafetensorsWeights(path, named, _described(described, path))
    if config is None:
        raise CheckpointError(f"{path}: the file does not say the network's sizes; give its config")
    return SafetensorsWeights(path, named, _interpret(config))


def _described(values: Mapping[str, Any], source: Path) -> Config:
    """The network that a file describes. The file is not trusted: values only, no interpolations."""
    try:
        groups = {key: dict(values[key]) for key in ("model", "diffusion")}
        if any(isinstance(value, str) and "${" in value for group in groups.values() for value in group.values()):
            raise ValueError("holds an interpolation, ${...}")
        config = from_dict(groups, str(source))
        check_model_config(config.model, str(source), config.diffusion)
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _undescribed(source, error) from error
    return config


def _undescribed(source: Path, error: Exception) -> UserError:
    damage = f"{source}: does not describe a JiT ({first_line(error)}); correct its description"
    return unreadable(source, error, damage)


def _interpret(config: ConfigSource) -> Config:
    """Sizes and diffusion settings from any form of `config`."""
    if isinstance(config, str | Path):
        return load_config(config)
    if isinstance(config, Config):
        return config
    if isinstance(config, ModelConfig):
        described = Config(model=config)
    else:
        known = {f.name for f in fields(ModelConfig)}
        unknown = set(config) - known - _SAMPLING_FIELDS
        if unknown:
            raise CheckpointError(f"config: no model field {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        described = from_dict({"model": {key: value for key, value in config.items() if key in known}})
        described.diffusion.noise_scale = float(config.get("noise_scale", 1.0))
    check_model_config(described.model, "config")
    return described
