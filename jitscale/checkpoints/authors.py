"""The authors' `checkpoint-last.pth` (repository LTH14/JiT): {model, model_ema1, model_ema2, optimizer, epoch, args}.

Only tensors, plain containers, numpy's numbers and the file's argparse namespace are unpickled. Keys have the prefix
`net.`, and the weights include the fixed position table. The optimizer numbers parameters in the order of the authors'
modules: first those without weight decay, then the others. An average may also be a list in the order of the model's
tensors, because the authors' code holds averages like that during training.
"""

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jitscale.checkpoints.names import POSITIONS, own_names
from jitscale.checkpoints.weights import (
    MOMENTS,
    StoredWeights,
    check_positions,
    check_tensors,
    is_position_table,
    plain,
    shape_differences,
    shapes_of,
)
from jitscale.config import (
    Config,
    DiffusionConfig,
    EmaConfig,
    ModelConfig,
    check_model_config,
    ema_name,
    network_differences,
)
from jitscale.errors import CheckpointError, first_line, unreadable
from jitscale.files import atomic_write
from jitscale.model.layers import sincos_position_table

# The block where the in-context tokens enter. No shape reveals it, so the model name in the file decides.
IN_CONTEXT_START = {"JiT-B": 4, "JiT-L": 8, "JiT-H": 10, "JiT-G": 10}
_SIZES = {(12, 768): "JiT-B", (24, 1024): "JiT-L", (32, 1280): "JiT-H", (40, 1664): "JiT-G"}  # keys are (depth, width)
METHODS = ("euler", "heun")  # the authors' samplers, at uniform times
# The types as which numpy 2 and 1 pickle numbers. Only dtypes of numbers are allowed, so that no object is unpickled.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *(type(np.dtype(kind)) for kind in "?bhilqBHILQefd"),
]
_MODULES = ("in_context_posemb", "t_embedder.", "y_embedder.", "x_embedder.", "blocks.", "final_layer.")


class AuthorsWeights(StoredWeights):
    """A `checkpoint-last.pth`, mapped into memory."""

    def __init__(self, path: Path, model: ModelConfig | None) -> None:
        """Open the file. The sizes `model` are only needed if the network is not one of the paper's.

        Raises a CheckpointError if the file cannot be read, has another format, or its network's sizes are unknown.
        """
        self.path = path
        content = _unpickled(path)
        try:
            args = _arguments_in(content)
            decays = [float(args.ema_decay1), float(args.ema_decay2)]
            if not all(0 <= decay <= 1 for decay in decays):
                raise ValueError(f"its averages have the decays {decays}")
            keys = {"model": "model", ema_name(decays[0]): "model_ema1", ema_name(decays[1]): "model_ema2"}
            self._sets = {name: _own_tensors(path, content, key) for name, key in keys.items()}
            diffusion = DiffusionConfig(
                noise_scale=float(args.noise_scale),
                mu=float(args.P_mean),
                sigma=float(args.P_std),
                t_eps=float(args.t_eps),
                label_drop=float(args.label_drop_prob),
            )
            self.epoch = int(content.get("epoch", -1))
            named, image_size = str(args.model), int(args.img_size)
            dropout = {name: float(getattr(args, name, 0.0)) for name in ("attn_dropout", "proj_dropout")}
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError) as error:
            raise _other_format(path, error) from error
        self.weight_sets, self.default = list(keys), ema_name(decays[0])
        tables = {key: self._sets[name].pop(POSITIONS, None) for name, key in keys.items()}
        self.shapes = _shapes(self._sets["model"])
        for name, key in keys.items():
            if differing := shape_differences(_shapes(self._sets[name]), self.shapes):
                what = f"{path}: {key} holds another network than model ({differing})"
                raise CheckpointError(f"{what}; give a file whose sets belong to one network")
        size = named.split("/", maxsplit=1)[0]
        if size in IN_CONTEXT_START:
            try:
                model = sizes_from_shapes(self.shapes, image_size, IN_CONTEXT_START[size])
            except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
                raise _other_format(path, error) from error
            model.attn_dropout, model.proj_dropout = dropout["attn_dropout"], dropout["proj_dropout"]
        if model is None:
            raise CheckpointError(f"{path}: its model {named!r} is not one of the paper's; give its config")
        model = replace(model, middle_head=0)  # this format has no middle output layer
        check_model_config(model, str(path), diffusion)
        self.config = Config(model=model, diffusion=diffusion, ema=EmaConfig(decays=decays))
        check_tensors(self)
        for key, table in tables.items():
            if table is not None:
                if not is_position_table(tuple(table.shape), self.config):
                    what = f"{path}: {POSITIONS} of {key} has the shape {tuple(table.shape)}"
                    raise CheckpointError(f"{what}, which does not fit the network's positions; give its config")
                check_positions(path, table.float(), self.config)
        self._index = {name: index for index, name in enumerate(optimizer_order(self.shapes))}
        try:
            self._moments, self.optimizer_step = _moments_in(content, self._index, self.shapes)
        except (KeyError, AttributeError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise _other_format(path, error) from error

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        if set_name in MOMENTS:
            return plain(self._moments[self._index[parameter]][set_name], self.path, f"{set_name} of {parameter}")
        return plain(self._sets[set_name][parameter], self.path, parameter)


def write_authors_file(path: Path, stored: StoredWeights, ema1: str, ema2: str, epoch: int) -> None:
    """Write a file for the authors' `--resume`, with the optimizer's moments if `stored` has them.

    The sets `ema1` and `ema2`, named `ema_<decay>`, become model_ema1 and model_ema2. Training resumes after `epoch`,
    the last complete one. Raises a CheckpointError if a set is missing, an OSError if the file cannot be written.
    """
    sets = {"model": "model", "model_ema1": ema1, "model_ema2": ema2}
    decays = [float(name.removeprefix("ema_")) for name in (ema1, ema2)]
    content: dict[str, Any] = {key: _with_prefix(stored, stored.choose(name)) for key, name in sets.items()}
    content |= {"optimizer": _optimizer_state(stored), "epoch": epoch, "args": _arguments(stored.config, decays)}
    with atomic_write(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch closes its archive after a failed write; that fails too
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def optimizer_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameter names in the order in which the authors' optimizer numbers them."""
    ordered = sorted(shapes, key=lambda name: next(i for i, start in enumerate(_MODULES) if name.startswith(start)))
    vectors = [name for name in ordered if _undecayed(name, shapes)]
    return vectors + [name for name in ordered if not _undecayed(name, shapes)]


def _undecayed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(shapes[name]) == 1 or name.endswith(".bias")


def _unpickled(path: Path) -> Any:
    """The content of a file of `torch.save`, of plain types only.

    Raises a CheckpointError if the file holds other types, a StorageError if its storage fails.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *_NUMPY]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle's documentation: a damaged pickle may raise any type
        # torch's own message recommends weights_only=False, which executes code in the file.
        found = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        remedy = "give a sound file"
        if found:
            reason = f"it holds {found[1]}, which is neither a tensor nor a plain number, text, list or dict"
            remedy = "save it again without that object"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "its pickle is damaged, or holds more than tensors and plain values"
        else:
            reason = first_line(error)
        what = f"{path}: not a readable checkpoint of the authors' format ({reason})"
        raise unreadable(path, error, f"{what}; {remedy}") from error


def _other_format(path: Path, error: Exception) -> CheckpointError:
    reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
    what = f"{path}: not the authors' format of model, model_ema1, model_ema2, args ({reason})"
    return CheckpointError(f"{what}; give such a file, or the weights as safetensors with their config")


def _arguments_in(content: Any) -> argparse.Namespace:
    if not isinstance(content, dict):
        raise TypeError(f"its content is a {type(content).__name__}")
    args = content["args"]
    return argparse.Namespace(**args) if isinstance(args, dict) else args


def _own_tensors(path: Path, content: dict[str, Any], key: str) -> dict[str, torch.Tensor]:
    """The tensors by our names, without the prefixes of the authors and of wrappers; includes the position table."""
    stored = content[key]
    if isinstance(stored, list | tuple):
        stored = _named_as(content["model"], stored, key)
    if not isinstance(stored, dict):
        raise TypeError(f"{key} is a {type(stored).__name__}, not tensors by name")
    if wrong := [
        name for name, value in stored.items() if not isinstance(value, torch.Tensor) or type(name) is not str
    ]:
        raise TypeError(f"{key} holds {wrong[0]!r}, which is not a tensor with a name")
    found = own_names(path, stored)
    return {
        name: torch.cat([stored[part] for part in parts]) if len(parts) > 1 else stored[parts[0]]
        for name, parts in found.items()
    }


def _named_as(model: Any, values: Sequence[Any], key: str) -> dict[str, Any]:
    """Give a list of tensors the names of `model`, which has the same order.

    The position table is a parameter in the authors' code; a list may leave it out. Raises a TypeError if the list has
    another length. Shapes are compared with the other sets later.
    """
    names = list(model) if isinstance(model, dict) else []
    learned = [name for name in names if not str(name).endswith(POSITIONS)]
    chosen = names if len(values) == len(names) else learned
    if len(values) != len(chosen):
        raise TypeError(f"{key} is a list of {len(values)} tensors, but the model has {len(names)}")
    return dict(zip(chosen, values, strict=True))


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _moments_in(
    content: dict[str, Any], index: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[int, dict[str, torch.Tensor]], int]:
    """The optimizer's state by the number of the parameter, and its number of updates; empty if the file has none."""
    state = (content.get("optimizer") or {}).get("state", {})
    if state.keys() != set(index.values()):
        return {}, 0
    for name, number in index.items():
        for moment in MOMENTS:
            if tuple(state[number][moment].shape) != shapes[name]:
                raise ValueError(f"the optimizer's {moment} of {name} has another shape")
    step = int(state[0]["step"])
    if step < 0:
        raise ValueError(f"the optimizer's step is {step}")
    return state, step


def _with_prefix(stored: StoredWeights, set_name: str) -> dict[str, torch.Tensor]:
    model = stored.config.model
    table = sincos_position_table(model.hidden_size, model.image_size // model.patch_size)
    tensors = {f"net.{POSITIONS}": table[None]}
    return tensors | {f"net.{name}": stored.tensor(set_name, name) for name in stored.shapes}


def _optimizer_state(stored: StoredWeights) -> dict[str, Any]:
    order, optim = optimizer_order(stored.shapes), stored.config.optim
    vectors = sum(_undecayed(name, stored.shapes) for name in order)
    # Built by torch, which adds the other settings of a group. Only the order of the parameters matters.
    parameters = [torch.nn.Parameter(torch.empty(0)) for _ in order]
    groups = [
        {"params": parameters[:vectors], "weight_decay": 0.0},
        {"params": parameters[vectors:], "weight_decay": optim.weight_decay},
    ]
    state: dict[str, Any] = torch.optim.AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2)).state_dict()
    if stored.optimizer_step > 0:
        for index, name in enumerate(order):
            moments = {moment: stored.tensor(moment, name) for moment in MOMENTS}
            state["state"][index] = {"step": torch.tensor(float(stored.optimizer_step)), **moments}
    return state


def _arguments(config: Config, decays: list[float]) -> argparse.Namespace:
    """The authors' command line for this network."""
    model, diffusion, optim, evaluation = config.model, config.diffusion, config.optim, config.evaluation
    size = _SIZES.get((model.depth, model.hidden_size))
    named = size and sizes_from_shapes(shapes_of(config), model.image_size, IN_CONTEXT_START[size])
    # A size's name determines the whole network, so that other networks must have another name.
    if not named or network_differences(Config(model=named), Config(model=model)):
        size = f"JiT-{model.depth}x{model.hidden_size}"
    return argparse.Namespace(
        model=f"{size}/{model.patch_size}",
        img_size=model.image_size,
        class_num=model.num_classes,
        attn_dropout=model.attn_dropout,
        proj_dropout=model.proj_dropout,
        label_drop_prob=diffusion.label_drop,
        P_mean=diffusion.mu,
        P_std=diffusion.sigma,
        t_eps=diffusion.t_eps,
        noise_scale=diffusion.noise_scale,
        ema_decay1=decays[0],
        ema_decay2=decays[1],
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        sampling_method=evaluation.method if evaluation.method in METHODS else "heun",
        num_sampling_steps=evaluation.steps,
        cfg=evaluation.guidance_scale,
        interval_min=evaluation.guidance_interval[0],
        interval_max=evaluation.guidance_interval[1],
    )


def sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]], image_size: int, in_context_start: int) -> ModelConfig:
    """The network whose parameters have these shapes; no shape reveals `in_context_start` and `image_size`.

    Raises a KeyError, a ValueError, an IndexError or a ZeroDivisionError if these are not the shapes of a JiT.
    """
    bottleneck_dim, _, patch_size, _ = shapes["x_embedder.proj1.weight"]
    num_labels, hidden_size = shapes["y_embedder.embedding_table.weight"]
    context = shapes.get("in_context_posemb")
    return ModelConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        depth=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        num_heads=hidden_size // shapes["blocks.0.attn.q_norm.weight"][0],
        bottleneck_dim=bottleneck_dim,
        in_context_len=0 if context is None else context[1],
        in_context_start=in_context_start,
        num_classes=num_labels - 1,
    )
