"""Weight sets in files: the runs and step folders of this project, safetensors files, the authors' .pth files.

A set is named `model`, `ema_<decay>` or `power_<width>`. Nothing is unpickled but tensors and the plain values of an
argparse namespace, which the authors' files carry.
"""

from __future__ import annotations

import argparse
import json
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from jitscale.config import (
    Config,
    DiffusionConfig,
    ModelConfig,
    check_model_config,
    ema_name,
    from_dict,
    load_config,
    to_dict,
)
from jitscale.errors import CheckpointError
from jitscale.files import appearing_whole
from jitscale.model.jit import JiT
from jitscale.training.checkpoint import Checkpoint, latest_checkpoint

ConfigSource = str | Path | Config | ModelConfig | Mapping[str, Any]

# Where the in-context tokens enter cannot be read from shapes; the authors' files name a size instead.
_AUTHORS_IN_CONTEXT_START = {"JiT-B": 4, "JiT-L": 8, "JiT-H": 10, "JiT-G": 10}
# Settings that may stand beside the model fields in a flat mapping; they do not describe the network.
_SAMPLING_FIELDS = {"noise_scale", "method", "steps", "guidance_scale", "interval"}


@dataclass(frozen=True)
class WeightSet:
    """One set of weights with all that is needed to use it.

    Attributes:
        name: `model`, `ema_<decay>` or `power_<width>`.
        tensors: parameter name -> float32 tensor.
        model: sizes of the network.
        diffusion: how it was trained.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    model: ModelConfig
    diffusion: DiffusionConfig

    def build(self) -> JiT:
        """The network with these weights, in eval mode.

        Raises:
            CheckpointError: the tensors do not fit the sizes.
        """
        network = JiT(self.model, self.diffusion)
        expected = {name: tuple(p.shape) for name, p in network.named_parameters()}
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        differing = [
            f"{name}: {found.get(name, 'absent')} in the file, {expected.get(name, 'absent')} in the network"
            for name in sorted({*expected, *found})
            if expected.get(name) != found.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"the weights do not fit the network in {len(differing)} parameters ({'; '.join(differing[:3])}); "
                "give the config they were trained with"
            )
        network.load_state_dict(self.tensors)
        return network.eval()


def read_weights(path: str | Path, name: str | None = None, config: ConfigSource | None = None) -> WeightSet:
    """Read one weight set.

    Args:
        path: a run folder (its newest checkpoint), a step folder, a .safetensors file, or the authors' .pth file.
        name: `model`, `ema_<decay>` or `power_<width>`; None for the run's `evaluation.weights`, for the authors'
            file its model_ema1, for safetensors what the file holds.
        config: the sizes, and for safetensors the diffusion settings, where the file does not say them: a YAML
            file, a config object, or a mapping of model fields.

    Raises:
        CheckpointError: nothing readable there, no such set, or a config is needed.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, name)
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; give a run folder, a step folder or a weights file")
    if path.suffix == ".safetensors":
        return _read_safetensors(path, name, config)
    return _read_authors(path, name, config)


def write_safetensors(path: Path, weights: WeightSet) -> None:
    """One weight set in one file, with its config in the metadata; `read_weights` needs nothing else."""
    metadata = _metadata(weights.name, weights.model, weights.diffusion)
    save_file({k: v.contiguous() for k, v in weights.tensors.items()}, path, metadata=metadata)


@contextmanager
def appearing_safetensors(
    path: Path,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    config: Config,
    extra: Mapping[str, str] | None = None,
) -> Iterator[Callable[[torch.Tensor], None]]:
    """What `write_safetensors` writes, in pieces, for weights that do not fit into memory.

    The file gets its name when it is complete; an exception leaves nothing behind.

    Args:
        path: the file.
        name: of the weight set.
        shapes: parameter name -> shape, in the order in which the values will come.
        config: of the network.
        extra: metadata beside the network's.

    Yields:
        A function that appends the next float32 values, of any number of elements, on the CPU.

    Raises:
        OSError: the file cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {**_metadata(name, config.model, config.diffusion), **(extra or {})}}
    end = 0
    for parameter, shape in shapes.items():
        begin, end = end, end + 4 * prod(shape)
        header[parameter] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    described = json.dumps(header).encode()
    described += b" " * (-len(described) % 8)  # so that the values are aligned in a mapped file
    written = 0
    with appearing_whole(path) as file:

        def append(values: torch.Tensor) -> None:
            nonlocal written
            assert values.dtype == torch.float32
            written += file.write(values.contiguous().numpy().astype("<f4", copy=False).tobytes())

        file.write(struct.pack("<Q", len(described)) + described)
        yield append
        assert written == end, f"{written} of {end} bytes of {path}"


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of a step folder, or the newest one of a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / "index.json").exists():
        return Checkpoint(folder)
    newest = latest_checkpoint(folder)
    if newest is None:
        raise CheckpointError(f"{folder}: no complete checkpoint there; give a run folder or a step folder")
    return newest


def _metadata(name: str, model: ModelConfig, diffusion: DiffusionConfig) -> dict[str, str]:
    described = to_dict(Config(model=model, diffusion=diffusion))
    return {"weights": name, **{key: json.dumps(described[key]) for key in ("model", "diffusion")}}


def _read_folder(folder: Path, name: str | None) -> WeightSet:
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    chosen = name or config.evaluation.weights
    return WeightSet(chosen, checkpoint.state_dict(chosen), config.model, config.diffusion)


def _read_safetensors(path: Path, name: str | None, config: ConfigSource | None) -> WeightSet:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error
    held = metadata.get("weights", "model")
    if name not in (None, held):
        raise CheckpointError(f"{path}: no weight set {name!r}; the file holds {held}")
    if "model" in metadata:
        described = from_dict({key: json.loads(metadata[key]) for key in ("model", "diffusion")})
        return WeightSet(held, tensors, described.model, described.diffusion)
    if config is None:
        raise CheckpointError(f"{path}: the file does not say the network's sizes; give its config")
    model, diffusion = _interpret(config)
    return WeightSet(held, tensors, model, diffusion)


def _read_authors(path: Path, name: str | None, config: ConfigSource | None) -> WeightSet:
    """The authors' `checkpoint-last.pth`: {model, model_ema1, model_ema2, optimizer, epoch, args}."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        args = content["args"]
        sets = {
            "model": "model",
            ema_name(args.ema_decay1): "model_ema1",
            ema_name(args.ema_decay2): "model_ema2",
        }
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: not a readable checkpoint of the authors' format ({reason})") from error
    except (KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: not the authors' format ({error}); it has model, model_ema1, args") from error
    chosen = name or ema_name(args.ema_decay1)
    if chosen not in sets:
        raise CheckpointError(f"{path}: no weight set {chosen!r}; choose one of {', '.join(sets)}")
    tensors = {key.removeprefix("net."): value.float() for key, value in content[sets[chosen]].items()}
    tensors.pop("pos_embed", None)  # a fixed table
    diffusion = DiffusionConfig(
        noise_scale=args.noise_scale,
        mu=args.P_mean,
        sigma=args.P_std,
        t_eps=args.t_eps,
        label_drop=args.label_drop_prob,
    )
    if config is not None:
        return WeightSet(chosen, tensors, _interpret(config)[0], diffusion)
    size = str(args.model).split("/")[0]
    if size not in _AUTHORS_IN_CONTEXT_START:
        raise CheckpointError(f"{path}: its model {args.model!r} is not one of the paper's; give its config")
    model = _sizes_from_shapes(tensors, args.img_size, _AUTHORS_IN_CONTEXT_START[size])
    return WeightSet(chosen, tensors, model, diffusion)


def _interpret(config: ConfigSource) -> tuple[ModelConfig, DiffusionConfig]:
    """Sizes and diffusion settings as a caller describes them.

    Raises:
        ConfigError: sizes that no network can have.
        CheckpointError: a mapping with fields that are not the network's.
    """
    if isinstance(config, str | Path):
        config = load_config(config)
    if isinstance(config, Config):
        return config.model, config.diffusion
    if isinstance(config, ModelConfig):
        model, diffusion = config, DiffusionConfig()
    else:
        known = {f.name for f in fields(ModelConfig)}
        unknown = set(config) - known - _SAMPLING_FIELDS
        if unknown:
            raise CheckpointError(f"config: no model field {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        model = from_dict({"model": {key: value for key, value in config.items() if key in known}}).model
        diffusion = DiffusionConfig(noise_scale=float(config.get("noise_scale", 1.0)))
    check_model_config(model, "config")
    return model, diffusion


def _sizes_from_shapes(tensors: dict[str, torch.Tensor], image_size: int, in_context_start: int) -> ModelConfig:
    bottleneck_dim, _, patch_size, _ = tensors["x_embedder.proj1.weight"].shape
    num_labels, hidden_size = tensors["y_embedder.embedding_table.weight"].shape
    context = tensors.get("in_context_posemb")
    return ModelConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        num_heads=hidden_size // tensors["blocks.0.attn.q_norm.weight"].shape[0],
        bottleneck_dim=bottleneck_dim,
        in_context_len=0 if context is None else context.shape[1],
        in_context_start=in_context_start,
        num_classes=num_labels - 1,
    )
