"""Weight sets on disk, read tensor by tensor: checkpoints of this project and safetensors files.

A set is named `model`, `ema_<decay>` or `power_<width>`; some files also hold the optimizer's moments.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError

from jitscale.checkpoints.streams import MappedSafetensors, atomic_safetensors
from jitscale.config import Config, network_differences, to_dict
from jitscale.errors import CheckpointError
from jitscale.model.jit import JiT

MOMENTS = ("exp_avg", "exp_avg_sq")  # of the optimizer


class StoredWeights(ABC):
    """The weight sets of a file or folder, read when they are asked for."""

    path: Path
    config: Config  # of the run that made them, as far as it is known: `model` and `diffusion` always are
    shapes: dict[str, tuple[int, ...]]  # by parameter
    weight_sets: list[str]  # their names
    default: str  # the set that is meant when none is named
    optimizer_step: int = 0  # updates that the stored moments have seen; 0 where there are none

    @property
    def moments(self) -> tuple[str, ...]:
        """The optimizer's moments that are stored; `tensor` gives them too."""
        return MOMENTS if self.optimizer_step > 0 else ()

    def verify(self, share: int = 0, shares: int = 1) -> None:  # noqa: B027
        """Compare all files, or a share, with their hashes, if any; raises a CheckpointError if one is damaged."""

    def caution(self, set_name: str) -> str | None:
        """A line if the set is an average that is mostly the start of the run, where it is known how long that was."""
        return None

    @abstractmethod
    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """One whole parameter in one set, float32. Raises a CheckpointError if the file is damaged."""

    def read(self, set_name: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened parameter in one set: (stop - start,) float32."""
        return self.tensor(set_name, parameter).flatten()[start:stop]

    def choose(self, name: str | None) -> str:
        """`name`, or the default where it is None. Raises a CheckpointError if there is no such set."""
        chosen = name or self.default
        if chosen not in self.weight_sets:
            raise CheckpointError(f"{self.path}: no weight set {chosen!r}; choose one of {', '.join(self.weight_sets)}")
        return chosen

    def network(self, name: str | None = None) -> JiT:
        """The network with the weights of one set, or of the default where `name` is None; in eval mode.

        Raises a CheckpointError if there is no such set, its tensors do not fit the sizes, or the file is damaged.
        """
        network = JiT(self.config.model, self.config.diffusion)
        self.load_into(network, name)
        return network.eval()

    @torch.no_grad()
    def load_into(self, network: JiT, name: str | None = None) -> None:
        """Give `network` the weights of one set; `name` and errors are those of `network`."""
        chosen, parameters = self.choose(name), dict(network.named_parameters())
        if differing := shape_differences(self.shapes, {key: tuple(p.shape) for key, p in parameters.items()}):
            what = f"{self.path}: the weights do not fit the network ({differing})"
            raise CheckpointError(f"{what}; give the config they were trained with")
        for parameter, values in parameters.items():
            values.copy_(self.tensor(chosen, parameter))


class SafetensorsWeights(StoredWeights):
    """safetensors files, one a set."""

    def __init__(self, path: Path, files: Mapping[str, MappedSafetensors], config: Config) -> None:
        """The sets in `files` (set name -> file, the first one is the default) at `path`, of the network in `config`.

        Raises a CheckpointError if the files hold different networks.
        """
        self.path, self.config, self._files = path, config, files
        self.weight_sets = list(files)
        self.default, first = next(iter(files.items()))
        self.shapes = first.shapes()
        for file in files.values():
            if differing := shape_differences(file.shapes(), self.shapes):
                text = f"{file.path}: another network than {first.path} ({differing})"
                raise CheckpointError(f"{text}; keep the sets of one network in a folder")

    def tensor(self, set_name: str, parameter: str) -> torch.Tensor:
        """See `StoredWeights`."""
        try:
            return self._files[set_name].tensor(parameter).float()
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {parameter} cannot be read ({error}); the file is damaged") from error


def open_safetensors(path: Path) -> MappedSafetensors:
    """A safetensors file. Raises a CheckpointError if it cannot be read."""
    try:
        return MappedSafetensors(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def description(name: str, config: Config) -> dict[str, str]:
    """Metadata of a file with the set `name` of a network."""
    described = to_dict(config)
    return {"weights": name, **{key: json.dumps(described[key]) for key in ("model", "diffusion")}}


def write_safetensors(path: Path, stored: StoredWeights, set_name: str) -> None:
    """One weight set in one file, with its config in the metadata, tensor by tensor; an OSError if that fails."""
    with atomic_safetensors(path, stored.shapes, description(set_name, stored.config)) as append:
        for parameter in stored.shapes:
            append(stored.tensor(set_name, parameter))


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape of a network, without its memory."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in JiT(config.model).named_parameters()}


def check_fits(stored: StoredWeights, config: Config) -> None:
    """Refuse weights of another network than the one that `config` describes, or of another noise scale.

    The CheckpointError names what differs: settings, or else parameters.
    """
    settings = "; ".join(network_differences(stored.config, config))
    if differing := settings or shape_differences(stored.shapes, shapes_of(config)):
        remedy = "restore these settings, or choose other weights (in training: another run.dir)"
        raise CheckpointError(f"{stored.path}: weights of another network ({differing}); {remedy}")
    trained_with, asked = stored.config.diffusion.noise_scale, config.diffusion.noise_scale
    if not math.isclose(trained_with, asked):
        setting = f"diffusion.noise_scale={trained_with}"
        raise CheckpointError(f"{stored.path}: made for {setting}, the config says {asked}; add {setting}")


def shape_differences(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What differs between the parameters of two networks, in one line; empty where nothing does."""
    differing = [
        f"{name}: {found.get(name, 'absent')} there, {expected.get(name, 'absent')} in this network"
        for name in sorted({*found, *expected})
        if found.get(name) != expected.get(name)
    ]
    return "; ".join(differing[:3]) + (f"; and {len(differing) - 3} more" if len(differing) > 3 else "")


def elements(shapes: Mapping[str, Sequence[int]]) -> int:
    """Numbers in all tensors."""
    return sum(prod(shape) for shape in shapes.values())
