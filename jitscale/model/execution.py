"""How the network computes on a device: attention's kernel, aligned widths, float8, compilation, CUDA graphs.

What it computes stays, and nothing here is part of a checkpoint: parameters keep their names and shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from jitscale.config import EngineConfig
from jitscale.errors import ConfigError
from jitscale.model.attention import KERNELS, ChosenKernel, choose_kernel
from jitscale.model.flops import image_tokens
from jitscale.model.jit import Block, JiT
from jitscale.model.layers import Product, in_arithmetic_of

# Of one code object: two lengths, with and without dropout and gradients; batches of one and of more, or in training
# each size of a batch.
GRAPHS = 32
FLOAT8_WIDTH = 16  # what both sides of a float8 product must be multiples of
WARM_UPS = 3  # passes before a CUDA graph is recorded: what is compiled or tuned at first use must not be recorded

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

    def __str__(self) -> str:
        chosen = self.attention
        kernel = f"attention {chosen.name} ({chosen.version}; {chosen.reason})"
        on = {"feed-forward widths padded": self.aligned, "float8": self.float8, "blocks compiled": self.compiled}
        return ", ".join([kernel, *(name for name in on if on[name])])


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


def float8_product(device: torch.device) -> Product:
    """x (..., K), weight (M, K), bias (M,) -> (..., M), as torch.nn.functional.linear, by torchao; on CPUs emulated.

    Every row of both factors has its own scale, from its largest element. For GPUs from Hopper on, and for the products
    of the attention and feed-forward layers, nearly all of the network's work; sums, norms, modulation and the two ends
    of the network stay as they are. Raises a ConfigError if torchao is missing, or the GPU has no float8.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ConfigError(f"engine.float8=true: {torch.cuda.get_device_name(device)} has no float8; set it to false")
    try:
        from torchao.float8.config import Float8LinearConfig  # noqa: PLC0415  # an extra
        from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args  # noqa: PLC0415
    except ImportError as error:
        remedy = "pip install 'jitscale[float8]', or remove it"
        raise ConfigError(f"engine.float8=true: torchao cannot be imported ({error}); {remedy}") from error
    config = Float8LinearConfig.from_recipe_name("rowwise")
    if device.type != "cuda":
        object.__setattr__(config, "emulate", True)
    products = Float8Linear(FLOAT8_WIDTH, FLOAT8_WIDTH, config=config, device="meta").linear_mm_config

    def product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = in_arithmetic_of(x, x)
        out = matmul_with_hp_or_float8_args.apply(x, in_arithmetic_of(x, weight).t(), products, config)
        return out + bias.to(out.dtype)

    return product


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor


class CudaGraphs:
    """A network's forward pass as one CUDA graph for each batch size: the host starts it whole, not kernel by kernel.

    Stands in for `forward`, without gradients; recorded at the first batch of a size, replayed at all others. The
    weights must stay where they are. Each recorded size holds its activations.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recorded: dict[tuple[int, bool], _Recorded] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (B, 3, height, width) for z of that shape, t and y (B,), in memory of its own."""
        key = (len(z), torch.is_autocast_enabled("cuda"))
        if key not in self._recorded:
            self._recorded[key] = self._record(z, t, y)
        graph, inputs, output = self._recorded[key]
        for kept, given in zip(inputs, (z, t, y), strict=True):
            kept.copy_(given)
        graph.replay()
        return output.clone()

    def _record(self, z: Tensor, t: Tensor, y: Tensor) -> _Recorded:
        inputs = (z.clone(), t.clone(), y.clone())
        # Weights that autocast has cast are forgotten when its region ends, and a graph would go on reading them.
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self._forward(*inputs)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self._forward(*inputs)
        return _Recorded(graph, inputs, output)
