"""Matrices shared over ranks: balanced, and each computed whole by one rank. Ranks are threads here."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import prod

import pytest
import torch

from jitscale.checkpoints.format import Fragment
from jitscale.config import ModelConfig
from jitscale.planner.memory import parameter_shapes
from jitscale.training.matrix_sharing import MatrixSharing, balanced
from jitscale.training.muon import orthogonalize_flops

SHAPES = {"a": (4, 6), "b": (7, 3), "c": (5, 5), "d": (2, 9)}


def cut(ranks: int) -> list[list[Fragment]]:
    """The concatenation of all matrices in `ranks` equal shards, as ZeRO cuts it."""
    share = -(-sum(map(prod, SHAPES.values())) // ranks)
    fragments: list[list[Fragment]] = [[] for _ in range(ranks)]
    position = 0
    for name, shape in SHAPES.items():
        end = position + prod(shape)
        for rank in range(ranks):
            first, last = max(position, rank * share), min(end, (rank + 1) * share)
            if first < last:
                own = Fragment(name, shape, 0, first - rank * share, last - first, first - position)
                fragments[rank].append(own)
        position = end
    return fragments


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_each_matrix_is_computed_whole_by_one_rank(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With pieces on several ranks, and ranks that own none; two exchanges a step, of no more than the shards."""
    fragments, meeting, me = cut(ranks), threading.Barrier(ranks), threading.local()
    mail: dict[tuple[int, int], torch.Tensor] = {}
    moved = [0] * ranks
    computed: list[tuple[int, ...]] = []

    def exchange(
        send: torch.Tensor, send_lengths: list[int], receive: torch.Tensor, receive_lengths: list[int]
    ) -> None:
        for other, part in enumerate(send.split(send_lengths)):
            mail[me.rank, other] = part.clone()
        meeting.wait()
        receive.copy_(torch.cat([mail[other, me.rank] for other in range(ranks)]))
        assert receive_lengths == [len(mail[other, me.rank]) for other in range(ranks)]
        moved[me.rank] += 1
        meeting.wait()

    monkeypatch.setattr("jitscale.parallel.exchange", exchange)
    torch.manual_seed(0)
    whole = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    found = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def transform(matrix: torch.Tensor) -> torch.Tensor:
        computed.append(tuple(matrix.shape))
        return matrix / matrix.norm()  # depends on every element

    def run(rank: int) -> None:
        me.rank = rank
        sharing = MatrixSharing(fragments, rank, orthogonalize_flops)
        for _ in range(2):
            sharing.compute(
                lambda f, out: out.copy_(whole[f.name].flatten()[f.offset : f.offset + f.length]),
                transform,
                lambda f, values: found[f.name].view(-1)[f.offset : f.offset + f.length].copy_(values),
                torch.empty(0),
            )

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(run, range(ranks)))
    assert sorted(computed) == sorted(2 * list(SHAPES.values()))
    for name, matrix in whole.items():
        assert torch.equal(found[name], matrix / matrix.norm()), name
    assert moved == [4 if ranks > 1 else 0] * ranks


@pytest.mark.parametrize(("ranks", "most"), [(24, 1.02), (48, 1.08), (64, 1.06)])
def test_ranks_compute_about_equally_long(ranks: int, most: float) -> None:
    """The matrices of JiT-H: the rank with most to do, to the mean."""
    model = ModelConfig(hidden_size=1280, depth=32, num_heads=16, bottleneck_dim=256)
    shapes = {
        name: shape for name, shape in parameter_shapes(model).items() if len(shape) == 2 and name.startswith("blocks.")
    }
    costs = {name: orthogonalize_flops(shape) for name, shape in shapes.items()}
    owners = balanced(costs, ranks)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) < most * sum(loads) / ranks


def test_costs_are_the_products_of_the_iterations() -> None:
    """Whichever side is longer."""
    assert (
        orthogonalize_flops((3, 5))
        == orthogonalize_flops((5, 3))
        == 5 * (2 * 3 * 5 * 3 + 2 * 3 * 3 * 3 + 2 * 3 * 3 * 5)
    )
