"""How the network computes on a device: attention's kernel, aligned widths, float8, compilation.

What it computes stays, and nothing here is part of a checkpoint: parameters keep their names and shapes.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jitscale.config import EngineConfig
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, ChosenKernel, choose_kernel
from jitscale.model.float8 import float8_product
from jitscale.model.flops import image_tokens
from jitscale.model.jit import Block, JiT

# Of one code object: two lengths, with and without dropout and gradients; batches of one and of more, or in training
# each size of a batch.
GRAPHS = 32

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Execution:
    """What was resolved, for the record."""

    attention: ChosenKernel
    aligned: bool  # whether feed-forward products are padded to multiples of ALIGNMENT
    compiled: bool  # whether blocks are compiled
    float8: bool  # whether products are in float8

    @property
    def by_block(self) -> bool:
        """Whether a block reads its layers' weights itself, so that ZeRO-3 must gather them for the whole block."""
        return self.aligned or self.compiled or self.float8

    @property
    def identity(self) -> str:
        """What must be the same on all ranks: everything but the reasons, which tell of one rank's errors."""
        return ", ".join(_flat(asdict(self)))

    def __str__(self) -> str:
        chosen = self.attention
        kernel = f"attention {chosen.name} ({chosen.version}; {chosen.reason})"
        on = {"feed-forward widths padded": self.aligned, "float8": self.float8, "blocks compiled": self.compiled}
        return ", ".join([kernel, *(name for name in on if on[name])])


def _flat(fields: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "reason":
            yield f"{prefix}{name}={value}"


def prepare(model: JiT, engine: EngineConfig, device: torch.device, *, training: bool) -> Execution:
    """Let the blocks of `model` compute as `engine` says, on `device`; changed in place.

    A setting of None is on for GPUs, and alignment also for float8. For sampling, nothing is dropped or recomputed.
    Raises a ConfigError if the attention kernel that was asked for does not work, there is no float8, or float8 is
    asked for without alignment.
    """
    on_gpu, config, length = device.type == "cuda", model.config, image_tokens(model.config)
    blocks = cast(list[Block], list(model.blocks))
    attention = choose_kernel(
        engine.attention,
        tokens=[length, length + config.in_context_len],
        heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        dropouts=[block.attn.attn_dropout if training else 0.0 for block in blocks],
        dtype=torch.float32 if engine.precision == "fp32" else torch.bfloat16,
        device=device,
    )
    aligned = on_gpu or engine.float8 if engine.align is None else engine.align
    compiled = on_gpu if engine.compile is None else engine.compile
    product = float8_product(device) if engine.float8 else None
    if engine.float8 and not aligned:
        raise ConfigError("engine.float8=true needs widths that are multiples of 16; set engine.align=true")
    for index, block in enumerate(blocks):
        block.attn.kernel = KERNELS[attention.name]
        block.mlp.aligned = aligned
        block.attn.product = block.mlp.product = product
        every = engine.activation_checkpointing if training else 0
        if every > 0 and index % every == 0:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]
        if compiled:
            block.forward = _compile(block.forward, training=training)  # type: ignore[method-assign, assignment]
    return Execution(attention, aligned, compiled, engine.float8)


def _compile(forward: Forward, *, training: bool) -> Forward:
    """One graph without breaks for each shape; blocks of the same shape share theirs.

    Training has one size of a batch. If the size is a symbol, torch 2.6 and 2.11 fail to split a recomputed block with
    dropout into forward and backward pass ("Node was invalid, but is output"). Sampling has one graph for all sizes,
    since it ends with what is left over. The forward pass only: ZeRO-3's hooks, which gather the weights, stay outside.
    """
    limits = torch._dynamo.config
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # the latter in torch 2.6
    setattr(limits, limit, max(GRAPHS, getattr(limits, limit)))
    dynamic = False if training else None
    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic, backend=_with_parameters_anywhere)
    if training:
        return compiled

    def call(x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        if len(x) > 1:  # a batch of one is a graph of its own to torch
            for tensor in (x, condition):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(x, condition, rope)

    return call


def _with_parameters_anywhere(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile with Inductor, but do not let it assume that all blocks' parameters are aligned as the first block's.

    Blocks share a graph. Inductor treats parameters as static inputs and decides at compile time whether it may read 16
    bytes at once. In ZeRO's flat buffers the same parameter of another block can be unaligned, and the GPU then stops
    with "misaligned address". An input that is not static is checked in every call and copied if it is unaligned. The
    backward pass has no such check: `training.optim.parameter_groups` aligns what it reads.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 (slow, and only who compiles needs it)

    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.get("tensor_dict", {}).pop("_dynamo_static_input_type", None)
    return compile_fx(graph, inputs)  # type: ignore[return-value]
