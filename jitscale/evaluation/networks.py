"""The feature networks that `evaluation.features` can name, with their weights."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from jitscale import parallel
from jitscale.config import EvaluationConfig
from jitscale.errors import ConfigError, DataError, UserError
from jitscale.evaluation.blocks import Block
from jitscale.evaluation.dinov2 import DinoV2
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.inception import Inception
from jitscale.evaluation.published import Published, fetch, published_folder, verify
from jitscale.evaluation.small_networks import DigitsFeatures, GlyphFeatures
from jitscale.files import sha256_of
from jitscale.parallel import World

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (DigitsFeatures, GlyphFeatures, Inception, DinoV2)
}
NOT_A_STATE = (RuntimeError, TypeError, KeyError, AttributeError, ValueError)  # what load_state_dict raises of others
PUBLISHED = {name: n.weights for name, n in FEATURE_NETWORKS.items() if isinstance(n.weights, Published)}


@dataclass(frozen=True)
class NetworkFile:
    """A feature network as an evaluation names it, before its weights are in memory.

    Attributes:
        name: in `FEATURE_NETWORKS`.
        path: of its weights.
        sha256: of that file.
        suffix: of its parts in a block: empty for the network of `evaluation.features`.
    """

    name: str
    path: Path
    sha256: str
    suffix: str

    @property
    def sizes(self) -> dict[str, int]:
        """Widths of the parts of a block that have a Fréchet distance."""
        network = FEATURE_NETWORKS[self.name]
        if self.suffix:
            return {f"features{self.suffix}": network.num_features}
        spatial = {"spatial": network.num_spatial} if network.num_spatial else {}
        return {"features": network.num_features, **spatial}

    def load(self, device: torch.device | str) -> FeatureNetwork:
        """The network on `device`, in evaluation mode and without gradients.

        Raises:
            UserError: its weights cannot be read.
        """
        return _load(self.name, self.path, self.sha256).to(device)


def network_files(evaluation: EvaluationConfig, world: World) -> list[NetworkFile]:
    """The networks that `evaluation` names, the main one first, their files found; a collective call.

    Published weights that are missing are downloaded, by one rank of every folder.

    Raises:
        ConfigError: no feature network is configured.
        DataError: on every rank: weights are missing and cannot be downloaded, or are another file.
    """
    if evaluation.features is None:
        raise ConfigError("evaluation.features is null, so there is nothing to measure with; set it, such as digits")
    names = [evaluation.features, *evaluation.more_features]
    published = [PUBLISHED[name] for name in names if name in PUBLISHED]
    if evaluation.features_file is not None:
        published = [file for file in published if file is not PUBLISHED.get(evaluation.features)]
    folder = published_folder(evaluation)
    for file in published:
        parallel.raise_together(partial(_fetch_if, world.is_main, file, folder))
        parallel.raise_together(partial(_fetch_if, world.local_rank == 0, file, folder))  # folders of other nodes
    return parallel.raise_together(lambda: [_find(name, evaluation, main=n == 0) for n, name in enumerate(names)])


def _fetch_if(mine: bool, file: Published, folder: Path) -> None:
    if mine and not (folder / file.file_name).exists():  # every rank verifies it when it looks for it
        fetch(file, folder)


def _find(name: str, evaluation: EvaluationConfig, *, main: bool) -> NetworkFile:
    weights, suffix = FEATURE_NETWORKS[name].weights, "" if main else f"_{name}"
    if main and evaluation.features_file is not None:
        path, remedy = Path(evaluation.features_file), "correct evaluation.features_file, or set it to null"
    elif isinstance(weights, Published):
        folder = published_folder(evaluation)
        return NetworkFile(name, folder / weights.file_name, verify(weights, folder), suffix)
    else:
        path, remedy = weights, "restore the file"
    try:
        return NetworkFile(name, path, sha256_of(path), suffix)
    except OSError as error:
        raise DataError(f"cannot load {path}: {error.strerror}; {remedy}") from error


class Embedder:
    """The feature networks of an evaluation, all applied to the same images.

    Attributes:
        files: the networks, the main one first.
        networks: the same, with their weights.
        main: the network of `evaluation.features`.
        sizes: widths of the parts of a block that have a Fréchet distance: `features` of the main network, `spatial` if
            it has them, `features_<name>` of every further one.
        identity: names and hashes, for the record; what determines a block beside the images.
    """

    def __init__(self, evaluation: EvaluationConfig, world: World) -> None:
        """Load the networks; a collective call. Weights are downloaded once for all ranks that share a folder.

        Raises:
            ConfigError: no feature network is configured.
            DataError: on every rank: weights cannot be downloaded, or are another file.
        """
        self.files = network_files(evaluation, world)
        self.networks = [parallel.raise_together(partial(file.load, world.device)) for file in self.files]
        self.main = self.networks[0]
        self._device = world.device
        self.sizes = sizes_of(self.files)
        self.identity = identity_of(self.files)

    def __call__(self, images: torch.Tensor) -> Block:
        """What the networks say about uint8 `images` (B, 3, height, width): (B, width) float32 each, and `logits`."""
        found = {**self.parts_of(0, images)}
        for number in range(1, len(self.networks)):
            found |= self.parts_of(number, images)
        return found

    def parts_of(self, number: int, images: torch.Tensor) -> Block:
        """What one of `networks` says about uint8 `images`: its parts of a block."""
        images = images.to(self._device)
        suffix = self.files[number].suffix
        said = self.networks[number](images)
        parts = {f"features{suffix}": said.features} if suffix else dict(said._asdict())
        return {part: values.cpu().numpy() for part, values in parts.items() if values.shape[1]}


def sizes_of(files: list[NetworkFile]) -> dict[str, int]:
    """See `Embedder.sizes`."""
    return {part: size for file in files for part, size in file.sizes.items()}


def identity_of(files: list[NetworkFile]) -> dict[str, Any]:
    """See `Embedder.identity`."""
    main, *further = files
    identity: dict[str, Any] = {"features": main.name, "features_sha256": main.sha256}
    if further:
        identity["more_features_sha256"] = {file.name: file.sha256 for file in further}
    return identity


def load_feature_network(
    name: str, device: torch.device | str, evaluation: EvaluationConfig | None = None
) -> FeatureNetwork:
    """The feature network `name` with its own weights on `device`, in evaluation mode and without gradients.

    Raises:
        UserError: there is no such network, or its weights cannot be read.
    """
    if name not in FEATURE_NETWORKS:
        raise UserError(f"unknown feature network {name!r}; there are: {', '.join(sorted(FEATURE_NETWORKS))}")
    return _find(name, evaluation or EvaluationConfig(), main=True).load(device)


def _load(name: str, path: Path, sha256: str) -> FeatureNetwork:
    """Weights of a .safetensors file, or of a .pth file that holds tensors only.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    network = FEATURE_NETWORKS[name]()
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise DataError(f"{path}: has changed since it was checked; start again")
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        network.load_state_dict(state)
    except (OSError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError, *NOT_A_STATE) as error:
        reason = [*str(error).splitlines(), type(error).__name__][0]
        raise UserError(f"cannot load {path}: {reason}; restore the file") from error
    return network.eval().requires_grad_(False)
