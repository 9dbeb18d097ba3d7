"""The feature networks that `evaluation.features` can name, with their weights."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from jitscale import parallel
from jitscale.config import EvaluationConfig
from jitscale.errors import UserError
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.inception import Inception
from jitscale.evaluation.published import Published, fetch, published_folder, verify
from jitscale.evaluation.small_networks import DigitsFeatures, GlyphFeatures
from jitscale.parallel import World

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    network.name: network for network in (DigitsFeatures, GlyphFeatures, Inception)
}
PUBLISHED = {name: n.weights for name, n in FEATURE_NETWORKS.items() if isinstance(n.weights, Published)}


def prepare_weights(evaluation: EvaluationConfig, world: World) -> None:
    """Download what `evaluation.features` needs, once for all ranks that share a folder; a collective call.

    Raises:
        DataError: on every rank: it cannot be downloaded, or is another file.
    """
    published = PUBLISHED.get(evaluation.features or "")
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
