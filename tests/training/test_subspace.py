"""The subspace of asym: fitted to images with a known subspace, stored in files, refused if it does not fit."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from jitscale.config import Config, DataConfig, DiffusionConfig
from jitscale.data.shards import ShardSet
from jitscale.diffusion.objective import patches_of
from jitscale.errors import CheckpointError, DataError
from jitscale.parallel import World
from jitscale.preparation.array_shards import write_shards
from jitscale.training import subspace
from jitscale.training.subspace import (
    explained,
    gram_matrix,
    leading_subspace,
    random_subspace,
    read_subspace,
    subspace_of_run,
    write_subspace,
)
from tests.support.runs import zero_samples
from tests.support.tiny import MODEL
from tests.support.tools import run_tool

CPU = torch.device("cpu")
COUNT, SIZE, PATCH, NUMBERS = 40, 16, 4, 48
ASYM = DiffusionConfig(prediction="asym", rank=2)


def known() -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """Two directions of patches, (48, 2), and images of patches in them, as uint8 (40, 16, 16, 3).

    The first one is a ramp from top to bottom. The second one is stronger in red than in green, and zero in blue.
    """
    rows = torch.linspace(-1, 1, PATCH)[:, None, None].expand(PATCH, PATCH, 3)
    colours = torch.tensor([1.0, -0.5, 0.0]).expand(PATCH, PATCH, 3)
    directions = torch.stack([rows.flatten(), colours.flatten()], dim=1)
    strengths = torch.randn(COUNT, 16, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.3, 0.15])
    patches = strengths @ directions.T
    grid = patches.view(COUNT, 4, 4, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5).reshape(COUNT, SIZE, SIZE, 3)
    pixels = ((grid + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
    return torch.linalg.qr(directions).Q, pixels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(known()[1], np.arange(COUNT) % 10, tmp_path / "shards", samples_per_shard=16)
    return tmp_path / "shards"


def opened(folder: Path) -> ShardSet:
    return ShardSet.open(folder, 10, SIZE)


def plain_gram(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """The Gram matrix of images (B, S, S, 3), patch by patch, times 255 squared, in integers."""
    total = np.zeros((NUMBERS, NUMBERS), np.int64)
    for image in pixels:
        for top in range(0, SIZE, PATCH):
            for left in range(0, SIZE, PATCH):
                patch = 2 * image[top : top + PATCH, left : left + PATCH].astype(np.int64).reshape(-1) - 255
                total += np.outer(patch, patch)
    return total.astype(np.float64)


def test_the_fit_finds_the_directions_of_the_images(folder: Path) -> None:
    directions, pixels = known()
    gram, images = gram_matrix(opened(folder), PATCH, 10_000, 0, 0, CPU)
    assert images == COUNT, "all images are used if there are fewer"
    np.testing.assert_array_equal((gram * 255**2).round().numpy(), plain_gram(pixels))
    found = leading_subspace(gram, 2)
    assert found.dtype == torch.float32
    # The tolerance is the rounding of uint8.
    torch.testing.assert_close(found @ found.T, directions @ directions.T, rtol=0, atol=5e-3)
    torch.testing.assert_close(found[:, 0].abs(), directions[:, 0].abs(), rtol=0, atol=5e-2)
    shares = explained(gram, found)
    assert 0.7 < shares[0] < 0.95
    assert shares[1] > 0.999
    assert explained(gram, random_subspace(NUMBERS, 2, 0))[1] < 0.3
    assert explained(gram, torch.eye(NUMBERS))[-1] == pytest.approx(1.0)


def test_patches_have_the_same_order_as_in_the_objective(folder: Path) -> None:
    gram, _ = gram_matrix(opened(folder), PATCH, 10_000, 0, 0, CPU)
    images = torch.from_numpy(known()[1]).permute(0, 3, 1, 2).double() / 127.5 - 1
    patches = patches_of(images, PATCH).flatten(0, 1)
    torch.testing.assert_close(gram, patches.T @ patches, rtol=1e-12, atol=1e-9)


def test_the_seed_alone_selects_the_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers give the same sum, bit by bit. Another seed gives another one."""
    shards = opened(folder)
    monkeypatch.setattr(subspace, "FEWEST_FOR_WORKERS", 1)
    first, images = gram_matrix(shards, PATCH, 20, 7, 0, CPU)
    again, _ = gram_matrix(shards, PATCH, 20, 7, 2, CPU)
    assert images == 20
    assert torch.equal(first, again)
    assert not torch.equal(first, gram_matrix(shards, PATCH, 20, 8, 0, CPU)[0])


def test_undecodable_images_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = opened(folder)
    packed = np.stack([shards.read(*shards.shard_and_index(sample))[0] for sample in range(COUNT)])
    zero_samples(sorted(folder.glob("*.tar"))[1], slice(3, 5))
    with caplog.at_level(logging.WARNING):
        gram, images = gram_matrix(opened(folder), PATCH, 10_000, 0, 0, CPU)
    assert images == COUNT - 2
    assert caplog.text.count("the subspace is fitted without it") == 2
    sound = np.delete(packed, [16 + 3, 16 + 4], axis=0)
    np.testing.assert_array_equal((gram * 255**2).round().numpy(), plain_gram(sound))


def test_empty_data_and_unsuitable_patch_sizes_are_refused(folder: Path) -> None:
    shards = opened(folder)
    with pytest.raises(DataError, match="patch size 5 does not divide the images of 16 pixels per side"):
        gram_matrix(shards, 5, 10, 0, 0, CPU)
    for tar in folder.glob("*.tar"):
        zero_samples(tar, slice(None))
    with pytest.raises(DataError, match="none of 40 images can be decoded"):
        gram_matrix(shards, PATCH, 10_000, 0, 0, CPU)


def test_the_largest_entries_determine_the_signs() -> None:
    matrix = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for vectors in (leading_subspace(matrix.T @ matrix, 20), random_subspace(20, 5, 3)):
        assert bool((vectors.gather(0, vectors.abs().argmax(0, keepdim=True)) > 0).all())
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(vectors.shape[1]), rtol=0, atol=1e-6)
    assert not torch.equal(random_subspace(20, 5, 3), random_subspace(20, 5, 4))


def test_large_patches_need_only_the_wanted_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -3, 192, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(192, 192, dtype=torch.float64, generator=generator)).Q
    rows = torch.randn(4000, 192, dtype=torch.float64, generator=generator) * scales @ turned
    whole = leading_subspace(rows.T @ rows, 8)
    monkeypatch.setattr(subspace, "LARGEST_WHOLE", 100)
    eigh, sizes = torch.linalg.eigh, []

    def noting(matrix: torch.Tensor, **options: str) -> object:
        sizes.append(len(matrix))
        return eigh(matrix, **options)

    monkeypatch.setattr(torch.linalg, "eigh", noting)
    torch.testing.assert_close(leading_subspace(rows.T @ rows, 8), whole, rtol=0, atol=1e-6)
    assert max(sizes) < 100, "lobpcg solves only small problems"


def test_an_unsuitable_file_is_refused(tmp_path: Path) -> None:
    path, sound = tmp_path / "P.safetensors", random_subspace(NUMBERS, 2, 0)
    write_subspace(path, sound, {"made_by": "a test"})
    assert torch.equal(read_subspace(path, MODEL, ASYM), sound)
    with pytest.raises(CheckpointError, match=r"absent.safetensors: not a readable safetensors file"):
        read_subspace(tmp_path / "absent.safetensors", MODEL, ASYM)
    wrong = {
        r"of shape \(48, 3\), this network needs \(48, 2\); .*4 --channels 3 --rank 2": random_subspace(NUMBERS, 3, 0),
        r"of shape \(12, 2\), this network needs \(48, 2\)": random_subspace(12, 2, 0),
        "not finite and orthonormal": sound * 1.001,
        r"orthonormal \(off by nan\)": sound.clone().index_fill(0, torch.tensor([3]), torch.nan),
    }
    for said, tensor in wrong.items():
        write_subspace(path, tensor, {})
        with pytest.raises(CheckpointError, match=said):
            read_subspace(path, MODEL, ASYM)


def test_a_run_fits_its_subspace_once_and_finds_it_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's file equals the tool's.

    Another seed or held-out set has another file. A damaged file is computed again.
    """
    config = Config(model=MODEL, diffusion=replace(ASYM), data=DataConfig(shards=str(folder), num_workers=0))
    config.run.dir = str(tmp_path / "run")
    shards, world = opened(folder), World(0, 1, 0, CPU)

    def of_run() -> torch.Tensor:
        found = subspace_of_run(config, world, shards, None, None)
        assert found is not None
        return found

    with caplog.at_level(logging.INFO):
        first = of_run()
    assert "a subspace of 2 of 48 dimensions, fitted to 40 images; it holds 99.9" in caplog.text
    (kept,) = (folder / "real_images").glob("subspace_*.safetensors")
    output = tmp_path / "new/P.safetensors"
    tool = ("--shards", folder, "--image-size", 16, "--patch-size", 4, "--rank", 2, "--workers", 1, "--output", output)
    done = run_tool("fit_subspace", *tool)
    assert done.code == 0, done.err
    assert "| 1 | 8" in done.out
    assert "| 2 | 99.9" in done.out
    assert torch.equal(read_subspace(output, MODEL, ASYM), first)
    assert "exists already" in run_tool("fit_subspace", *tool).err
    before = kept.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(subspace, "gram_matrix", None)
        assert torch.equal(of_run(), first), "the stored file is found"
        config.diffusion.subspace = str(output)
        assert torch.equal(of_run(), first)
        config.diffusion.subspace = None
    kept.write_bytes(before[:100])
    assert torch.equal(of_run(), first)
    assert "it is computed again" in caplog.text
    assert kept.read_bytes() == before
    config.run.seed = 1
    of_run()
    assert len(list((folder / "real_images").glob("subspace_*.safetensors"))) == 2
    config.diffusion.rank = 0
    assert subspace_of_run(config, world, shards, None, None) is None
    config.diffusion.prediction = "x"
    assert subspace_of_run(config, world, shards, None, None) is None


def test_the_tool_makes_a_random_subspace_and_refuses_nonsense(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "P.safetensors"
    tool = ["--shards", folder, "--image-size", 16, "--patch-size", 4, "--workers", 1, "--images", 10]
    done = run_tool("fit_subspace", *tool, "--rank", 2, "--output", output, "--random", 5)
    assert done.code == 0, done.err
    assert torch.equal(read_subspace(output, MODEL, ASYM), random_subspace(NUMBERS, 2, 5))
    for said, *options in (
        ("--rank 48: must be below 48", "--rank", 48, "--output", tmp_path / "b.safetensors"),
        ("must end in .safetensors", "--rank", 2, "--output", tmp_path / "b.npz"),
        ("--patch-size 5: does not divide", "--rank", 2, "--patch-size", 5, "--output", tmp_path / "b.safetensors"),
    ):
        refused = run_tool("fit_subspace", *tool, *options)
        assert refused.code == 2
        assert said in refused.err
