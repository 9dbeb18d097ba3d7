"""The execution of the network on a device: attention kernel, aligned widths, float8, compilation, CUDA graphs.

The function that the network computes stays the same. Nothing here is part of a checkpoint: parameters keep their names
and shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jitscale.config import EngineConfig, routed_blocks, routed_tokens
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, ChosenKernel, choose_kernel
from jitscale.model.float8 import float8_product
from jitscale.model.flops import block_tokens
from jitscale.model.fused.choice import FusedKernels, Shapes, choose_fused
from jitscale.model.jit import Block, FinalLayer, JiT
from jitscale.model.layers import swiglu_width
from jitscale.model.training_graphs import TrainingGraphs

# Compiled graphs of one code object: two lengths (four if tokens are routed), with and without dropout and gradients,
# a batch of one and larger batches, or in training each batch size.
GRAPHS = 32
# For ranks whose `Execution.identity` differs. The likeliest reason is that one node lacks triton.
REMEDY = (
    "repair the node that differs, or set engine.attention, engine.fused_kernels, engine.cuda_graphs, engine.compile "
    "and engine.align explicitly"
)

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Execution:
    """The choices with which the network computes; for the log."""

    attention: ChosenKernel
    aligned: bool  # whether feed-forward products are padded to multiples of ALIGNMENT
    compiled: bool  # whether blocks are compiled
    float8: bool  # whether products are in float8
    fused: FusedKernels
    graphs: bool = False  # whether blocks are CUDA graphs
    training_graphs: TrainingGraphs | None = field(default=None, repr=False)

    @property
    def by_block(self) -> bool:
        """True if a block reads its layers' weights itself, so that ZeRO-3 must gather them for the whole block."""
        return self.aligned or self.compiled or self.float8 or self.fused.name != "torch"

    @property
    def identity(self) -> str:
        """The part that must be the same on all ranks: all but the reasons, which may name the error of one rank."""
        kernels = [f"{chosen.name} {chosen.version}".strip() for chosen in (self.attention, self.fused)]
        switches = ("aligned", "compiled", "float8", "graphs")
        return ", ".join(
            [f"attention={kernels[0]}", f"fused={kernels[1]}", *(f"{name}={getattr(self, name)}" for name in switches)]
        )

    def __str__(self) -> str:
        chosen = self.attention
        kernel = f"attention {chosen.name} ({chosen.version}; {chosen.reason})"
        on = {"feed-forward widths padded": self.aligned, "float8": self.float8, "blocks compiled": self.compiled}
        on["blocks as CUDA graphs"] = self.graphs
        return ", ".join([kernel, f"fused kernels {self.fused}", *(name for name in on if on[name])])


def prepare(
    model: JiT, engine: EngineConfig, device: torch.device, *, training: bool, batch: int = 1, micro_batches: int = 1
) -> Execution:
    """Set up the blocks of `model`, in place, to compute as `engine` says, on `device`, in batches of `batch`.

    A setting of None means: on for GPUs. Alignment is also on for float8. CUDA graphs are used in training only; None
    turns them on if blocks are compiled. For sampling (not `training`) there is no dropout and no recomputation. In
    training, a step accumulates gradients over `micro_batches`.

    Raises a ConfigError if requested attention or fused kernels do not work, float8 is not available or is requested
    without alignment, or CUDA graphs are requested without a GPU.
    """
    on_gpu, config = device.type == "cuda", model.config
    blocks = cast(list[Block], list(model.blocks))
    aligned = on_gpu or engine.float8 if engine.align is None else engine.align
    compiled = on_gpu if engine.compile is None else engine.compile
    product = float8_product(device) if engine.float8 else None
    if engine.float8 and not aligned:
        raise ConfigError("engine.float8=true needs widths that are multiples of 16; set engine.align=true")
    fused = choose_fused(engine.fused_kernels, _shapes(model, engine, aligned=aligned, training=training), device)
    attention = choose_kernel(
        engine.attention,
        # In training also without routing, for the part after run.route_until_images.
        tokens=[block_tokens(config, i, training=routed) for i in range(len(blocks)) for routed in {False, training}],
        heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        dropouts=[block.attn.attn_dropout if training else 0.0 for block in blocks],
        dtype=torch.float32 if engine.precision == "fp32" else torch.bfloat16,
        device=device,
        batch=batch,
        backward=training,
        strided_values=fused.split_heads is None,  # the fused kernels write q, k and v into separate tensors
    )
    every = engine.activation_checkpointing if training else 0
    graphs = training and wants_graphs(engine, compiled=compiled and on_gpu)
    if graphs and not on_gpu:
        raise ConfigError(f"engine.cuda_graphs=true: {device} has none; set it to false, or take a GPU")
    recomputed = [index for index in range(len(blocks)) if every > 0 and index % every == 0]
    if not training:
        for layer in model.modules():
            if isinstance(layer, nn.Dropout):
                layer.p = 0.0  # otherwise blocks that differ only in this unused number would not share a graph
    for index, block in enumerate(blocks):
        block.attn.kernel = KERNELS[attention.name]
        block.mlp.aligned = aligned
        block.attn.product = block.mlp.product = product
        block.attn.split_heads, block.mlp.gated, block.kernels = fused.split_heads, fused.gated, fused.residual
        forward: Forward = _compile(block.forward, training=training) if compiled else block.forward
        # CUDA graphs do their own recomputation. `checkpoint` stays outside the compiled code: inside it, torch uses
        # other generators on a GPU, so that dropout would not follow torch.manual_seed.
        if index in recomputed and not graphs:
            forward = partial(checkpoint, forward, use_reentrant=False)
        block.forward = forward  # type: ignore[method-assign, assignment]
    for layer in model.modules():
        if isinstance(layer, FinalLayer):
            layer.kernels = fused.residual
    # In stage 2 each backward pass copies its gradients into buckets (training/reducer.py).
    accumulate = micro_batches > 1 and engine.zero_stage < 2
    captured = TrainingGraphs(model, recomputed=recomputed, accumulate=accumulate) if graphs else None
    return Execution(attention, aligned, compiled, engine.float8, fused, graphs, captured)


def wants_graphs(engine: EngineConfig, *, compiled: bool) -> bool:
    """True if CUDA graphs are used. Default: if blocks are compiled for a GPU and weights stay at their addresses.

    With float8 they are off by default, because the combination is untested.
    """
    if engine.cuda_graphs is not None:
        return engine.cuda_graphs
    return compiled and engine.zero_stage < 3 and not engine.offload_optimizer and not engine.float8


def _shapes(model: JiT, engine: EngineConfig, *, aligned: bool, training: bool) -> Shapes:
    config, feed_forward = model.config, [block.mlp for block in cast(list[Block], list(model.blocks))]
    arithmetic = torch.float32 if engine.precision == "fp32" else torch.bfloat16
    return Shapes(
        grid=config.image_size // config.patch_size,
        prefix=config.in_context_len,
        routed=routed_tokens(config) if training and routed_blocks(config) else 0,
        heads=config.num_heads,
        head_dim=config.hidden_size // config.num_heads,
        inner=swiglu_width(config.hidden_size) + (feed_forward[0].padding if aligned else 0),
        dropouts=[layer.drop.p if training else 0.0 for layer in feed_forward],
        dtype=arithmetic,
        weight_dtype=torch.bfloat16 if engine.precision == "bf16" else torch.float32,
    )


def _compile(forward: Forward, *, training: bool) -> Forward:
    """Compile the forward pass: one graph without breaks for each shape; blocks of the same shape share it.

    In training the batch size is static, because there is only one. In sampling it is dynamic, because the last batch
    may be smaller. The number of tokens is always static: torch would make it dynamic at the second length that it
    sees, and code for any length is slower. Only `forward` is compiled: ZeRO-3's hooks, which gather the weights, stay
    outside.
    """
    limits = torch._dynamo.config
    limit = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # the latter in torch 2.6
    setattr(limits, limit, max(GRAPHS, getattr(limits, limit)))
    dynamic = False if training else None
    compiled = torch.compile(forward, fullgraph=True, dynamic=dynamic, backend=_with_parameters_anywhere)
    if training:
        return compiled

    def call(x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        for tensor in (x, rope):
            torch._dynamo.mark_static(tensor, 1)
        if len(x) > 1:  # torch always makes a separate graph for a batch of one
            for tensor in (x, condition):
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(x, condition, rope)

    return call


def _with_parameters_anywhere(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile with Inductor, without its assumption that all blocks' parameters are aligned like the first block's.

    Blocks share a graph. Inductor treats parameters as static inputs, and decides at compile time whether it may read
    16 bytes at once. In ZeRO's flat buffers the same parameter of another block can be unaligned; then the GPU stops
    with "misaligned address". If an input is not static, Inductor checks it in every call and copies it if it is
    unaligned. The backward pass has no such check: `training.optim.parameter_groups` aligns the parameters that it
    reads.
    """
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 (slow, and needed for compilation only)

    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.get("tensor_dict", {}).pop("_dynamo_static_input_type", None)
    return compile_fx(graph, inputs)  # type: ignore[return-value]
