"""Weight sets on disk, read tensor by tensor: checkpoints of this project and safetensors files.

A set is named `model`, `ema_<decay>` or `power_<width>`; some files also hold the optimizer's moments.
"""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError

from jitscale.checkpoints.names import POSITIONS, own_names
from jitscale.checkpoints.streams import MappedSafetensors, TensorFile, atomic_safetensors
from jitscale.config import Config, network_differences, to_dict
from jitscale.errors import CheckpointError, unreadable
from jitscale.model.jit import JiT, network_holding
from jitscale.model.layers import sincos_position_table

MOMENTS = ("exp_avg", "exp_avg_sq")  # names of the optimizer's moments
SUBSPACE = "subspace"
FIXED = (SUBSPACE,)  # buffers that every weight set holds; they are not trained, so they have no moments
FAR_FROM_ORTHONORMAL = 1e-4  # largest deviation of a subspace's P^T P from 1; float32 files deviate by 1e-7
POSITION_ERROR = 4e-3  # largest difference between position tables; bfloat16 changes a sine by up to 2e-3

_PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class StoredWeights(ABC):
    """The weight sets of a file or folder; tensors are read on request."""

    path: Path
    config: Config  # configuration of the run that made them; at least `model` and `diffusion` are known
    shapes: dict[str, tuple[int, ...]]  # key: parameter, `FIXED` buffers included
    weight_sets: list[str]  # their names
    default: str  # the set to use if none is named
    class_names: list[str] | None = None  # classes of the training data; None: unknown
    optimizer_step: int = 0  # updates that the stored moments have seen; 0: there are no moments

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the stored moments; `tensor` reads them like weight sets."""
        return MOMENTS if self.optimizer_step > 0 else ()

    def verify(self, share: int = 0, shares: int = 1) -> None:  # noqa: B027
        """Compare all files with their hashes, if there are any. Raises a CheckpointError if a file is damaged.

        Each of several processes verifies a share, and relies on the others for the rest. Therefore call it inside
        `parallel.raise_together`, before anything is read. Files that are not verified here are verified before they
        are read.
        """

    def caution(self, set_name: str) -> str | None:
        """A warning if the set is an average that consists mostly of the start of the run; None if not, or unknown."""
        return None

    @abstractmethod
    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """One whole parameter in one set, float32. Raises a CheckpointError if the file is damaged."""

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter in one set: (stop - start,) float32."""
        return self.tensor(set_name, parameter).flatten()[start:stop]

    def choose(self, name: str | None) -> str:
        """`name`, or the default if it is None. Raises a CheckpointError if there is no such set."""
        chosen = name or self.default
        if chosen not in self.weight_sets:
            raise CheckpointError(f"{self.path}: no weight set {chosen!r}; choose one of {', '.join(self.weight_sets)}")
        return chosen

    def network(self, name: str | None = None, device: str | torch.device = "cpu") -> JiT:
        """The network with the weights of the set `name` (None: the default), on `device`, in eval mode.

        Besides the network itself, one tensor at a time is in memory. Raises a CheckpointError if there is no such
        set, its tensors do not fit the sizes, or the file is damaged.
        """
        chosen = self.choose(name)
        check_tensors(self)
        # Copied even on the CPU, because a tensor may lie in the mapped file, which may change later.
        weights = {key: self.tensor(chosen, key).to(device, copy=True) for key in self.shapes}
        return network_holding(weights, self.config.model, self.config.diffusion)

    @torch.no_grad()
    def load_into(self, network: JiT, name: str | None = None) -> None:
        """Copy the weights of one set into `network`; `name` and errors are as in the method `network`."""
        chosen, held = self.choose(name), network.state_dict()
        check_tensors(self, {key: tuple(values.shape) for key, values in held.items()})
        for parameter, values in held.items():
            values.copy_(self.tensor(chosen, parameter))


class SafetensorsWeights(StoredWeights):
    """safetensors files, one for each set."""

    def __init__(self, path: Path, files: Mapping[str, TensorFile], config: Config) -> None:
        """Open the sets in `files` (set name -> file; the first is the default) at `path`, of the network in `config`.

        Raises a CheckpointError if the files hold different networks, or position tables other than this network's.
        """
        self.path, self.config, self._files = path, config, files
        self.weight_sets = list(files)
        if wrong := [name for name in files if not is_set_name(name)]:
            what = f"{files[wrong[0]].path}: {wrong[0]!r} is not a name of a weight set"
            raise CheckpointError(f"{what}; give model, ema_<decay>, power_<width> or a name of letters and digits")
        self.default = self.weight_sets[0]
        self._parts = {name: own_names(file.path, file.shapes()) for name, file in files.items()}
        shapes = {name: self._shapes_in(name) for name in files}
        for name, found in shapes.items():
            if is_position_table(found.get(POSITIONS), config):
                check_positions(files[name].path, self.tensor(name, POSITIONS), config)
                del found[POSITIONS]
        self.shapes = shapes[self.default]
        for name, found in shapes.items():
            if differing := shape_differences(found, self.shapes):
                text = f"{files[name].path}: another network than {files[self.default].path} ({differing})"
                raise CheckpointError(f"{text}; keep the sets of one network in a folder")

    def _shapes_in(self, set_name: str) -> dict[str, tuple[int, ...]]:
        stored = self._files[set_name].shapes()
        joined = {}
        for name, parts in self._parts[set_name].items():
            if len({stored[part] for part in parts}) > 1:
                what = f"{self._files[set_name].path}: {', '.join(parts)} have different shapes"
                raise CheckpointError(f"{what}; give a sound file")
            shape = stored[parts[0]]
            joined[name] = (len(parts) * shape[0], *shape[1:]) if len(parts) > 1 and shape else shape
        return joined

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        file = self._files[set_name]
        try:
            parts = [file.tensor(part) for part in self._parts[set_name][parameter]]
        except (SafetensorError, OSError) as error:
            damage = f"{file.path}: {parameter} cannot be read ({error}); the file is damaged, copy it again"
            raise unreadable(file.path, error, damage) from error
        return plain(torch.cat(parts) if len(parts) > 1 else parts[0], file.path, parameter)


def open_safetensors(path: Path) -> MappedSafetensors:
    """Open a safetensors file. Raises a CheckpointError if it cannot be read, a StorageError if its storage fails."""
    try:
        return MappedSafetensors(path)
    except (SafetensorError, OSError) as error:
        damage = f"{path}: not a readable safetensors file ({error}); copy it again"
        raise unreadable(path, error, damage) from error


def is_set_name(name: str) -> bool:
    """True if a weight set may have this name. The name is used for a file, so only some characters are allowed."""
    return name not in MOMENTS and re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) is not None


def is_average(name: str) -> bool:
    """True if this is the name of an average, `ema_<decay>` or `power_<width>`."""
    return re.fullmatch(r"(ema|power)_\d+(\.\d+)?(e-?\d+)?", name, re.ASCII) is not None


def is_position_table(shape: tuple[int, ...] | None, config: Config) -> bool:
    """True if a tensor of this shape can be the network's stored position table; `shape` is None if there is none."""
    side = config.model.image_size // config.model.patch_size
    return shape == (1, side * side, config.model.hidden_size)


def check_positions(path: Path, table: torch.Tensor, config: Config) -> None:
    """Raise a CheckpointError if a stored position table, (1, N, C), differs from the table of `config`.

    The tolerance `POSITION_ERROR` allows tables that were stored in 16 bits.
    """
    model = config.model
    own = sincos_position_table(model.hidden_size, model.image_size // model.patch_size, model.position_grid)
    if not torch.allclose(table[0], own, rtol=0, atol=POSITION_ERROR):
        what = f"{path}: {POSITIONS} differs from this network's position table"
        raise CheckpointError(f"{what}; give the model.image_size and model.position_grid that it was trained with")


def plain(tensor: torch.Tensor, path: Path, parameter: str) -> torch.Tensor:
    """The values in float32.

    Raises a CheckpointError at complex numbers, integers and 8-bit floats: the files here have no scales for them.
    """
    if tensor.dtype not in _PLAIN_DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        why = "holds complex numbers" if tensor.is_complex() else f"is quantised ({kind}), and its scales are unknown"
        what = f"{path}: {parameter} {why}"
        raise CheckpointError(f"{what}; give weights in float32, float16 or bfloat16")
    return tensor.float()


def description(name: str, config: Config) -> dict[str, str]:
    """Metadata of a file with the set `name`. Without the path `diffusion.subspace`: the set holds the subspace."""
    described = to_dict(replace(config, diffusion=replace(config.diffusion, subspace=None)))
    return {"weights": name, **{key: json.dumps(described[key]) for key in ("model", "diffusion")}}


def write_safetensors(path: Path, stored: StoredWeights, set_name: str) -> None:
    """Write one weight set to a file, tensor by tensor, with its config as metadata; an OSError if that fails."""
    with atomic_safetensors(path, stored.shapes, description(set_name, stored.config)) as append:
        for parameter in stored.shapes:
            append(stored.tensor(set_name, parameter))


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the parameters and stored buffers of a network's weight set; allocates no memory for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in JiT(config.model, config.diffusion).state_dict().items()}


def names_in(set_name: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The names in `shapes` that a set holds: all for a weight set; for moments, all except `FIXED` buffers."""
    return [name for name in shapes if set_name not in MOMENTS or name not in FIXED]


def check_tensors(stored: StoredWeights, expected: Mapping[str, tuple[int, ...]] | None = None) -> None:
    """Raise a CheckpointError if the shapes are not `expected` (default: those of the network of `stored.config`)."""
    if differing := shape_differences(stored.shapes, shapes_of(stored.config) if expected is None else expected):
        what = f"{stored.path}: the weights do not fit the network ({differing})"
        raise CheckpointError(f"{what}; give the config they were trained with")


def check_fits(stored: StoredWeights, config: Config) -> None:
    """Raise a CheckpointError if the weights belong to another network, or another noise scale, than `config`.

    It names the settings that differ, or else the parameters.
    """
    settings = "; ".join(network_differences(stored.config, config))
    if differing := settings or shape_differences(stored.shapes, shapes_of(config)):
        remedy = "restore these settings, or choose other weights (in training: another run.dir)"
        raise CheckpointError(f"{stored.path}: the weights belong to another network ({differing}); {remedy}")
    trained_with, asked = stored.config.diffusion.noise_scale, config.diffusion.noise_scale
    if not math.isclose(trained_with, asked):
        setting = f"diffusion.noise_scale={trained_with}"
        raise CheckpointError(f"{stored.path}: trained with {setting}, the config says {asked}; add {setting}")


def check_finite(stored: StoredWeights, sets: Sequence[str], share: int = 0, shares: int = 1) -> None:
    """Read every `shares`-th parameter of each set, from number `share` on (default: all parameters).

    Raises a CheckpointError if a tensor cannot be read, or holds NaN or infinite values.
    """
    for name in sets:
        for parameter in names_in(name, stored.shapes)[share::shares]:
            if not stored.tensor(name, parameter).isfinite().all():
                what = f"{stored.path}: {parameter} of the set {name} holds values that are not finite"
                raise CheckpointError(f"{what}; the training had diverged, choose an older checkpoint")


def shape_differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """The differences between the parameters of two networks, in one line; empty if there are none."""
    differing = [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} in this network"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    return "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")


def elements(shapes: Mapping[str, Sequence[int]]) -> int:
    """The number of elements of all tensors."""
    return sum(prod(shape) for shape in shapes.values())
