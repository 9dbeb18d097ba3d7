"""Host time of a step: how long the processor of a rank needs to start the work of a step on its GPU.

It depends on the depth of the network and not on its width or the images of a GPU, so a GPU with few images waits.
Launches (kernels, graphs, copies, collectives) were counted on two ranks with torch 2.11 and DeepSpeed 0.19.8 on a CUDA
that executes nothing, 2026-11-27; tests/planner/test_host.py holds the counts. Times are those of one H200 machine,
2026-11-27; docs/performance.md says which. One rank, which gathers its gradients at once, needs less.
"""

from dataclasses import dataclass

from jitscale.config import Config, EngineConfig, routed_blocks
from jitscale.model.execution import wants_graphs

# One launch on that machine. A GPU's work that takes less leaves the GPU idle.
LAUNCH_SECONDS = 10e-6
# Besides the blocks: launches of a micro-batch, and of the update with three averages.
OUTER_PASSES, UPDATE = 118, 136
ROUTED, MIDDLE = 39, 51  # more of a micro-batch where tokens are routed, and with a middle output layer
GATHERED = 46  # more for each block in stage 3, which gathers weights one by one


@dataclass(frozen=True)
class Way:
    """How a block runs, and what the host needs for its passes and the reduction of its gradients."""

    launches: int
    recomputed: int  # launches, more if the block is computed again
    seconds: float  # between the launches: Python, autograd, DeepSpeed's hooks of each parameter


# An upper bound: it is fitted to JiT-B at 64 images and JiT-L at 32, whose steps GPU and host may both have limited.
GRAPHS = Way(27, 1, 2.1e-3)
# Fitted to JiT-H at 64 images with fused kernels, which the host limits. Not compiled: the time was not measured.
COMPILED, EAGER = Way(72, 19, 5.5e-3), Way(102, 25, 5.5e-3)


def way_of(engine: EngineConfig) -> Way:
    """How blocks run on GPUs."""
    compiled = engine.compile is not False  # None is on for GPUs
    if engine.zero_stage < 3 and wants_graphs(engine, compiled=compiled):
        return GRAPHS
    return COMPILED if compiled else EAGER


def launches(config: Config, micro_batches: int) -> int:
    """Launches of an optimizer step of one rank on a GPU, in `micro_batches` micro-batches."""
    engine, depth = config.engine, config.model.depth
    way = way_of(engine)
    again = len(range(0, depth, engine.activation_checkpointing)) if engine.activation_checkpointing else 0
    of_a_block = way.launches + (GATHERED if engine.zero_stage == 3 else 0)
    outer = OUTER_PASSES + (ROUTED if routed_blocks(config.model) else 0)
    outer += MIDDLE if config.model.middle_head > 0 else 0
    return micro_batches * (depth * of_a_block + again * way.recomputed + outer) + UPDATE
