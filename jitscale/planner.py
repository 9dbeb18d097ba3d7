"""What a run costs, counted from shapes: operations, memory, communication and time.

Nothing here was measured on a GPU. Tests compare the state's memory with the tensors of CPU ranks, and activations
with what autograd keeps on a CPU.
"""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch

from jitscale.config import Config, ModelConfig
from jitscale.model.flops import TRAINING_PASSES, forward_flops
from jitscale.model.jit import JiT, parameter_kind
from jitscale.model.layers import TIMESTEP_FREQUENCIES, swiglu_width

FP32 = 4  # bytes
WEIGHT_BYTES = {"fp32": 4, "autocast": 4, "bf16": 2}  # of a weight in the forward pass, and on the wire
# DeepSpeed 0.19.8's defaults, in elements (runtime/zero/config.py); engine.py leaves them alone on GPUs.
BUCKET_ELEMENTS = 500_000_000  # reduce_bucket_size
LIVE_ELEMENTS = 1_000_000_000  # stage3_max_live_parameters
PREFETCH_ELEMENTS = 50_000_000  # stage3_prefetch_bucket_size
PERSISTENT_ELEMENTS = 100_000  # stage3_param_persistence_threshold
BUSY_TOKENS = 2048  # a micro-batch that keeps a GPU's matrix units busy: an assumption
WORTH = 0.1  # a higher stage must shorten the step by so much: an assumption
CHECKPOINTING = (0, 4, 2, 1)  # every k-th block; what `recommend` tries


@dataclass(frozen=True)
class Cluster:
    """The machines a run is planned for. Bandwidths are bytes/s in one direction.

    Attributes:
        gpus: ranks of the run.
        gpu_memory: bytes of one GPU.
        gpus_per_node: GPUs behind one fast interconnect.
        intra: bandwidth of one GPU to the others of its node.
        inter: bandwidth of one GPU's share of its node's network.
        peak: bf16 FLOP/s of one GPU, from its data sheet.
        mfu: fraction of `peak` that the network's matrix products reach while nothing is communicated. An assumption.
        margin: fraction of `gpu_memory` left to what is not counted: CUDA context, communicators, workspaces,
            gradients of activations, fragmentation.
    """

    gpus: int
    gpu_memory: float
    gpus_per_node: int = 8
    intra: float = 450e9
    inter: float = 50e9
    peak: float = 989e12
    mfu: float = 0.4
    margin: float = 0.1

    @property
    def nodes(self) -> int:
        """Nodes that the GPUs fill."""
        return -(-self.gpus // self.gpus_per_node)

    def collective_seconds(self, size: float, *, within_node: bool = False) -> float:
        """Time of one all-gather or reduce-scatter of `size` bytes (the whole tensor, not a rank's part).

        Every GPU receives (n - 1)/n of the bytes over its own link, and with rings through every network card every
        node receives (m - 1)/m of them through the cards of its GPUs together; the slower of the two counts.
        Latency is left out.
        """
        local = min(self.gpus, self.gpus_per_node)
        if within_node or self.nodes == 1:
            return _ring(local) * size / self.intra
        inside = _ring(self.gpus) * size / self.intra
        between = _ring(self.nodes) * size / (self.inter * self.gpus_per_node)
        return max(inside, between)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every trainable parameter's shape, from the network itself on the meta device."""
    return _parameter_shapes(astuple(model))


def parameters_by_kind(model: ModelConfig) -> dict[str, int]:
    """Parameters of attention, feed-forward layers, modulation, norms, conditioning and patches; each counted once."""
    counts = dict.fromkeys(("attention", "feed-forward", "modulation", "norms", "conditioning", "patches"), 0)
    for name, shape in parameter_shapes(model).items():
        counts[_kind(name)] += math.prod(shape)
    return counts


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank during backward, where they are at their most.

    The copy of the gradients that the update makes is not counted: buckets and activations are free by then.

    Attributes:
        weights: those of the forward pass; in stage 3 this rank's part and the small ones that stay whole.
        gradients: what backward accumulates, before the optimizer step.
        masters: float32 weights of the optimizer beside `weights`.
        moments: the optimizer's.
        averages: the EMAs.
        buckets: DeepSpeed's communication buffers on a GPU, in stage 3 gathered weights too.
        activations: what the forward pass of a micro-batch keeps for backward.
    """

    weights: float
    gradients: float
    masters: float
    moments: float
    averages: float
    buckets: float = 0.0
    activations: float = 0.0

    @property
    def state(self) -> float:
        """What does not depend on the micro-batch, without buffers."""
        return self.weights + self.gradients + self.masters + self.moments + self.averages

    @property
    def total(self) -> float:
        """Everything counted."""
        return self.state + self.buckets + self.activations


def state_memory(
    model: ModelConfig,
    *,
    stage: int,
    precision: str,
    ranks: int,
    decays: int,
    hpz: int = 1,
    overlap: bool = True,
    muon: bool = False,
) -> Memory:
    """Bytes on one rank of weights, gradients, optimizer state, averages and buffers, without activations.

    The layout is that of DeepSpeed 0.19.8 as engine.py configures it. Sharding is taken as even: the padding of a
    shard to a few bytes is left out.

    Args:
        stage: of ZeRO.
        precision: as `engine.precision`.
        ranks: of the run.
        decays: number of averages.
        hpz: GPUs that hold a second whole copy of the weights among them (ZeRO++, stage 3); 1 for none.
        overlap: DeepSpeed's `overlap_comm`, which doubles the buckets of stages 1 and 2.
        muon: hidden matrices have one moment instead of two.
    """
    sizes = [math.prod(shape) for shape in parameter_shapes(model).values()]
    whole = sum(sizes)
    shard = whole / ranks
    matrices = sum(
        math.prod(shape)
        for name, shape in parameter_shapes(model).items()
        if muon and parameter_kind(name, len(shape)) == "matrices"
    )
    moments_whole = 2 * whole - matrices
    width = WEIGHT_BYTES[precision]
    averages = FP32 * shard * decays
    if stage == 0:
        # Masters are the weights themselves; nothing but the averages is sharded.
        buckets = FP32 * min(whole, BUCKET_ELEMENTS) if ranks > 1 else 0.0
        return Memory(FP32 * whole, FP32 * whole, 0.0, FP32 * moments_whole, averages, buckets)
    masters, moments = FP32 * shard, FP32 * moments_whole / ranks
    if stage == 3:
        kept_whole = sum(size for size in sizes if size <= PERSISTENT_ELEMENTS)
        second_copy = width * whole / hpz if hpz > 1 else 0.0
        gathered = width * min(whole, LIVE_ELEMENTS + PREFETCH_ELEMENTS)
        return Memory(
            width * (shard + kept_whole) + second_copy,
            FP32 * shard,
            masters,
            moments,
            averages,
            width * BUCKET_ELEMENTS + gathered,
        )
    flattened = min(whole, BUCKET_ELEMENTS)  # all-reduced in a copy
    if stage == 1 and precision == "bf16":
        # BF16_Optimizer adds bf16 gradients to whole float32 ones, and reduces them after backward, without buckets.
        return Memory(width * whole, (width + FP32) * whole, masters, moments, averages, (FP32 + width) * flattened)
    # Stage 1 reduces when the last micro-batch is done: until then the gradients are whole.
    gradients = FP32 * (whole if stage == 1 else shard)
    buckets = width * (BUCKET_ELEMENTS * (2 if overlap else 1) + flattened)
    return Memory(width * whole, gradients, masters, moments, averages, buckets)


def activation_bytes(
    model: ModelConfig, micro_batch: int, *, precision: str, activation_checkpointing: int = 0
) -> float:
    """Bytes that one forward pass in training keeps for backward, from shapes, with fused attention.

    Under autocast that includes the bf16 copies of all weight matrices, which backward multiplies by: they are whole
    in stage 3 too. Dropout masks count one byte an element, as on GPUs. A checkpointed block keeps its input; one
    such block at a time is computed again in full.

    Args:
        model: the network.
        micro_batch: images of a forward pass.
        precision: as `engine.precision`.
        activation_checkpointing: every k-th block (0, k, 2k, ...) is checkpointed; 0 for none.
    """
    a = WEIGHT_BYTES["bf16"] if precision != "fp32" else FP32  # bytes of an activation
    width, tokens = model.hidden_size, (model.image_size // model.patch_size) ** 2
    pixels = 3 * model.image_size**2
    kept = recomputed = 0.0
    for index in range(model.depth):
        block = _block_bytes(model, index, a)
        if activation_checkpointing > 0 and index % activation_checkpointing == 0:
            kept += a * _length(model, index) * width
            recomputed = max(recomputed, block)
        else:
            kept += block
    kept += a * (pixels + tokens * model.bottleneck_dim)  # inputs of the two convolutions of the patch embedding
    kept += (2 * FP32 + 2 * a) * _length(model, model.depth - 1) * width  # final layer
    kept += a * (TIMESTEP_FREQUENCIES + 6 * width)  # conditioning
    copies = 0
    if precision == "autocast":
        copies = sum(
            math.prod(shape)
            for name, shape in parameter_shapes(model).items()
            if len(shape) > 1 and "embedding_table" not in name and name != "in_context_posemb"
        )
    return micro_batch * (kept + recomputed) + WEIGHT_BYTES["bf16"] * copies


def objective_bytes(model: ModelConfig, micro_batch: int) -> float:
    """Bytes around the network: image, noise, noisy image, prediction, target and their difference, in float32."""
    return micro_batch * 6 * FP32 * 3 * model.image_size**2


@dataclass(frozen=True)
class Communication:
    """One optimizer step's traffic and time on one rank. Bytes count what a rank sends; times are seconds.

    Attributes:
        bytes: sent by one rank, (n - 1)/n of each tensor that is gathered or scattered, twice that for an all-reduce.
        seconds: of all of it, one after the other.
        exposed: seconds in which the GPUs wait for it.
        after_step: the part of `exposed` that no batch can hide: the new weights are gathered after the update.
        hiding_batch: fewest images a GPU whose forward and backward passes last as long as what they can hide; None
            where nothing is hidden.
    """

    bytes: float
    seconds: float
    exposed: float
    after_step: float
    hiding_batch: int | None


def communication(
    model: ModelConfig,
    cluster: Cluster,
    *,
    stage: int,
    precision: str,
    micro_batch: int,
    micro_batches: int = 1,
    activation_checkpointing: int = 0,
    hpz: bool = False,
    overlap: bool = True,
) -> Communication:
    """Traffic of one optimizer step, its time, and the part that computation cannot hide.

    What is sent: float32 in fp32 and in autocast, bf16 in bf16, both weights and gradients. Stages 0, 1 and 2
    all-reduce gradients (DeepSpeed 0.19.8 does so in stages 1 and 2 too, `use_multi_rank_bucket_allreduce`: twice a
    reduce-scatter), stages 0 and 1 once a step, stage 2 every micro-batch; stages 1 and 2 gather the new weights after
    the update. Stage 3 gathers the weights in forward and again in backward and reduce-scatters gradients, every
    micro-batch; with `hpz` (ZeRO++) the gather of backward stays within a node.

    The model of overlap: communication runs beside computation without slowing it, in as many equal pieces as there
    are blocks; the first piece has nothing to hide behind. With c seconds of communication beside t seconds of
    computation in d pieces, max(c/d, c - t (d - 1)/d) is exposed. Backward hides the reduction of gradients and stage
    3's second gather; forward hides stage 3's first. Nothing hides the gather after the update. Nothing is hidden
    without `overlap` in stages 0-2, nor in bf16 in stage 1, whose reduction comes after backward.
    """
    weight_count = sum(math.prod(shape) for shape in parameter_shapes(model).values())
    size = float(WEIGHT_BYTES[precision] * weight_count)
    n = cluster.gpus
    one_way = cluster.collective_seconds(size)
    forward, backward = _pass_seconds(model, cluster, 1, activation_checkpointing)
    d = model.depth
    if n == 1:
        return Communication(0.0, 0.0, 0.0, 0.0, 1)
    if stage == 3:
        second = cluster.collective_seconds(size, within_node=hpz)
        in_backward = second + one_way
        local = min(n, cluster.gpus_per_node)
        sent = size * (2 * _ring(n) + (_ring(local) if hpz else _ring(n)))
        exposed = _exposed(one_way, forward * micro_batch, d) + _exposed(in_backward, backward * micro_batch, d)
        batch = max(math.ceil(one_way / forward), math.ceil(in_backward / backward))
        return Communication(
            micro_batches * sent, micro_batches * (one_way + in_backward), micro_batches * exposed, 0.0, max(1, batch)
        )
    reductions = micro_batches if stage == 2 else 1
    after_step = one_way if stage > 0 else 0.0
    hides = overlap and not (stage == 1 and precision == "bf16")
    waits = _exposed(2 * one_way, backward * micro_batch, d) if hides else 2 * one_way
    return Communication(
        (2 * reductions + (stage > 0)) * _ring(n) * size,
        2 * reductions * one_way + after_step,
        reductions * waits + after_step,
        after_step,
        max(1, math.ceil(2 * one_way / backward)) if hides else None,
    )


@dataclass(frozen=True)
class Candidate:
    """One way to run a configuration on a cluster.

    Attributes:
        memory: bytes on one rank.
        communication: of one optimizer step.
        compute_seconds: of one optimizer step, at the assumed utilisation.
        fits: whether the memory stays below the GPU's, less the margin.
    """

    stage: int
    micro_batch: int
    activation_checkpointing: int
    memory: Memory
    communication: Communication
    compute_seconds: float
    fits: bool

    @property
    def step_seconds(self) -> float:
        """One optimizer step."""
        return self.compute_seconds + self.communication.exposed

    def overrides(self) -> list[str]:
        """The settings that choose it."""
        return [
            f"engine.zero_stage={self.stage}",
            f"engine.micro_batch_size={self.micro_batch}",
            f"engine.activation_checkpointing={self.activation_checkpointing}",
        ]


def candidate(
    config: Config,
    cluster: Cluster,
    *,
    stage: int,
    micro_batch: int,
    activation_checkpointing: int = 0,
    hpz: bool = False,
    overlap: bool = True,
) -> Candidate:
    """What `config` costs on `cluster` when run so."""
    model, precision = config.model, config.engine.precision
    share = config.data.batch_size // cluster.gpus
    state = state_memory(
        model,
        stage=stage,
        precision=precision,
        ranks=cluster.gpus,
        decays=len(config.ema.decays) + len(config.ema.power_widths),
        hpz=min(cluster.gpus, cluster.gpus_per_node) if hpz else 1,
        overlap=overlap,
        muon=config.optim.name == "muon",
    )
    activations = activation_bytes(
        model, micro_batch, precision=precision, activation_checkpointing=activation_checkpointing
    )
    memory = replace(state, activations=activations + objective_bytes(model, micro_batch))
    traffic = communication(
        model,
        cluster,
        stage=stage,
        precision=precision,
        micro_batch=micro_batch,
        micro_batches=share // micro_batch,
        activation_checkpointing=activation_checkpointing,
        hpz=hpz,
        overlap=overlap,
    )
    fits = memory.total <= cluster.gpu_memory * (1 - cluster.margin)
    compute = sum(_pass_seconds(model, cluster, share, activation_checkpointing))
    return Candidate(stage, micro_batch, activation_checkpointing, memory, traffic, compute, fits)


def stages_of(precision: str) -> tuple[int, ...]:
    """The ZeRO stages that a precision runs in."""
    return (0, 1, 2, 3) if precision == "fp32" else (1, 2, 3)


def recommend(config: Config, cluster: Cluster, *, hpz: bool = False, overlap: bool = True) -> Candidate | None:
    """The fastest way to run that fits; None where none does.

    Tried are stages 1 to 3 (0 is for comparison), all micro-batches that divide a rank's share of the batch, and
    checkpointing of no block, every 4th, every 2nd and all. Of each stage the fastest is taken, of equally fast ones
    that with the largest micro-batch. Micro-batches below `BUSY_TOKENS` leave a GPU idle, which the model of time does
    not see: they are taken only if nothing else fits. Of the stages the lowest wins that is at most `WORTH` slower
    than the fastest, because a higher one costs latency and bookkeeping that the model does not see either.
    """
    share = config.data.batch_size // cluster.gpus
    tokens = (config.model.image_size // config.model.patch_size) ** 2
    enough = min(share, -(-BUSY_TOKENS // tokens))
    best: list[Candidate] = []
    for stage in (1, 2, 3):
        fitting = [
            option
            for micro_batch in _divisors(share)
            for every in CHECKPOINTING
            if (
                option := candidate(
                    config,
                    cluster,
                    stage=stage,
                    micro_batch=micro_batch,
                    activation_checkpointing=every,
                    hpz=hpz,
                    overlap=overlap,
                )
            ).fits
        ]
        if fitting:
            best.append(min(fitting, key=lambda c: (c.micro_batch < enough, round(c.step_seconds, 9), -c.micro_batch)))
    busy = [option for option in best if option.micro_batch >= enough] or best
    if not busy:
        return None
    fastest = min(option.step_seconds for option in busy)
    return next(option for option in busy if option.step_seconds <= (1 + WORTH) * fastest)


def images_of_run(config: Config) -> int:
    """Images until `run.max_images` or `run.max_steps` ends the run."""
    run = config.run
    ends = [run.max_images, None if run.max_steps is None else run.max_steps * config.data.batch_size]
    return min(end for end in ends if end is not None)


@functools.lru_cache
def _parameter_shapes(fields: tuple[Any, ...]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in JiT(ModelConfig(*fields)).named_parameters()}


def _ring(n: int) -> float:
    return (n - 1) / n


def _exposed(communication: float, computation: float, pieces: int) -> float:
    return max(communication / pieces, communication - computation * (pieces - 1) / pieces)


def _pass_seconds(
    model: ModelConfig, cluster: Cluster, images: int, activation_checkpointing: int
) -> tuple[float, float]:
    """Seconds of forward and of backward for `images` images; backward computes checkpointed blocks again."""
    forward = forward_flops(model) * images / (cluster.peak * cluster.mfu)
    again = len(range(0, model.depth, activation_checkpointing)) / model.depth if activation_checkpointing else 0.0
    return forward, forward * (TRAINING_PASSES - 1 + again)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _length(model: ModelConfig, index: int) -> int:
    """Tokens in block `index`."""
    tokens = (model.image_size // model.patch_size) ** 2
    return tokens + (model.in_context_len if index >= model.in_context_start else 0)


def _block_bytes(model: ModelConfig, index: int, a: int) -> float:
    """Bytes that block `index` keeps for one image; `a` is the width of an activation.

    A token keeps, in units of the hidden size: for each of two norms the float32 input and normalised values, output
    and modulated output; for each of two gates what it multiplies; qkv whole (v is a view of it), rotated q and k,
    attention's output; the float32 normalised q and k, and their float32 inputs where those are copies. In units of
    the inner width: gate and value, SiLU of the gate, and the product.
    """
    width, inner, heads = model.hidden_size, swiglu_width(model.hidden_size), model.num_heads
    copied = 2 * FP32 if a < FP32 else 0
    hidden = 2 * (2 * FP32 + 2 * a) + 2 * a + 3 * a + 3 * a + 2 * FP32 + copied
    token = hidden * width + 4 * a * inner + FP32 * (2 + 3 * heads)  # and scales of norms, log-sums of attention
    if index in range(model.depth // 4, model.depth // 4 * 3) and model.proj_dropout > 0:
        token += width + inner  # masks
    return _length(model, index) * token + 9 * a * width


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
