"""The subspace of rank-asymmetric prediction (arXiv 2605.12964): how a run fits it, stores it and finds it again.

The leading eigenvectors of the Gram matrix of the training images' patches, in [-1, 1], span it; the mean is not
subtracted. A run computes the subspace once, before its first step; then it belongs to the weights.

Shapes: B images of a block, A channels, S pixels per side, D numbers of a patch in the order row, column,
channel, R rank.
"""

import json
import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from jitscale import parallel
from jitscale.checkpoints.format import Checkpoint
from jitscale.checkpoints.streams import atomic_safetensors
from jitscale.checkpoints.weights import FAR_FROM_ORTHONORMAL, SUBSPACE, StoredWeights, open_safetensors, plain
from jitscale.config import Config, DiffusionConfig, ModelConfig, has_fitted_subspace, held_out_fraction, patch_elements
from jitscale.data.images import ImageError, UInt8Array
from jitscale.data.passes import FEWEST_FOR_WORKERS
from jitscale.data.shards import ShardSet
from jitscale.data.workers import naming_dead_workers, start_workers
from jitscale.diffusion.objective import patches_of
from jitscale.errors import CheckpointError, ConfigError, DataError, data_error
from jitscale.evaluation.blocks import digest_of
from jitscale.evaluation.real_images import cache_folders, pixels_of
from jitscale.keyed_random import Int64Array, Purpose, normal, permutation
from jitscale.parallel import World

logger = logging.getLogger(__name__)

IMAGES = 10_000  # the Gram matrix sums over their patches, as in the paper
BLOCK = 16  # images that a worker reads together
# Up to this D all eigenvectors are computed; for D = 12,288 that would take half an hour on a CPU.
LARGEST_WHOLE = 4096


def gram_matrix(
    shards: ShardSet, patch_size: int, images: int, seed: int, num_workers: int, device: torch.device
) -> tuple[torch.Tensor, int]:
    """The sum of p p^T over all patches p of `images` training images, (D, D) float64 on `device`.

    Also returns the number of images. `seed` chooses the images; if there are fewer, all are taken. Undecodable images
    are left out. The sum is exact and independent of the order, because it adds integers before it is scaled. Raises a
    DataError if a shard cannot be read, no image can be decoded, or `patch_size` does not divide the image size.
    """
    if shards.image_size % patch_size:
        raise DataError(f"patch size {patch_size} does not divide the images of {shards.image_size} pixels per side")
    chosen = np.sort(permutation(shards.num_samples, seed, Purpose.SUBSPACE_IMAGES)[:images])
    elements, found = shards.channels * patch_size**2, 0
    gram = torch.zeros(elements, elements, dtype=torch.float64, device=device)
    workers = num_workers if len(chosen) >= FEWEST_FOR_WORKERS else 0
    reading, bar = start_workers(_Blocks(shards, chosen), workers), tqdm(total=len(chosen), unit="img", desc="subspace")
    with naming_dead_workers(), closing(reading), bar:
        for block in reading:
            pixels = torch.from_numpy(block).to(device).permute(0, 3, 1, 2)
            patches = patches_of(2 * pixels.double() - 255, patch_size).flatten(0, 1)
            gram.addmm_(patches.T, patches)
            found += len(block)
            bar.update(len(block))
    if found == 0:
        raise DataError(
            f"none of {len(chosen)} images can be decoded; check the shards with tools/index_shards.py --verify"
        )
    return gram / 255**2, found


class _Blocks(Dataset[UInt8Array | DataError]):
    """Blocks of the chosen images, uint8 (B, S, S, A), without the undecodable ones."""

    def __init__(self, shards: ShardSet, chosen: Int64Array) -> None:
        self._shards = shards
        self._blocks = [chosen[first : first + BLOCK] for first in range(0, len(chosen), BLOCK)]

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> UInt8Array | DataError:
        size = self._shards.image_size
        images = [np.empty((0, size, size, self._shards.channels), np.uint8)]
        for sample in self._blocks[number].tolist():
            try:
                images.append(self._shards.read(*self._shards.shard_and_index(sample))[0][None])
            except ImageError as error:
                logger.warning("%s; the subspace is fitted without it", error)
            except DataError as error:
                return error
        return np.concatenate(images)


def leading_subspace(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The leading `rank` eigenvectors of a Gram matrix (D, D), as columns (D, R) float32 on the CPU.

    The entry of largest magnitude of each is positive.
    """
    if len(gram) <= LARGEST_WHOLE or 3 * rank > len(gram):  # lobpcg needs 3 R <= D
        # Computed on the CPU, so that the result does not depend on the kind of device.
        vectors = torch.linalg.eigh(gram.cpu()).eigenvectors[:, len(gram) - rank :].flip(1)
    else:
        more = min(rank + 8, len(gram) // 3)  # a few more than needed, because the last ones converge slowly
        start = random_subspace(len(gram), more, 0).to(gram)
        vectors = torch.lobpcg(gram, X=start, niter=500, tol=1e-10)[1][:, :rank]
    return _with_signs(vectors)


def random_subspace(elements: int, rank: int, seed: int) -> torch.Tensor:
    """A random subspace, to compare with a fitted one: (D, R) float32."""
    drawn = normal(seed, Purpose.SUBSPACE_IMAGES, np.arange(elements)[:, None], np.arange(rank))
    return _with_signs(torch.linalg.qr(torch.from_numpy(drawn)).Q)


def _with_signs(vectors: torch.Tensor) -> torch.Tensor:
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * largest.sign()).float().cpu().contiguous()


def explained(gram: torch.Tensor, subspace: torch.Tensor) -> list[float]:
    """The share of the patches' energy (sum of squares) that lies in the first 1, 2, ... R columns of `subspace`."""
    columns = subspace.to(gram)
    shares = (columns * (gram @ columns)).sum(dim=0).cumsum(0) / gram.trace()
    return [float(share) for share in shares]


def write_subspace(path: Path, subspace: torch.Tensor, facts: Mapping[str, Any]) -> None:
    """Write `subspace` to a safetensors file, with `facts` as JSON metadata. Raises a DataError if that fails."""
    metadata = {key: json.dumps(value) for key, value in facts.items()}
    with data_error(f"{path}: cannot be written", "make room, or choose another folder"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_safetensors(path, {SUBSPACE: tuple(subspace.shape)}, metadata) as append:
            append(subspace)


def read_subspace(path: Path, model: ModelConfig, diffusion: DiffusionConfig) -> torch.Tensor:
    """The subspace (D, R) in a file of tools/fit_subspace.py.

    Raises a CheckpointError if the file cannot be read, or holds no finite subspace with orthonormal columns for this
    patch size, number of channels and rank.
    """
    file, what = open_safetensors(path), f"diffusion.subspace={path}"
    wanted = (patch_elements(model), diffusion.rank)
    asked = f"--patch-size {model.patch_size} --channels {model.in_channels} --rank {diffusion.rank}"
    remedy = f"make it with tools/fit_subspace.py {asked}"
    if (shape := file.shapes().get(SUBSPACE)) != wanted:
        found = "no tensor subspace" if shape is None else f"a subspace of shape {shape}"
        raise CheckpointError(f"{what}: holds {found}, this network needs {wanted}; {remedy}")
    subspace = plain(file.tensor(SUBSPACE), path, SUBSPACE)
    off = (subspace.T.double() @ subspace.double() - torch.eye(diffusion.rank)).abs().max()
    if not off <= FAR_FROM_ORTHONORMAL:  # also true for NaN
        raise CheckpointError(f"{what}: its columns are not finite and orthonormal (off by {off:.1g}); {remedy}")
    return subspace


def subspace_of_run(
    config: Config, world: World, shards: ShardSet, checkpoint: Checkpoint | None, initial: StoredWeights | None
) -> torch.Tensor | None:
    """The subspace (D, R) of a run's network, the same bytes on every rank; None if the network has no fitted one.

    The first of these gives it: the `checkpoint`, the `initial` weights, the file `diffusion.subspace`. If there is
    none of them, it is fitted to the training `shards` and stored for other runs. A collective call. Raises a UserError
    on every rank if that fails, or if `diffusion.subspace` differs from the subspace of the weights.
    """
    if not has_fitted_subspace(config.model, config.diffusion):
        return None
    if checkpoint is not None:
        # The checkpoint holds the subspace, so the file may be missing now.
        path = config.diffusion.subspace
        compared = None if path is None or not Path(path).exists() else Path(path)
        return parallel.on_main(lambda: _stored(config, checkpoint, "model", compared))
    if initial is not None:
        default = "model" if "model" in initial.weight_sets else None
        name = initial.choose(config.run.init_weights or default)
        named = None if config.diffusion.subspace is None else Path(config.diffusion.subspace)
        return parallel.on_main(lambda: _stored(config, initial, name, named))
    if config.diffusion.subspace is not None:
        named = Path(config.diffusion.subspace)
        return parallel.on_main(lambda: read_subspace(named, config.model, config.diffusion))
    folders = cache_folders(config, shards, Path(config.run.dir), world)
    return parallel.on_main(lambda: _fitted(config, shards, folders, world.device))


def _stored(config: Config, weights: StoredWeights, name: str, compared: Path | None) -> torch.Tensor:
    """The subspace of the weight set `name`. Raises a ConfigError if the file `compared` holds another one."""
    subspace = weights.tensor(name, SUBSPACE)
    if compared is None:
        return subspace
    shape = open_safetensors(compared).shapes().get(SUBSPACE)
    if shape is not None and shape[0] != len(subspace):
        text = "diffusion.subspace=%s: not used, because it is for patches of another size (of an earlier resolution?)"
        logger.info(text, compared)
        return subspace
    if not torch.equal(read_subspace(compared, config.model, config.diffusion), subspace):
        what = f"diffusion.subspace={compared}: differs from the subspace of the weights in {weights.path}"
        raise ConfigError(f"{what}, which cannot change; set diffusion.subspace=null, or start without these weights")
    return subspace


def _fitted(config: Config, shards: ShardSet, folders: list[Path], device: torch.device) -> torch.Tensor:
    """The subspace that an earlier run stored in one of `folders`; else it is computed and stored in the last one."""
    model, rank, seed = config.model, config.diffusion.rank, config.run.seed
    held_out = shards.held_out and str(held_out_fraction(config.data) or shards.held_out.manifest_hash)
    facts = {**facts_of(shards, model.patch_size, rank, IMAGES, seed), "held_out": held_out}
    name = f"subspace_{digest_of(facts)}.safetensors"
    for folder in folders:
        try:
            if (folder / name).exists():
                return read_subspace(folder / name, model, config.diffusion)
        except CheckpointError as error:
            logger.warning("%s; it is computed again", error)
    gram, images = gram_matrix(shards, model.patch_size, IMAGES, seed, config.data.num_workers, device)
    subspace = leading_subspace(gram, rank)
    share = explained(gram, subspace)[-1]
    write_subspace(folders[-1] / name, subspace, {**facts, "images": images, "explained": share})
    text = "%s: a subspace of %d of %d dimensions, fitted to %d images; it holds %.2f%% of the energy of their patches"
    logger.info(text, folders[-1] / name, rank, len(subspace), images, 100 * share)
    return subspace


def facts_of(shards: ShardSet, patch_size: int, rank: int, images: int, seed: int) -> dict[str, Any]:
    """Everything that determines a fitted subspace."""
    return {
        **pixels_of(shards),
        "patch_size": patch_size,
        "rank": rank,
        "images": min(images, shards.num_samples),
        "seed": seed,
    }
