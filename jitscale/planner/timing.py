"""Communication and time of a step, counted from shapes with rates that were measured on one GPU machine.

The utilisation (`MFU`) and the host time (`planner/host.py`) are fitted to steps on one H200 machine, 2026-11-27; see
docs/performance.md. Communication between GPUs was not measured.
"""

import math
from dataclasses import dataclass

from jitscale.config import Config
from jitscale.model.flops import TRAINING_PASSES, mean_training_flops
from jitscale.planner.host import LAUNCH_SECONDS, launches, way_of
from jitscale.planner.memory import WEIGHT_BYTES, parameter_shapes

# Share of the data sheet's peak, with the EMA. Measured on one H200 at 64 images: 0.38 (JiT-L), 0.40 (H), 0.43 (G).
MFU = 0.39


@dataclass(frozen=True)
class Cluster:
    """The machines of a planned run, and the communication of its ranks. Bandwidths are bytes/s in one direction."""

    gpus: int  # ranks of the run
    gpu_memory: float  # bytes of one GPU
    gpus_per_node: int = 8  # GPUs behind one fast interconnect
    intra: float = 450e9  # bandwidth of one GPU to the others of its node
    inter: float = 50e9  # bandwidth of one GPU's share of its node's network
    peak: float = 989e12  # bf16 FLOP/s of one GPU, from its data sheet
    mfu: float = MFU  # fraction of `peak` that a step's products reach, without communication and waiting
    # Fraction of `gpu_memory` for uses that are not counted: CUDA context, communicators, workspaces, gradients of
    # activations, fragmentation.
    margin: float = 0.1
    hpz: bool = False  # in stage 3 each node keeps a second whole copy of the weights (ZeRO++)
    overlap: bool = True  # stages 0 to 2 reduce gradients during backward
    launch: float = LAUNCH_SECONDS  # host time of one launch
    host: float | None = None  # measured host time of a step with one micro-batch; None: it is estimated

    def collective_seconds(self, size: float, *, within_node: bool = False) -> float:
        """Time of one all-gather or reduce-scatter of `size` bytes (the whole tensor, not a rank's part).

        Each of n GPUs receives (n - 1)/n of the bytes over its own link. With rings through every network card, each of
        m nodes receives (m - 1)/m of the bytes through the cards of all its GPUs. The slower of the two determines the
        time. Latency is ignored.
        """
        if within_node or self.gpus <= self.gpus_per_node:
            return _ring(min(self.gpus, self.gpus_per_node)) * size / self.intra
        between = _ring(-(-self.gpus // self.gpus_per_node)) * size / (self.inter * self.gpus_per_node)
        return max(_ring(self.gpus) * size / self.intra, between)


@dataclass(frozen=True)
class Communication:
    """One optimizer step's traffic and time on one rank; times are seconds."""

    bytes: float  # sent by one rank: (n - 1)/n of each gathered or scattered tensor, twice that of an all-reduced one
    seconds: float  # time of all collectives in sequence
    exposed: float  # time in which the GPUs wait for communication
    after_step: float  # part of `exposed` that no batch can hide: the gather of new weights after the update
    # Fewest images per GPU whose forward and backward passes can hide the communication; None if none is hidden.
    hiding_batch: int | None


def communication(config: Config, cluster: Cluster) -> Communication:
    """Traffic of one optimizer step, its time, and the part that computation cannot hide.

    Weights and gradients are sent in float32 (fp32, autocast) or in bf16 (bf16). Stages 0, 1 and 2 all-reduce
    gradients: DeepSpeed 0.19.8 does so in stages 1 and 2 too (`use_multi_rank_bucket_allreduce`), at twice the cost of
    a reduce-scatter. Stages 0 and 1 do it once per step, stage 2 in every micro-batch. Stages 1 and 2 gather the new
    weights after the update. Stage 3 gathers the weights in forward and again in backward, and reduce-scatters
    gradients, in every micro-batch. With `hpz` (ZeRO++), the gather of backward stays within a node.

    The model of overlap: communication runs at the same time as computation and does not slow it. It is divided into as
    many equal pieces as there are blocks, and the first piece cannot overlap. With c seconds of communication and t
    seconds of computation in d pieces, max(c/d, c - t (d - 1)/d) is exposed. Backward hides the reduction of gradients
    and the second gather of stage 3; forward hides the first gather of stage 3. The gather after the update is never
    hidden. In stages 0 to 2 without `overlap`, and in stage 1 with bf16, whose reduction comes after backward, no
    communication is hidden.
    """
    stage, precision, d, n = config.engine.zero_stage, config.engine.precision, config.model.depth, cluster.gpus
    if n == 1:
        return Communication(0.0, 0.0, 0.0, 0.0, 1)
    share = config.data.batch_size // n
    micro_batch = config.engine.micro_batch_size or share
    micro_batches = share // micro_batch
    size = float(WEIGHT_BYTES[precision] * sum(math.prod(shape) for shape in parameter_shapes(config.model).values()))
    gather = cluster.collective_seconds(size)
    forward, backward = pass_seconds(config, cluster, 1)
    if stage == 3:
        group = min(n, cluster.gpus_per_node) if cluster.hpz else n
        gather_and_scatter = cluster.collective_seconds(size, within_node=cluster.hpz) + gather
        exposed = _exposed(gather, forward * micro_batch, d) + _exposed(gather_and_scatter, backward * micro_batch, d)
        return Communication(
            bytes=micro_batches * size * (2 * _ring(n) + _ring(group)),
            seconds=micro_batches * (gather + gather_and_scatter),
            exposed=micro_batches * exposed,
            after_step=0.0,
            hiding_batch=max(1, math.ceil(gather / forward), math.ceil(gather_and_scatter / backward)),
        )
    reductions = micro_batches if stage == 2 else 1
    after_step = gather if stage > 0 else 0.0
    overlaps = cluster.overlap and not (stage == 1 and precision == "bf16")
    exposed = _exposed(2 * gather, backward * micro_batch, d) if overlaps else 2 * gather
    return Communication(
        bytes=(2 * reductions + (stage > 0)) * _ring(n) * size,
        seconds=2 * reductions * gather + after_step,
        exposed=reductions * exposed + after_step,
        after_step=after_step,
        hiding_batch=max(1, math.ceil(2 * gather / backward)) if overlaps else None,
    )


def host_seconds(config: Config, cluster: Cluster) -> float:
    """Seconds that a rank's host needs to launch an optimizer step. They do not depend on the size of a micro-batch."""
    share = config.data.batch_size // cluster.gpus
    micro_batches = share // (config.engine.micro_batch_size or share)
    if cluster.host is not None:
        return micro_batches * cluster.host
    blocks = micro_batches * config.model.depth * way_of(config.engine).seconds
    return launches(config, micro_batches) * cluster.launch + blocks


def pass_seconds(config: Config, cluster: Cluster, images: int) -> tuple[float, float]:
    """Seconds of forward and of backward for `images` images; backward computes checkpointed blocks again.

    If tokens are routed in a part of the run, the result is the mean over the run.
    """
    depth, every = config.model.depth, config.engine.activation_checkpointing
    forward = mean_training_flops(config) / TRAINING_PASSES * images / (cluster.peak * cluster.mfu)
    recomputed = len(range(0, depth, every)) / depth if every else 0.0
    return forward, forward * (TRAINING_PASSES - 1 + recomputed)


def _ring(n: int) -> float:
    """The share of a tensor that each of `n` ranks sends in a gather or a scatter."""
    return (n - 1) / n


def _exposed(communication: float, computation: float, pieces: int) -> float:
    return max(communication / pieces, communication - computation * (pieces - 1) / pieces)
