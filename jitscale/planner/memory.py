"""Memory of one rank, counted from shapes.

Tests compare the state's memory with the tensors of CPU ranks, and activations with those that autograd keeps on a CPU.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from jitscale.config import Config, ModelConfig, image_shape, image_tokens, routed_part
from jitscale.model.execution import wants_graphs
from jitscale.model.flops import block_tokens
from jitscale.model.jit import JiT, parameter_kind
from jitscale.model.layers import TIMESTEP_FREQUENCIES, swiglu_width
from jitscale.planner.buckets import reduce_bucket_elements

FP32 = 4  # bytes
WEIGHT_BYTES = {"fp32": 4, "autocast": 4, "bf16": 2}  # bytes per weight in the forward pass, and in communication
# DeepSpeed 0.19.8's defaults, in elements (runtime/zero/config.py).
BUCKET_ELEMENTS = 500_000_000  # reduce_bucket_size on CPUs; on GPUs buckets.py chooses it
LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters
PREFETCH_ELEMENTS = 50_000_000  # stage3_prefetch_bucket_size
PERSISTENT_ELEMENTS = 100_000  # stage3_param_persistence_threshold


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every trainable parameter, from the network on the meta device."""
    fields = vars(model).values()
    return _parameter_shapes(tuple(tuple(value) if isinstance(value, list) else value for value in fields))


def parameters_by_kind(model: ModelConfig) -> dict[str, int]:
    """Number of parameters by kind: attention, feed-forward, modulation, norms, conditioning, patches."""
    counts = dict.fromkeys(("attention", "feed-forward", "modulation", "norms", "conditioning", "patches"), 0)
    for name, shape in parameter_shapes(model).items():
        counts[_kind(name)] += math.prod(shape)
    return counts


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank during backward, where memory use peaks.

    The update makes a copy of the gradients. It is counted only with CUDA graphs: without them, buckets and activations
    are free by then.
    """

    weights: float  # weights for the forward pass; in stage 3 this rank's shard, and small weights that are kept whole
    gradients: float  # accumulated by backward
    masters: float  # the optimizer's float32 weights, next to `weights`
    moments: float  # moments of the optimizer
    averages: float  # the EMA weights
    buckets: float = 0.0  # DeepSpeed's communication buffers on a GPU; in stage 3 also gathered weights
    activations: float = 0.0  # kept by the forward pass of a micro-batch for backward
    graphs: float = 0.0  # additional, if blocks are CUDA graphs, which keep their memory between passes

    @property
    def state(self) -> float:
        """The part that depends neither on the micro-batch nor on buffers."""
        return self.weights + self.gradients + self.masters + self.moments + self.averages

    @property
    def total(self) -> float:
        """The sum of all parts."""
        return self.state + self.buckets + self.activations + self.graphs


def state_memory(config: Config, ranks: int) -> Memory:
    """Bytes on one rank of weights, gradients, optimizer state, averages and buffers, without activations.

    The layout is that of DeepSpeed 0.19.8 as engine.py configures it. Padding of shards (a few bytes) is ignored.
    """
    stage, precision, group = config.engine.zero_stage, config.engine.precision, config.engine.hpz_group_size
    shapes = parameter_shapes(config.model)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    whole = sum(sizes.values())
    shard = whole / ranks
    bucket = reduce_bucket_elements(whole, max(sizes.values()), ranks)
    all_moments = 2 * whole
    if config.optim.name == "muon":  # one moment for each hidden matrix
        all_moments -= sum(sizes[name] for name in shapes if parameter_kind(name, len(shapes[name])) == "matrices")
    width = WEIGHT_BYTES[precision]
    averages = FP32 * shard * (len(config.ema.decays) + len(config.ema.power_widths))
    if stage == 0:
        # The masters are the weights themselves; only the averages are sharded.
        buckets = FP32 * min(whole, BUCKET_ELEMENTS) if ranks > 1 else 0.0
        return Memory(FP32 * whole, FP32 * whole, 0.0, FP32 * all_moments, averages, buckets)
    masters, moments = FP32 * shard, FP32 * all_moments / ranks
    if stage == 3:
        persistent = sum(size for size in sizes.values() if size <= PERSISTENT_ELEMENTS)
        secondary_copy = width * whole / group if group > 1 else 0.0
        weights = width * (shard + persistent) + secondary_copy
        buckets = width * (bucket + min(whole, LIVE_ELEMENTS + PREFETCH_ELEMENTS))
        return Memory(weights, FP32 * shard, masters, moments, averages, buckets)
    if stage == 1 and precision == "bf16":
        flattened = min(whole, BUCKET_ELEMENTS)  # DeepSpeed all-reduces a copy
        # BF16_Optimizer adds bf16 gradients to whole float32 ones, and reduces them after backward, without buckets.
        return Memory(width * whole, (width + FP32) * whole, masters, moments, averages, (FP32 + width) * flattened)
    # Stage 1 reduces gradients after the last micro-batch. Until then they are whole.
    gradients = FP32 * (whole if stage == 1 else shard)
    buckets = width * bucket * 2 if ranks > 1 else 0.0  # one is reduced while the next one fills (training/reducer.py)
    graphs = _graphs_memory(config, sizes, ranks)
    return Memory(width * whole, gradients, masters, moments, averages, buckets, graphs=graphs)


def _graphs_memory(config: Config, sizes: dict[str, int], ranks: int) -> float:
    """Additional memory of the blocks' CUDA graphs in stages 1 and 2: permanent gradients, and the update's copy."""
    engine, share = config.engine, config.data.batch_size // ranks
    if not wants_graphs(engine, compiled=engine.compile is not False):  # None is on for GPUs
        return 0.0
    held = WEIGHT_BYTES[engine.precision] * sum(size for name, size in sizes.items() if name.startswith("blocks."))
    # In stage 1 with one micro-batch, these are the gradients that the optimizer takes.
    once = engine.zero_stage == 1 and engine.micro_batch_size in (None, share)
    return FP32 * sum(sizes.values()) / ranks + (0.0 if once else held)


def activation_bytes(config: Config, micro_batch: int) -> float:
    """Bytes that one forward pass of `micro_batch` images keeps for backward, from shapes, with fused attention.

    Under autocast that includes the bf16 copies of all weight matrices, which backward needs; they are whole in stage 3
    too. Dropout masks count one byte per element, as on GPUs. A checkpointed block keeps its input, and one such block
    at a time is recomputed in full. Routing saves memory only if it lasts to the end of the run.
    """
    model, precision, every = config.model, config.engine.precision, config.engine.activation_checkpointing
    if routed_part(config) < 1:
        model = replace(model, route_share=0.0)
    a = WEIGHT_BYTES["bf16"] if precision != "fp32" else FP32  # bytes of an activation
    width, tokens = model.hidden_size, image_tokens(model)
    kept = recomputed = 0.0
    for index in range(model.depth):
        block = _block_bytes(model, index, a)
        if every > 0 and index % every == 0:
            kept += a * block_tokens(model, index, training=True) * width
            recomputed = max(recomputed, block)
        else:
            kept += block
    pixels = math.prod(image_shape(model))
    kept += a * (pixels + tokens * model.bottleneck_dim)  # inputs of the two convolutions of the patch embedding
    kept += _layer_bytes(model, block_tokens(model, model.depth - 1), a)  # final layer
    if model.middle_head > 0:
        kept += _layer_bytes(model, block_tokens(model, model.middle_head - 1, training=True), a)
    kept += a * (TIMESTEP_FREQUENCIES + 6 * width)  # conditioning
    embeddings = ("y_embedder.embedding_table.weight", "in_context_posemb")  # no matrix product uses them
    matrices = [shape for name, shape in parameter_shapes(model).items() if len(shape) > 1 and name not in embeddings]
    casts = sum(math.prod(shape) for shape in matrices) if precision == "autocast" else 0
    return micro_batch * (kept + recomputed) + WEIGHT_BYTES["bf16"] * casts


def objective_bytes(model: ModelConfig, micro_batch: int) -> float:
    """Bytes around the network: image, noise, noisy image, prediction, target and their difference, in float32.

    The middle layer has a prediction, a target and a difference of its own.
    """
    return micro_batch * (9 if model.middle_head > 0 else 6) * FP32 * math.prod(image_shape(model))


@functools.lru_cache
def _parameter_shapes(fields: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in JiT(ModelConfig(*fields)).named_parameters()}


def _block_bytes(model: ModelConfig, index: int, a: int) -> float:
    """Bytes that block `index` keeps for one image; `a` is the width of an activation.

    In units of the hidden size, a token keeps: for each of two norms the float32 input, the float32 normalised values,
    the output and the modulated output; for each of two gates its input; qkv as a whole (v is a view of it), rotated q
    and k, attention's output; the float32 normalised q and k, and their float32 inputs if these are copies. In units
    of the inner width: gate and value, SiLU of the gate, and the product.
    """
    width, inner, heads = model.hidden_size, swiglu_width(model.hidden_size), model.num_heads
    copied = 2 * FP32 if a < FP32 else 0
    hidden = 2 * (2 * FP32 + 2 * a) + 2 * a + 3 * a + 3 * a + 2 * FP32 + copied
    token = hidden * width + 4 * a * inner + FP32 * (2 + 3 * heads)  # scales of norms, log-sums of attention
    if index in range(model.depth // 4, model.depth // 4 * 3) and model.proj_dropout > 0:
        token += width + inner  # masks
    return block_tokens(model, index, training=True) * token + 9 * a * width


def _layer_bytes(model: ModelConfig, tokens: int, a: int) -> float:
    """Bytes that an output layer keeps for one image."""
    return (2 * FP32 + 2 * a) * tokens * model.hidden_size


def _kind(name: str) -> str:
    if "adaLN" in name:
        return "modulation"
    if "norm" in name:
        return "norms"
    if ".attn." in name:
        return "attention"
    if ".mlp." in name and name.startswith("blocks"):
        return "feed-forward"
    if name.startswith(("x_embedder", "final_layer")):
        return "patches"
    return "conditioning"
