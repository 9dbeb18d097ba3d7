"""Muon for the hidden matrices under ZeRO, AdamW for the rest.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix (Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks"). Scaled by 0.2 sqrt(max(rows, columns)), its root mean square is that of AdamW's
updates, so both take the same learning rate (Liu et al. 2025, arXiv 2502.16982, equation 4).

The momentum stays in the engine's shards, where clipped gradients arrive. In a step each matrix is whole on one rank,
which orthogonalises it (`matrix_sharing`). DeepSpeed's own Muon overwrites the gradients with its updates before they
are clipped; so it would clip, and log the norm of, the updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch

from jitscale.training.matrix_sharing import MatrixSharing

if TYPE_CHECKING:  # an optimizer needs no package that reads files: the benchmark of a step runs without them
    from jitscale.checkpoints.format import Fragment

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al. 2024)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


class Muon(torch.optim.AdamW):
    """AdamW that treats groups with `muon: True` by Muon; a group's own lr and weight_decay hold for both.

    The momentum is kept as `exp_avg`, beside AdamW's.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._momentum = momentum
        self._numbers: dict[torch.Tensor, int] = {}
        self._fragments: Sequence[Sequence[Fragment]] = ()
        self._rank = 0
        self._sharings: dict[tuple[int, ...], MatrixSharing] = {}  # by the numbers of the flat tensors in a step

    def lay_out(self, flats: Mapping[int, torch.Tensor], fragments: Sequence[Sequence[Fragment]], rank: int) -> None:
        """Say which matrices the flat tensors hold, before the first step.

        `flats` are those of Muon, by the numbers that fragments have for them; `fragments` are those of each rank that
        shares the matrices, in rank order, and this is number `rank` of them. Of one rank the matrices are whole.
        """
        self._numbers = {flat: number for number, flat in flats.items()}
        self._fragments, self._rank, self._sharings = fragments, rank, {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; a collective call where matrices are shared."""
        assert closure is None, "the engine has run backward"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        if not self._numbers:  # DeepSpeed may step once on zeros, to allocate the state
            return None
        # Stage 3 steps its flat tensors one by one.
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
        # Sent in the precision of the products.
        like = torch.empty(0, dtype=torch.bfloat16 if first.is_cuda else torch.float32, device=first.device)
        self._sharing(tuple(stepped)).compute(fill, orthogonalize, take, like)

    def _sharing(self, numbers: tuple[int, ...]) -> MatrixSharing:
        """How the ranks share the matrices in these flat tensors."""
        if numbers not in self._sharings:
            pieces = [[f for f in own if f.flat in numbers and f.length > 0] for own in self._fragments]
            self._sharings[numbers] = MatrixSharing(pieces, self._rank, orthogonalize_flops)
        return self._sharings[numbers]


def orthogonalize_flops(shape: tuple[int, ...]) -> float:
    """Of the products of `orthogonalize`, for a matrix of this shape."""
    short, long = sorted(shape)
    return ITERATIONS * 2.0 * short * short * (2 * long + short)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Near U V^T for the matrix U S V^T: singular values between about 0.7 and 1.2, by Newton-Schulz iterations.

    The matrix (rows, columns) may have any norm; the iterations are computed in its precision.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=SMALLEST_NORM)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
