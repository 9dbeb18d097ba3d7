"""Muon for the hidden matrices under ZeRO, AdamW for the rest.

Muon replaces the momentum of a matrix by the nearest semi-orthogonal matrix (Jordan et al. 2024, "Muon: An optimizer
for hidden layers in neural networks"). Scaled by 0.2 sqrt(max(rows, columns)), its root mean square is that of AdamW's
updates, so both take the same learning rate (Liu et al. 2025, arXiv 2502.16982, equation 4).

The momentum stays in the engine's shards, where clipped gradients arrive. Matrices are gathered in a step only, and one
rank orthogonalises each. DeepSpeed's own Muon overwrites the gradients with its updates before they are clipped; so it
would clip, and log the norm of, the updates.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod, sqrt
from typing import TYPE_CHECKING, Any

import torch

from jitscale import parallel

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
        self._pieces: Mapping[torch.Tensor, Sequence[Fragment]] | None = None
        self._rank, self._ranks = 0, 1

    def lay_out(self, pieces: Mapping[torch.Tensor, Sequence[Fragment]], rank: int, ranks: int) -> None:
        """Say which matrices the flat tensors hold, before the first step.

        `pieces` (flat tensor -> this rank's fragments of its matrices) have empty ones too, in the same order on every
        rank. This is number `rank` of the `ranks` that share the matrices: of 1 where these are whole.
        """
        self._pieces, self._rank, self._ranks = pieces, rank, ranks

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; a collective call where matrices are shared."""
        assert closure is None, "the engine has run backward"
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step()
        self.param_groups = groups
        if self._pieces is None:  # DeepSpeed may step once on zeros, to allocate the state
            return None
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                self._step_matrices(flat, group["lr"], group["weight_decay"])
        return None

    def _step_matrices(self, flat: torch.Tensor, lr: float, weight_decay: float) -> None:
        gradient, state = flat.grad, self.state[flat]
        assert gradient is not None
        assert self._pieces is not None
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(flat)
        momentum = state["exp_avg"].lerp_(gradient.to(flat.dtype), 1 - self._momentum)
        update = torch.lerp(gradient.to(flat.dtype), momentum, self._momentum).view(-1)  # Nesterov
        weights = flat.view(-1)
        weights.mul_(1 - lr * weight_decay)
        # Sent in the precision of the products.
        dtype = torch.bfloat16 if flat.device.type == "cuda" else torch.float32
        for bucket in parallel.buckets(self._pieces[flat], lambda piece: prod(piece.shape)):
            lengths = [prod(piece.shape) for piece in bucket]
            whole = torch.zeros(sum(lengths), dtype=dtype, device=flat.device)
            matrices = whole.split(lengths)
            for piece, matrix in zip(bucket, matrices, strict=True):
                own = update[piece.start : piece.start + piece.length]
                matrix[piece.offset : piece.offset + piece.length] = own
            self._sum(whole)
            for index, (piece, matrix) in enumerate(zip(bucket, matrices, strict=True)):
                if index % self._ranks == self._rank:
                    matrix.copy_(orthogonalize(matrix.view(piece.shape)).flatten())
                else:
                    matrix.zero_()
            self._sum(whole)  # exact: one rank has computed each matrix
            for piece, matrix in zip(bucket, matrices, strict=True):
                own = matrix[piece.offset : piece.offset + piece.length]
                scale = 0.2 * sqrt(max(piece.shape))
                weights[piece.start : piece.start + piece.length].add_(own, alpha=-lr * scale)

    def _sum(self, tensor: torch.Tensor) -> None:
        if self._ranks > 1:
            parallel.sum_over_ranks(tensor)


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
