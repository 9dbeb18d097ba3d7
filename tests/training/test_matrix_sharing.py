"""Matrices shared over ranks: the work is balanced, and one rank computes each whole matrix. Ranks are threads here."""

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
    """Cut the concatenation of all matrices into `ranks` equal shards, as ZeRO does."""
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
def test_one_rank_computes_each_whole_matrix(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some matrices lie on several ranks, and some ranks own none.

    A step has two exchanges, no larger than the shards.
    """
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
        return matrix / matrix.norm()  # The result depends on every element.

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
def test_the_work_of_ranks_is_balanced(ranks: int, most: float) -> None:
    """For the matrices of JiT-H: the largest load divided by the mean load."""
    model = ModelConfig(hidden_size=1280, depth=32, num_heads=16, bottleneck_dim=256)
    shapes = {
        name: shape for name, shape in parameter_shapes(model).items() if len(shape) == 2 and name.startswith("blocks.")
    }
    costs = {name: orthogonalize_flops(shape) for name, shape in shapes.items()}
    owners = balanced(costs, ranks)
    loads = [sum(cost for name, cost in costs.items() if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) < most * sum(loads) / ranks


def test_costs_count_the_products_of_the_iterations() -> None:
    """The longer side does not matter."""
    assert (
        orthogonalize_flops((3, 5))
        == orthogonalize_flops((5, 3))
        == 5 * (2 * 3 * 5 * 3 + 2 * 3 * 3 * 3 + 2 * 3 * 3 * 5)
    )
