"""The authors' `checkpoint-last.pth` (repository LTH14/JiT): {model, model_ema1, model_ema2, optimizer, epoch, args}.

Only tensors, plain containers and the file's argparse namespace are unpickled. Keys have the prefix `net.`, the weights
include the fixed position table, and the optimizer counts parameters in the order of the authors' modules: first those
without weight decay, then the others.
"""

import argparse
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jitscale.checkpoints.weights import MOMENTS, StoredWeights
from jitscale.config import Config, DiffusionConfig, EmaConfig, ModelConfig, ema_name
from jitscale.errors import CheckpointError, first_line
from jitscale.files import atomic_write
from jitscale.model.layers import sincos_position_table

# The block where the in-context tokens enter, which no shape says; so the size that the file names decides it.
IN_CONTEXT_START = {"JiT-B": 4, "JiT-L": 8, "JiT-H": 10, "JiT-G": 10}
_SIZES = {(12, 768): "JiT-B", (24, 1024): "JiT-L", (32, 1280): "JiT-H", (40, 1664): "JiT-G"}  # by depth and width
_MODULES = ("in_context_posemb", "t_embedder.", "y_embedder.", "x_embedder.", "blocks.", "final_layer.")


class AuthorsWeights(StoredWeights):
    """A `checkpoint-last.pth`, mapped into memory."""

    def __init__(self, path: Path, model: ModelConfig | None) -> None:
        """Open; `model`, the sizes, is only needed if the network is not one of the paper's.

        Raises a CheckpointError if the file cannot be read, has another format, or its network's sizes are not known.
        """
        self.path = path
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            args = content["args"]
            decays = [float(args.ema_decay1), float(args.ema_decay2)]
            keys = {"model": "model", ema_name(decays[0]): "model_ema1", ema_name(decays[1]): "model_ema2"}
            self._sets = {name: _own_names(content[key]) for name, key in keys.items()}
            diffusion = DiffusionConfig(
                noise_scale=args.noise_scale,
                mu=args.P_mean,
                sigma=args.P_std,
                t_eps=args.t_eps,
                label_drop=args.label_drop_prob,
            )
            self.epoch = int(content.get("epoch", -1))
            self._optimizer = content.get("optimizer") or {}
            named, image_size = str(args.model), int(args.img_size)
        except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{path}: not a readable checkpoint of the authors' format ({reason})") from error
        except (KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path}: not the authors' format of model, model_ema1, args ({error})") from error
        self.weight_sets, self.default = list(keys), ema_name(decays[0])
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._sets["model"].items()}
        size = named.split("/", maxsplit=1)[0]
        if size in IN_CONTEXT_START:
            model = _sizes_from_shapes(self.shapes, image_size, IN_CONTEXT_START[size])
            model.attn_dropout = float(getattr(args, "attn_dropout", 0.0))
            model.proj_dropout = float(getattr(args, "proj_dropout", 0.0))
        if model is None:
            raise CheckpointError(f"{path}: its model {named!r} is not one of the paper's; give its config")
        self.config = Config(model=model, diffusion=diffusion, ema=EmaConfig(decays=decays))
        self._index = {name: index for index, name in enumerate(optimizer_order(self.shapes))}
        state = self._optimizer.get("state", {})
        if state.keys() == set(self._index.values()):
            self.optimizer_step = int(state[0]["step"])

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        if set_name in MOMENTS:
            return self._optimizer["state"][self._index[parameter]][set_name].float()
        return self._sets[set_name][parameter].float()


def write_authors_file(path: Path, stored: StoredWeights, ema1: str, ema2: str, epoch: int) -> None:
    """Write a file for the authors' `--resume`, with the optimizer's moments where `stored` has them.

    `ema1` and `ema2`, named `ema_<decay>`, become model_ema1 and model_ema2. Training goes on after `epoch`, the last
    complete one. Raises a CheckpointError if one of the sets is not there, an OSError if the file cannot be written.
    """
    sets = {"model": "model", "model_ema1": ema1, "model_ema2": ema2}
    decays = [float(name.removeprefix("ema_")) for name in (ema1, ema2)]
    content: dict[str, Any] = {key: _with_prefix(stored, stored.choose(name)) for key, name in sets.items()}
    content |= {"optimizer": _optimizer_state(stored), "epoch": epoch, "args": _arguments(stored.config, decays)}
    with atomic_write(path) as file:
        torch.save(content, file)


def optimizer_order(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Parameter names in the order in which the authors' optimizer counts them."""
    ordered = sorted(shapes, key=lambda name: next(i for i, start in enumerate(_MODULES) if name.startswith(start)))
    vectors = [name for name in ordered if _undecayed(name, shapes)]
    return vectors + [name for name in ordered if not _undecayed(name, shapes)]


def _undecayed(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return len(shapes[name]) == 1 or name.endswith(".bias")


def _own_names(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without the prefix, and without the fixed position table."""
    return {key.removeprefix("net."): value for key, value in stored.items() if not key.endswith("pos_embed")}


def _with_prefix(stored: StoredWeights, set_name: str) -> dict[str, torch.Tensor]:
    model = stored.config.model
    table = sincos_position_table(model.hidden_size, model.image_size // model.patch_size)
    tensors = {"net.pos_embed": table.reshape(1, *table.shape[-2:])}
    return tensors | {f"net.{name}": stored.tensor(set_name, name) for name in stored.shapes}


def _optimizer_state(stored: StoredWeights) -> dict[str, Any]:
    order, optim = optimizer_order(stored.shapes), stored.config.optim
    vectors = sum(_undecayed(name, stored.shapes) for name in order)
    # torch fills in the settings of a group; only the numbers of the parameters matter.
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
    size = _SIZES.get((model.depth, model.hidden_size), f"JiT-{model.depth}x{model.hidden_size}")
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
        sampling_method=evaluation.method,
        num_sampling_steps=evaluation.steps,
        cfg=evaluation.guidance_scale,
        interval_min=evaluation.guidance_interval[0],
        interval_max=evaluation.guidance_interval[1],
    )


def _sizes_from_shapes(shapes: Mapping[str, tuple[int, ...]], image_size: int, in_context_start: int) -> ModelConfig:
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
