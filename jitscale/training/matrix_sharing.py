"""Matrices that lie in the shards of many ranks: each is whole on one rank for as long as that computes with it.

The matrices of a step are shared over the ranks at once, such that all compute about equally long. One all-to-all takes
the pieces of each matrix to its owner, another one brings back what the owner made of them. A rank sends its shard and
receives its own matrices, and no more: gathering all matrices on every rank would move 2 x ranks as much.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from jitscale import parallel

if TYPE_CHECKING:  # an optimizer needs no package that reads files: the benchmark of a step runs without them
    from jitscale.checkpoints.format import Fragment

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Owned:
    """A matrix of this rank: its pieces in their order, as (begin, end) in what the rank receives."""

    shape: Shape
    pieces: list[tuple[int, int]]


class MatrixSharing:
    """Which rank owns each matrix, and which elements go where."""

    def __init__(self, fragments: Sequence[Sequence[Fragment]], rank: int, cost: Callable[[Shape], float]) -> None:
        """Share the matrices in the `fragments` of all ranks, of which this is number `rank`.

        `cost` says how long a matrix of some shape takes, in any unit. All ranks compute the same from the same.
        """
        ranks = range(len(fragments))
        shapes = {f.name: f.shape for own in fragments for f in own}
        held = [{f.name: f for f in own} for own in fragments]
        self.owners = balanced({name: cost(shape) for name, shape in shapes.items()}, len(fragments))
        names = [[name for name in shapes if self.owners[name] == owner] for owner in ranks]
        # Messages hold the pieces in the order of `names`.
        sent = [[held[rank][name] for name in names[owner] if name in held[rank]] for owner in ranks]
        received = [[held[source][name] for name in names[rank] if name in held[source]] for source in ranks]
        self.pieces = [f for message in sent for f in message]  # this rank's, in the order in which they are sent
        self._sent = [sum(f.length for f in message) for message in sent]
        self._received = [sum(f.length for f in message) for message in received]
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names[rank]}
        position = 0
        for f in (f for message in received for f in message):
            places[f.name].append((f.offset, position, position + f.length))
            position += f.length
        self._owned = [_Owned(shapes[name], [place[1:] for place in sorted(found)]) for name, found in places.items()]
        for owned in self._owned:
            assert sum(end - begin for begin, end in owned.pieces) == prod(owned.shape), "an element has one holder"

    def compute(
        self,
        fill: Callable[[Fragment, torch.Tensor], object],
        transform: Callable[[torch.Tensor], torch.Tensor],
        take: Callable[[Fragment, torch.Tensor], object],
        like: torch.Tensor,
    ) -> None:
        """Apply `transform` (matrix -> matrix of its shape) to every matrix; a collective call.

        `fill` writes the elements of a fragment of this rank into a flat tensor with the dtype and the device of
        `like`; `take` is given what became of them. Next to one matrix, two buffers are in memory: one with the
        elements of this rank's shard, one with those of its matrices.
        """
        sent = like.new_empty(sum(self._sent))
        parts = sent.split([f.length for f in self.pieces])
        for piece, part in zip(self.pieces, parts, strict=True):
            fill(piece, part)
        received = sent  # one rank owns what it sends
        if len(self._sent) > 1:
            received = like.new_empty(sum(self._received))
            parallel.exchange(sent, self._sent, received, self._received)
        for owned in self._owned:
            found = [received[begin:end] for begin, end in owned.pieces]
            result = transform(torch.cat(found).view(owned.shape)).flatten()
            for part, values in zip(found, result.split([len(part) for part in found]), strict=True):
                part.copy_(values)
        if len(self._sent) > 1:
            parallel.exchange(received, self._received, sent, self._sent)
        for piece, part in zip(self.pieces, parts, strict=True):
            take(piece, part)


def balanced(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Each name's rank: the dearest first, each to the rank that has least to do (Graham 1969)."""
    loads, owners = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = min(range(ranks), key=loads.__getitem__)
        loads[owners[name]] += costs[name]
    return owners
