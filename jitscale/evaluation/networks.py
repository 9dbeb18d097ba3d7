"""The feature networks that `evaluation.features` can name, with their weights."""

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from jitscale import parallel
from jitscale.config import AUTO, EvaluationConfig
from jitscale.errors import ConfigError, DataError, UserError, data_error, first_line
from jitscale.evaluation.blocks import FeatureArrays
from jitscale.evaluation.dinov2 import DinoV2
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.inception import Inception
from jitscale.evaluation.published import Published, fetch, published_folder, verify
from jitscale.evaluation.small_networks import SMALL_NETWORKS
from jitscale.files import sha256_of
from jitscale.parallel import World

FEATURE_NETWORKS: dict[str, type[FeatureNetwork]] = {
    **SMALL_NETWORKS,
    **{network.name: network for network in (Inception, DinoV2)},
}
NOT_A_STATE = (RuntimeError, TypeError, KeyError, AttributeError, ValueError)  # load_state_dict at other content
PUBLISHED = {name: n.weights for name, n in FEATURE_NETWORKS.items() if isinstance(n.weights, Published)}


@dataclass(frozen=True)
class NetworkFile:
    """A feature network that an evaluation uses, before its weights are loaded."""

    name: str  # in `FEATURE_NETWORKS`
    path: Path  # the file of its weights
    sha256: str  # sha256 of that file
    suffix: str  # suffix of the names of its arrays; empty for the network of `evaluation.features`

    @property
    def sizes(self) -> dict[str, int]:
        """Widths of the arrays with a Fréchet distance: `features`, perhaps `spatial`; further: `features_<name>`."""
        network = FEATURE_NETWORKS[self.name]
        spatial = {"spatial": network.num_spatial} if network.num_spatial and not self.suffix else {}
        return {f"features{self.suffix}": network.num_features, **spatial}

    @property
    def distances(self) -> dict[str, str]:
        """Array in `sizes` -> name of its Fréchet distance.

        Only the main network's distance is called FID, and only if the network has logits for an Inception Score.
        """
        is_fid = not self.suffix and FEATURE_NETWORKS[self.name].num_logits > 0
        names = {"spatial": "sfid"} if "spatial" in self.sizes else {}
        return {f"features{self.suffix}": "fid" if is_fid else f"fd_{self.name}", **names}

    def load(self, device: torch.device | str) -> FeatureNetwork:
        """The network on `device`, in evaluation mode and without gradients.

        The file is a .safetensors, or a .pth that holds only tensors. Raises a UserError if the file is missing,
        damaged, or belongs to another network.
        """
        network = FEATURE_NETWORKS[self.name]()
        with data_error(f"cannot load {self.path}", "restore the file"):
            content = self.path.read_bytes()
        try:
            if hashlib.sha256(content).hexdigest() != self.sha256:
                raise DataError(f"{self.path}: has changed since it was checked; start again")
            if self.path.suffix == ".safetensors":
                state = safetensors.torch.load(content)
            else:
                state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            network.load_state_dict(state)
        except (EOFError, pickle.UnpicklingError, safetensors.SafetensorError, *NOT_A_STATE) as error:
            raise UserError(f"cannot load {self.path}: {first_line(error)}; restore the file") from error
        return network.eval().requires_grad_(False).to(device)


def network_files(evaluation: EvaluationConfig, world: World) -> list[NetworkFile]:
    """The networks that `evaluation` names, the main one first, with their files; a collective call.

    Missing published weights are downloaded, by one rank for each folder. Raises a ConfigError if no network is named.
    Raises a DataError on every rank if weights are missing and cannot be downloaded, or have another hash.
    """
    if evaluation.features is None:
        raise ConfigError("evaluation.features=null: no network to measure with; name one, such as digits")
    if evaluation.features == AUTO:
        raise ConfigError("evaluation.features=auto: no network was chosen; name one, such as inception")
    names = [evaluation.features, *evaluation.more_features]
    folder = published_folder(evaluation)

    def fetch_missing(mine: bool) -> None:
        for name in names if evaluation.features_file is None else names[1:]:
            file = PUBLISHED.get(name)
            if mine and file is not None and not (folder / file.file_name).exists():  # `find_network` verifies it
                fetch(file, folder)

    parallel.raise_together(lambda: fetch_missing(world.is_main))
    parallel.raise_together(lambda: fetch_missing(world.local_rank == 0))  # into the folders of other nodes
    return parallel.raise_together(lambda: [find_network(name, evaluation, main=not n) for n, name in enumerate(names)])


def find_network(name: str, evaluation: EvaluationConfig, *, main: bool = True) -> NetworkFile:
    """The feature network `name`: the `main` one of `evaluation.features`, or a further one.

    Raises a DataError if its weights are missing, or have another hash.
    """
    weights, suffix = FEATURE_NETWORKS[name].weights, "" if main else f"_{name}"
    if main and evaluation.features_file is not None:
        path, remedy = Path(evaluation.features_file), "correct evaluation.features_file, or set it to null"
    elif isinstance(weights, Published):
        folder = published_folder(evaluation)
        return NetworkFile(name, folder / weights.file_name, verify(weights, folder), suffix)
    else:
        path, remedy = weights, "restore the file"
    with data_error(f"cannot load {path}", remedy):
        digest = sha256_of(path)
    return NetworkFile(name, path, digest, suffix)


class Embedder:
    """Applies all feature networks of an evaluation to the same images, the main one first."""

    def __init__(self, evaluation: EvaluationConfig, world: World, stop: Callable[[], None] = lambda: None) -> None:
        """Load the networks; a collective call. `stop` is called whenever they are applied.

        Raises what `network_files` and `NetworkFile.load` raise.
        """
        self.files = network_files(evaluation, world)
        self.networks = parallel.raise_together(lambda: [file.load(world.device) for file in self.files])
        self._device, self._stop = world.device, stop

    def __call__(self, images: torch.Tensor) -> FeatureArrays:
        """The networks' outputs for uint8 `images` (B, A, height, width): (B, width) float32 each, and `logits`."""
        said = [self.arrays_of(number, images) for number in range(len(self.files))]
        return {name: values for arrays in said for name, values in arrays.items()}

    def arrays_of(self, number: int, images: torch.Tensor) -> FeatureArrays:
        """The outputs of one of `networks` for uint8 `images`."""
        self._stop()
        suffix, said = self.files[number].suffix, self.networks[number](images.to(self._device))
        arrays = {f"features{suffix}": said.features} if suffix else said._asdict()
        return {name: values.cpu().numpy() for name, values in arrays.items() if values.shape[1]}


def sizes_of(files: Sequence[NetworkFile]) -> dict[str, int]:
    """`NetworkFile.sizes` of all networks."""
    return {name: size for file in files for name, size in file.sizes.items()}


def identity_of(files: Sequence[NetworkFile]) -> dict[str, Any]:
    """Names and hashes of the networks; besides the images, they determine a block."""
    main, *further = files
    identity: dict[str, Any] = {"features": main.name, "features_sha256": main.sha256}
    return identity | ({"more_features_sha256": {file.name: file.sha256 for file in further}} if further else {})
