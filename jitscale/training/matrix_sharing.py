"""Computes with whole matrices whose elements are sharded over the ranks: one rank owns each matrix.

The matrices of a step are distributed such that all ranks compute for about the same time. One all-to-all sends the
pieces of each matrix to its owner, a second one returns the results. A rank sends its shard and receives only the
matrices that it owns. Gathering all matrices on every rank would move more data by a factor of 2 x ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from jitscale import parallel

if TYPE_CHECKING:  # the benchmark of a step runs the optimizer without the packages that read files
    from jitscale.checkpoints.format import Fragment

Shape = tuple[int, ...]


@dataclass(frozen=True)
class _Owned:
    """A matrix that this rank owns: its pieces in order, as (begin, end) in the received buffer."""

    shape: Shape
    pieces: list[tuple[int, int]]


class MatrixSharing:
    """The owner of each matrix among the ranks, and the elements that the ranks send to each other."""

    def __init__(self, fragments: Sequence[Sequence[Fragment]], rank: int, cost: Callable[[Shape], float]) -> None:
        """Distribute the matrices in the `fragments` of all ranks; this rank is number `rank`.

        `cost` returns the time that a matrix of a shape takes, in any unit. All ranks compute the same result.
        """
        ranks = range(len(fragments))
        shapes = {f.name: f.shape for own in fragments for f in own}
        held = [{f.name: f for f in own} for own in fragments]
        self.owners = balanced({name: cost(shape) for name, shape in shapes.items()}, len(fragments))
        names = [[name for name in shapes if self.owners[name] == owner] for owner in ranks]
        # Messages hold the pieces in the order of `names`.
        sent = [[held[rank][name] for name in names[owner] if name in held[rank]] for owner in ranks]
        received = [[held[source][name] for name in names[rank] if name in held[source]] for source in ranks]
        self.pieces = [f for message in sent for f in message]  # pieces of this rank, in the order of sending
        self._sent = [sum(f.length for f in message) for message in sent]
        self._received = [sum(f.length for f in message) for message in received]
        places: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names[rank]}
        position = 0
        for f in (f for message in received for f in message):
            places[f.name].append((f.offset, position, position + f.length))
            position += f.length
        self._owned = [_Owned(shapes[name], [place[1:] for place in sorted(found)]) for name, found in places.items()]
        for owned in self._owned:
            assert sum(end - begin for begin, end in owned.pieces) == prod(owned.shape), "one rank holds each element"

    def compute(
        self,
        fill: Callable[[Fragment, torch.Tensor], object],
        transform: Callable[[torch.Tensor], torch.Tensor],
        take: Callable[[Fragment, torch.Tensor], object],
        like: torch.Tensor,
    ) -> None:
        """Apply `transform` (matrix -> matrix of its shape) to every matrix; a collective call.

        `fill` writes the elements of one of this rank's fragments into a flat tensor with the dtype and the device of
        `like`; `take` receives their results. Besides one matrix, two buffers are in memory: the elements of this
        rank's shard, and the elements of the matrices that it owns.
        """
        sent = like.new_empty(sum(self._sent))
        parts = sent.split([f.length for f in self.pieces])
        for piece, part in zip(self.pieces, parts, strict=True):
            fill(piece, part)
        received = sent  # a single rank owns everything
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
    """The rank of each name: names by falling cost, each to the rank with the smallest load so far (Graham 1969)."""
    loads, owners = [0.0] * ranks, {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        owners[name] = min(range(ranks), key=loads.__getitem__)
        loads[owners[name]] += costs[name]
    return owners
