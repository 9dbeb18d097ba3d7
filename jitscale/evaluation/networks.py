"""The feature networks that `evaluation.features` can name, with their weights."""

from __future__ import annotations

import hashlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from jitscale import parallel
from jitscale.config import EvaluationConfig
from jitscale.errors import ConfigError, UserError
from jitscale.evaluation.blocks import Block
from jitscale.evaluation.dinov2 import DinoV2
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.inception import Inception
from jitscale.evaluation.published import Published, fetch, published_folder, verify
from jitscale.evaluation.small_networks import DigitsFeatures, GlyphFeatures
from jitscale.parallel import World

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (DigitsFeatures, GlyphFeatures, Inception, DinoV2)
}
PUBLISHED = {name: n.weights for name, n in FEATURE_NETWORKS.items() if isinstance(n.weights, Published)}


class Embedder:
    """The feature networks of an evaluation, all applied to the same images.

    Attributes:
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
        if evaluation.features is None:
            raise ConfigError(
                "evaluation.features is null, so there is nothing to measure with; set it, such as digits"
            )
        networks = []
        for name in [evaluation.features, *evaluation.more_features]:
            _prepare_weights(name, evaluation, world)
            networks.append(parallel.together(partial(load_feature_network, name, world.device, evaluation)))
        self.main, further = networks[0], networks[1:]
        self._further = {f"features_{network.name}": network for network in further}
        self._device = world.device
        self.sizes = {"features": self.main.num_features}
        if self.main.num_spatial:
            self.sizes["spatial"] = self.main.num_spatial
        self.sizes |= {part: network.num_features for part, network in self._further.items()}
        self.identity: dict[str, Any] = {"features": self.main.name, "features_sha256": self.main.weights_sha256}
        if further:
            self.identity["more_features_sha256"] = {network.name: network.weights_sha256 for network in further}

    def __call__(self, images: torch.Tensor) -> Block:
        """What the networks say about uint8 `images` (B, 3, height, width): (B, width) float32 each, and `logits`."""
        images = images.to(self._device)
        parts = dict(self.main(images)._asdict())
        parts |= {part: network(images).features for part, network in self._further.items()}
        return {part: values.cpu().numpy() for part, values in parts.items() if values.shape[1]}


def _prepare_weights(name: str, evaluation: EvaluationConfig, world: World) -> None:
    """Download them if they are not there; a collective call."""
    published = PUBLISHED.get(name)
    if published is not None:
        folder = published_folder(evaluation)
        parallel.together(lambda: fetch(published, folder) if world.is_main else None)
        parallel.together(lambda: fetch(published, folder) if world.local_rank == 0 else None)  # folders of other nodes


def load_feature_network(
    name: str, device: torch.device | str, evaluation: EvaluationConfig | None = None
) -> FeatureNetwork:
    """The feature network `name` with its weights on `device`, in evaluation mode and without gradients.

    Raises:
        UserError: there is no such network, or its weights cannot be read.
    """
    if name not in FEATURE_NETWORKS:
        raise UserError(f"unknown feature network {name!r}; there are: {', '.join(sorted(FEATURE_NETWORKS))}")
    network = FEATURE_NETWORKS[name]()
    if isinstance(network.weights, Published):
        path = verify(network.weights, published_folder(evaluation or EvaluationConfig()))
    else:
        path = network.weights
    _load(network, path)
    return network.to(device).eval().requires_grad_(False)


def _load(network: FeatureNetwork, path: Path) -> None:
    """Weights of a .safetensors file, or of a .pth file that holds tensors only.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    try:
        if path.suffix == ".safetensors":
            state = safetensors.torch.load(path.read_bytes())
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(state)
        network.weights_sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot load {path}: {reason}; restore the file") from error
