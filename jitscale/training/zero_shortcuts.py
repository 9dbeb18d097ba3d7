"""What DeepSpeed 0.19.8 does for every parameter in ZeRO stages 1 and 2, and need not do here.

A network has hundreds of parameters, and a GPU may wait for the host that handles them one by one.
"""

from typing import Any

import torch


class FlatGradients(list[torch.Tensor]):
    """A group's gradients as DeepSpeed's optimizer takes them without another copy: one flat tensor."""

    def __init__(self, flat: torch.Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


def skip_needless_work(optimizer: Any) -> None:
    """Let `optimizer`, DeepSpeed's for stages 1 and 2, leave out what changes nothing."""
    # After each step it points every parameter at its place in the flat buffer, where it is since the start.
    optimizer._update_model_bit16_weights = lambda group_index: None
    # In each hook it words messages about memory that nobody has asked for.
    optimizer.report_ipg_memory_usage = lambda *arguments, **named: None


def gather_gradients_at_once(optimizer: Any) -> None:
    """Replace the reduction of `optimizer`, which copies and divides gradients one by one, on one rank.

    Gradients must be of the masters' dtype. Micro-batches add up in the parameters' gradients, in stage 2 too. After
    the last one, they are copied into the flat tensor that the optimizer takes. A parameter without a gradient has one
    of zeros, as it has in DeepSpeed.
    """
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()
    assert not any(padding for group in optimizer.round_robin_bit16_padding for padding in group)

    @torch.no_grad()
    def gather(pipeline_parallel: bool = False) -> None:
        if not optimizer.is_gradient_accumulation_boundary():
            return
        groups = zip(optimizer.round_robin_bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True)
        for index, (parameters, master) in enumerate(groups):
            flat = torch.empty_like(master)
            places = dict(zip(parameters, optimizer.unflatten(flat, parameters), strict=True))
            flat[sum(p.numel() for p in parameters) :].zero_()  # padding
            present = [p for p in parameters if p.grad is not None]
            if present:
                torch._foreach_copy_([places[p] for p in present], [p.grad for p in present])
            for p in parameters:
                if p.grad is None:
                    places[p].zero_()
                p.grad = None
            optimizer.averaged_gradients[index] = FlatGradients(flat)

    optimizer.reduce_gradients = gather  # stage 1 calls it after the last micro-batch
    optimizer.overlapping_partition_gradients_reduce_epilogue = gather  # stage 2 calls it after each of them
