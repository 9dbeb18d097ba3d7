"""Replacements for functions of DeepSpeed 0.19.8 that let the host wait for the GPU; these do the same on the device.

While the host waits, it launches no kernels, and then the GPU idles. Only engine.py imports deepspeed, and passes its
objects and modules to the functions here.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from jitscale import parallel

NORM_BLOCK = 4096  # elements that are summed in float32; float64 sums the blocks

Replacement = tuple[Any, str, Any]  # an object or a module, the name of an attribute, and its temporary value


@contextmanager
def replaced(*replacements: Replacement) -> Iterator[None]:
    """Replace attributes in the body of the `with` statement."""
    with ExitStack() as stack:
        for owner, name, value in replacements:
            own = name in vars(owner)
            stack.callback(setattr, owner, name, getattr(owner, name)) if own else stack.callback(delattr, owner, name)
            setattr(owner, name, value)
        yield


def order_after_reductions(optimizer: Any, accelerator: Any, stream: Any) -> None:
    """After each backward pass, let the current stream wait for DeepSpeed's reduction `stream`, instead of the host.

    `optimizer` is DeepSpeed's for stage 3. Must not be used if the masters are in the CPU's memory: they need the host
    to wait.

    Later kernels read the reduced gradients on the current stream, which waits for the reductions. Memory is safe too.
    Buckets belong to the current stream: their next user writes them on that stream, after the reductions. Tensors
    allocated for `stream` are reused on `stream` only, and DeepSpeed lets it wait for the current stream before each
    reduction.
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
    """The global 2-norm of sharded gradients, () float32; -1, DeepSpeed's sentinel, if it is not finite.

    It replaces DeepSpeed's function in stages 1 to 3. That one copies every gradient to float64 (on CPUs a fifth of the
    time outside the network), and lets the host wait for a GPU. Here float32 sums short blocks, and float64 sums the
    blocks: equally exact, in one pass. GPUs sum in float32 by their own blocks.
    """
    return _with_sentinel(parallel.sum_over_ranks(_square_sum(device, gradients)), norm_type)


def whole_gradient_norm(
    device: torch.device, input_tensors: Iterable[torch.Tensor], norm_type: int = 2, **_: object
) -> torch.Tensor:
    """Like `gradient_norm`, for gradients that are whole on every rank.

    It replaces `get_global_norm_of_tensors`, which bf16 in stage 1 uses.
    """
    return _with_sentinel(_square_sum(device, input_tensors), norm_type)


@torch.no_grad()
def clip_by_norm(
    input_tensors: Sequence[torch.Tensor], max_norm: float, global_norm: torch.Tensor, eps: float = 1e-6, **_: object
) -> torch.Tensor:
    """Scale gradients in place so that their norm is at most `max_norm`; returns the norm before, `global_norm`.

    It replaces DeepSpeed's `clip_tensors_by_global_norm`, which waits for the device to learn whether to clip.
    """
    torch._foreach_mul_(list(input_tensors), (max_norm / (global_norm + eps)).clamp(max=1.0))
    return global_norm


def _with_sentinel(square_sum: torch.Tensor, norm_type: int) -> torch.Tensor:
    assert norm_type == 2
    norm = square_sum.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def _square_sum(device: torch.device, gradients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of squares, () float64 on `device`; zero without gradients."""
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
