"""The network's subspace: where it is stored, and how the patch embedding is initialised around it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from jitscale.config import DiffusionConfig
from jitscale.diffusion.objective import patches_of
from jitscale.model.jit import JiT, network_holding
from tests.support.tiny import MODEL

NUMBERS, BOTTLENECK = 48, 8


def built(rank: int | None, subspace: torch.Tensor | None = None) -> JiT:
    torch.manual_seed(5)
    return JiT(MODEL, DiffusionConfig() if rank is None else asym(rank), subspace)


def asym(rank: int) -> DiffusionConfig:
    return DiffusionConfig(prediction="asym", rank=rank)


def orthonormal(rank: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(NUMBERS, rank, generator=torch.Generator().manual_seed(1))).Q


@pytest.mark.parametrize("rank", [1, 5, 8, 12, 47])
def test_first_rows_of_the_patch_embedding_give_coordinates_in_the_subspace(rank: int) -> None:
    """As a function: the first numbers of a token are the scaled coordinates of the patch in the subspace."""
    subspace = orthonormal(rank)
    network, plain = built(rank, subspace), built(None)
    rows = min(rank, BOTTLENECK)
    images = torch.randn(2, 3, 16, 16)
    tokens = F.conv2d(images, network.x_embedder.proj1.weight, stride=4).flatten(2).transpose(1, 2)[..., :rows]
    scale = (2 * NUMBERS / (NUMBERS + BOTTLENECK)) ** 0.5
    torch.testing.assert_close(tokens, scale * patches_of(images, 4) @ subspace[:, :rows], rtol=0, atol=1e-5)
    for name, parameter in plain.named_parameters():
        own = network.get_parameter(name)
        start = rows if name == "x_embedder.proj1.weight" else 0
        assert torch.equal(own[start:], parameter[start:]), f"{name} gets the same random numbers as without a subspace"


@pytest.mark.parametrize("rank", [0, NUMBERS])
def test_both_ends_of_the_ranks_are_initialised_as_without_a_subspace(rank: int) -> None:
    network, plain = built(rank), built(None)
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), plain.parameters(), strict=True))
    assert network.state_dict().keys() == plain.state_dict().keys(), "a subspace that the rank determines is not stored"
    assert network.stored_buffers() == {}
    assert torch.equal(network.subspace, torch.eye(NUMBERS)[:, :rank])  # type: ignore[arg-type]
    held = network_holding(plain.state_dict(), MODEL, asym(rank))
    assert torch.equal(held.subspace, torch.eye(NUMBERS)[:, :rank])  # type: ignore[arg-type]


def test_a_network_with_x_prediction_has_no_subspace() -> None:
    network = JiT(MODEL, DiffusionConfig(), orthonormal(5))
    assert network.subspace is None
    assert "subspace" not in network.state_dict()


def test_a_missing_subspace_is_noticed() -> None:
    """It is NaN, so that no result uses it by mistake. Weights without a subspace are refused."""
    network = built(5)
    assert network.subspace is not None
    assert network.subspace.isnan().all()
    given = built(5, orthonormal(5))
    assert given.stored_buffers().keys() == {"subspace"}
    assert "subspace" not in dict(given.named_parameters())
    network.load_state_dict(given.state_dict())
    assert torch.equal(network.subspace, orthonormal(5))
    state = dict(given.state_dict())
    held = network_holding(state, MODEL, asym(5))
    assert held.subspace is not None
    assert held.subspace.data_ptr() == state["subspace"].data_ptr()
    del state["subspace"]
    with pytest.raises(RuntimeError, match="subspace"):
        network_holding(state, MODEL, asym(5))
    with pytest.raises(RuntimeError, match="size mismatch for subspace"):
        network_holding(given.state_dict(), MODEL, asym(6))


def test_the_subspace_depends_on_the_patch_size() -> None:
    subspace = JiT(replace(MODEL, patch_size=2), asym(3)).subspace
    assert subspace is not None
    assert subspace.shape == (12, 3)
