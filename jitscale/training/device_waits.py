"""Where DeepSpeed 0.19.8 lets the host wait for the GPU, and what does the same on the device.

A host that waits launches nothing meanwhile, and the GPU idles until the next kernels come. engine.py hands over
DeepSpeed's objects and modules, since it alone imports deepspeed.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from jitscale import parallel

NORM_BLOCK = 4096  # gradients summed in float32 before float64 takes over

Replacement = tuple[Any, str, Any]  # an object or a module, the name of an attribute, and what stands in for it


@contextmanager
def replaced(*replacements: Replacement) -> Iterator[None]:
    """Let attributes have other values in the body of the `with` statement."""
    with ExitStack() as stack:
        for owner, name, value in replacements:
            own = name in vars(owner)
            stack.callback(setattr, owner, name, getattr(owner, name)) if own else stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield


def order_after_reductions(optimizer: Any, accelerator: Any, stream: Any) -> None:
    """Let the current stream wait for DeepSpeed's `stream` of reductions where the host would, after each backward.

    `optimizer` is that of stage 3. What the host launches afterwards reads the reduced gradients on the current stream,
    which is ordered behind them. The memory is safe as well. Buckets belong to the current stream: who gets them next
    writes them on it, behind the reductions. What was allocated for `stream` is written again on `stream` only, and
    DeepSpeed lets that wait for the current stream before each reduction. Masters in the CPU's memory need the host to
    wait: not for them.
    """
    end_backward = optimizer.independent_gradient_partition_epilogue

    def wait_on_device(*_: object) -> None:
        accelerator.current_stream().wait_stream(stream)

    def end_backward_without_the_host() -> None:
        with replaced((stream, "synchronize", wait_on_device)):
            end_backward()

    optimizer.independent_gradient_partition_epilogue = end_backward_without_the_host


def gradient_norm(
    device: torch.device, gradients: Iterable[torch.Tensor], parameters: object = None, norm_type: int = 2
) -> torch.Tensor:
    """The global 2-norm of sharded gradients, () float32; -1, DeepSpeed's sentinel, where it is not finite.

    It replaces DeepSpeed's own in stages 1 to 3, which copies every gradient to float64 first (on CPUs a fifth of the
    time around the network) and lets the host wait for a GPU. Here short blocks are summed in float32 and the blocks in
    float64, as exactly and in one pass; GPUs sum in float32 by blocks of their own.
    """
    return _with_sentinel(parallel.sum_over_ranks(_square_sum(device, gradients)), norm_type)


def whole_gradient_norm(
    device: torch.device, input_tensors: Iterable[torch.Tensor], norm_type: int = 2, **_: object
) -> torch.Tensor:
    """The same of gradients that are whole on every rank, for bf16 in stage 1: `get_global_norm_of_tensors`."""
    return _with_sentinel(_square_sum(device, input_tensors), norm_type)


@torch.no_grad()
def clip_by_norm(
    input_tensors: Sequence[torch.Tensor], max_norm: float, global_norm: torch.Tensor, eps: float = 1e-6, **_: object
) -> torch.Tensor:
    """Scale gradients, in place, so that their norm is `max_norm` at most; returns their norm before, `global_norm`.

    It replaces DeepSpeed's `clip_tensors_by_global_norm`, which asks the device whether there is something to clip.
    """
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + eps)).clamp(max=1.0))
    return global_norm


def _with_sentinel(square_sum: torch.Tensor, norm_type: int) -> torch.Tensor:
    assert norm_type == 2
    norm = square_sum.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def _square_sum(device: torch.device, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of squares, () float64 on `device`; without gradients it is zero, and built there too."""
    summed = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
    squares = [torch.zeros((), dtype=torch.float64, device=device)]
    if device.type == "cuda" and summed:
        squares.append(torch.stack(torch._foreach_norm(summed)).double().square().sum())
    else:
        squares += [_square_sum_by_blocks(gradient) for gradient in summed]
    return torch.stack(squares).sum()


def _square_sum_by_blocks(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    whole = flat.numel() // NORM_BLOCK * NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    return blocks.double().square().sum() + flat[whole:].double().square().sum()
