"""The ways to run a configuration on a cluster, and the one to choose."""

from dataclasses import dataclass, replace

from jitscale.config import Config, image_tokens
from jitscale.planner.memory import Memory, activation_bytes, objective_bytes, state_memory
from jitscale.planner.timing import Cluster, Communication, communication, host_seconds, pass_seconds

BUSY_TOKENS = 2048  # tokens of a micro-batch that keep a GPU's matrix units busy (assumption)
MIN_GAIN = 0.1  # relative difference in step time that matters, of a higher stage or of the host (assumption)
CHECKPOINTING = (0, 4, 2, 1)  # every k-th block; the values that `recommend` tries


@dataclass(frozen=True)
class Candidate:
    """One way to run a configuration on a cluster."""

    stage: int
    micro_batch_size: int
    activation_checkpointing: int
    memory: Memory  # bytes on one rank
    communication: Communication  # traffic of one optimizer step
    compute_seconds: float  # time of one optimizer step, at the given utilisation
    host_seconds: float  # time of the host to launch one optimizer step
    fits: bool  # whether the memory stays below the GPU's, less the margin

    @property
    def gpu_seconds(self) -> float:
        """Time of the GPU for one optimizer step: computation, and waiting for other ranks."""
        return self.compute_seconds + self.communication.exposed

    @property
    def step_seconds(self) -> float:
        """Time of one optimizer step. The host runs ahead of the GPU, so the slower of the two determines it."""
        return max(self.gpu_seconds, self.host_seconds)

    @property
    def host_bound(self) -> bool:
        """True if the GPU waits for the host, by more than the error of the estimates."""
        return self.host_seconds > (1 + MIN_GAIN) * self.gpu_seconds


def candidate(
    config: Config, cluster: Cluster, *, stage: int, micro_batch: int, activation_checkpointing: int = 0
) -> Candidate:
    """The cost of `config` on `cluster`, with this ZeRO stage, micro-batch and checkpointing of every k-th block."""
    settings = replace(
        config.engine,
        zero_stage=stage,
        micro_batch_size=micro_batch,
        activation_checkpointing=activation_checkpointing,
        hpz_group_size=min(cluster.gpus, cluster.gpus_per_node) if cluster.hpz else 1,
    )
    run = replace(config, engine=settings)
    activations = activation_bytes(run, micro_batch) + objective_bytes(run.model, micro_batch)
    memory = replace(state_memory(run, cluster.gpus), activations=activations)
    compute = sum(pass_seconds(run, cluster, run.data.batch_size // cluster.gpus))
    fits = memory.total <= cluster.gpu_memory * (1 - cluster.margin)
    traffic, host = communication(run, cluster), host_seconds(run, cluster)
    return Candidate(stage, micro_batch, activation_checkpointing, memory, traffic, compute, host, fits)


def recommend(config: Config, cluster: Cluster) -> Candidate | None:
    """The fastest way to run that fits into memory; None if there is none.

    It tries stages 1 to 3 (0 is for comparison), all micro-batches that divide a rank's share of the batch, and
    checkpointing of no block, every 4th, every 2nd and all. The best of a stage is the fastest; among equally fast ones
    it is that with the largest micro-batch. Micro-batches below `BUSY_TOKENS` leave a GPU partly idle. The model of
    time ignores this, so they are chosen only if no other one fits. The lowest stage wins that is at most `MIN_GAIN`
    slower than the fastest: a higher stage costs latency and bookkeeping, which the model ignores too. With bf16
    weights, stage 2 is preferred to stage 1, which keeps two whole copies of the gradients and reduces them after
    backward.
    """
    share = config.data.batch_size // cluster.gpus
    enough = min(share, -(-BUSY_TOKENS // image_tokens(config.model)))
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    tried = [
        candidate(config, cluster, stage=stage, micro_batch=micro_batch, activation_checkpointing=every)
        for stage in (1, 2, 3)
        for micro_batch in divisors
        for every in CHECKPOINTING
    ]
    fitting = [option for option in tried if option.fits]
    busy = [option for option in fitting if option.micro_batch_size >= enough] or fitting
    if not busy:
        return None
    fastest = min(option.step_seconds for option in busy)
    order = (2, 1, 3) if config.engine.precision == "bf16" else (1, 2, 3)
    stage = min((option.stage for option in busy if option.step_seconds <= (1 + MIN_GAIN) * fastest), key=order.index)
    own = [option for option in busy if option.stage == stage]
    return min(own, key=lambda option: (round(option.step_seconds, 9), -option.micro_batch_size))


def fewer_gpus(config: Config, cluster: Cluster) -> tuple[Cluster, Candidate] | None:
    """The largest smaller number of GPUs that the host keeps busy with the same batch, and how to run there.

    If the host limits a step, its time does not depend on the number of images per GPU. Then fewer GPUs with more
    images each do the same work in fewer GPU-hours. GPUs are whole nodes, or a part of one node. None if the host does
    not limit the recommendation for `cluster`, or if no smaller number of GPUs is both busy and cheaper.
    """
    here = recommend(config, cluster)
    if here is None or not here.host_bound:
        return None
    for gpus in range(cluster.gpus - 1, 0, -1):
        if config.data.batch_size % gpus or (gpus > cluster.gpus_per_node and gpus % cluster.gpus_per_node):
            continue
        fewer = replace(cluster, gpus=gpus)
        choice = recommend(config, fewer)
        if choice is None or choice.host_bound:
            continue
        if gpus * choice.step_seconds < cluster.gpus * here.step_seconds:
            return fewer, choice
    return None
