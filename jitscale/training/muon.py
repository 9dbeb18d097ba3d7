"""Muon for the hidden matrices under ZeRO, AdamW for the rest.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix (Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks"). Scaled by 0.2 sqrt(max(rows, columns)), the update has the same root mean square
as AdamW's, so both use the same learning rate (Liu et al. 2025, arXiv 2502.16982, equation 4).

The momentum stays in the engine's shards, where clipped gradients arrive. In a step one rank gathers each matrix and
orthogonalises it (`matrix_sharing`). DeepSpeed's own Muon is not used: it replaces the gradients by its updates before
clipping, so that it would clip the updates, and log their norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from jitscale.training.matrix_sharing import MatrixSharing

if TYPE_CHECKING:  # the benchmark of a step runs the optimizer without the packages that read files
    from jitscale.checkpoints.format import Fragment

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration (Jordan et al. 2024)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.AdamW):
    """AdamW, but Muon updates the groups with `muon: True`. Both use a group's lr and weight_decay.

    Muon's momentum is stored as `exp_avg`, like AdamW's first moment.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._momentum = momentum
        self._numbers: dict[torch.Tensor, int] = {}
        self._fragments: Sequence[Sequence[Fragment]] = ()
        self._rank = 0
        self._sharings: dict[tuple[int, ...], MatrixSharing] = {}  # key: the numbers of the flat tensors of a step

    def lay_out(self, flats: Mapping[int, torch.Tensor], fragments: Sequence[Sequence[Fragment]], rank: int) -> None:
        """Set which matrices the flat tensors hold; must be called before the first step.

        `flats` are Muon's flat tensors, by the numbers that fragments use. `fragments` has the fragments of each rank
        that shards the matrices, in rank order; `rank` is this rank's index in it. With one rank, matrices are whole.
        """
        self._numbers = {flat: number for number, flat in flats.items()}
        self._fragments, self._rank, self._sharings = fragments, rank, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; a collective call if matrices are sharded."""
        assert closure is None, "the engine has run backward"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        if not self._numbers:  # not laid out yet: DeepSpeed may take a first step on zeros, to allocate the state
            return None
        # In stage 3 DeepSpeed calls `step` for each flat tensor, so a call may have no matrices.
        if stepped := [(flat, group) for group in groups if group["muon"] for flat in group["params"]]:
            self._step_matrices({self._numbers[flat]: (flat, group) for flat, group in stepped})
        return None

    def _step_matrices(self, stepped: Mapping[int, tuple[torch.Tensor, Mapping[str, Any]]]) -> None:
        gradients: dict[int, torch.Tensor] = {}
        momenta: dict[int, torch.Tensor] = {}
        weights: dict[int, torch.Tensor] = {}
        for number, (flat, group) in stepped.items():
            assert flat.grad is not None
            state = self.state[flat]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(flat)
            gradients[number], weights[number] = flat.grad.to(flat.dtype).reshape(-1), flat.view(-1)
            momenta[number] = state["exp_avg"].view(-1).lerp_(gradients[number], 1 - self._momentum)
            weights[number].mul_(1 - group["lr"] * group["weight_decay"])

        def fill(piece: Fragment, out: torch.Tensor) -> None:
            own = slice(piece.start, piece.start + piece.length)
            out.copy_(torch.lerp(gradients[piece.flat][own], momenta[piece.flat][own], self._momentum))  # Nesterov

        def take(piece: Fragment, update: torch.Tensor) -> None:
            own, lr = slice(piece.start, piece.start + piece.length), stepped[piece.flat][1]["lr"]
            weights[piece.flat][own].add_(update, alpha=-lr * (0.2 * sqrt(max(piece.shape))))

        first = next(iter(weights.values()))
        # Gradients are sent in the precision in which the matrix products are computed.
        like = torch.empty(0, dtype=torch.bfloat16 if first.is_cuda else torch.float32, device=first.device)
        self._sharing(tuple(stepped)).compute(fill, orthogonalize, take, like)

    def _sharing(self, numbers: tuple[int, ...]) -> MatrixSharing:
        """The distribution over the ranks of the matrices in these flat tensors."""
        if numbers not in self._sharings:
            pieces = [[f for f in own if f.flat in numbers and f.length > 0] for own in self._fragments]
            self._sharings[numbers] = MatrixSharing(pieces, self._rank, orthogonalize_flops)
        return self._sharings[numbers]


def orthogonalize_flops(shape: tuple[int, ...]) -> float:
    """Floating-point operations of `orthogonalize` for a matrix of this shape."""
    short, long = sorted(shape)
    return ITERATIONS * 2.0 * short * short * (2 * long + short)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Approximates U V^T of the matrix U S V^T by Newton-Schulz iterations: singular values from about 0.7 to 1.2.

    The matrix (rows, columns) may have any norm. The iterations use its precision.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # the iteration needs singular values of at most 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
