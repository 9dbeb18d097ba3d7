"""Host time of a step: the time that a rank's processor needs to launch the work of a step on its GPU.

It depends on the depth of the network, but not on its width or on the number of images per GPU. So a GPU with few
images waits for its host. Launches (kernels, graphs, copies, collectives) were counted on two ranks with torch 2.11 and
DeepSpeed 0.19.8 on a null CUDA, which executes nothing, 2026-11-27; tests/planner/test_host.py has the counts. Times
were measured on one H200 machine, 2026-11-27; docs/performance.md describes it. A single rank, which gathers its
gradients at once, needs less.
"""

from dataclasses import dataclass

from jitscale.config import Config, EngineConfig, routed_blocks
from jitscale.model.execution import wants_graphs

# Time of one launch on that machine. If the launched work is shorter, the GPU is idle.
LAUNCH_SECONDS = 10e-6
# Launches outside of the blocks: of a micro-batch, and of the update with three averages.
OUTER_PASSES, UPDATE = 118, 136
ROUTED, MIDDLE = 39, 51  # additional launches of a micro-batch with routed tokens, and with a middle output layer
GATHERED = 46  # additional launches of each block in stage 3, which gathers weights one by one


@dataclass(frozen=True)
class Way:
    """The host's work for one block: its passes and the reduction of its gradients."""

    launches: int
    recomputed: int  # additional launches if the block is computed again
    seconds: float  # time between the launches: Python, autograd, DeepSpeed's hooks of each parameter


# An upper bound, fitted to JiT-B at 64 images and JiT-L at 32. There, GPU and host may both have limited the step.
GRAPHS = Way(27, 1, 2.1e-3)
# Fitted to JiT-H at 64 images with fused kernels, where the host limits the step. EAGER's time was not measured.
COMPILED, EAGER = Way(72, 19, 5.5e-3), Way(102, 25, 5.5e-3)


def way_of(engine: EngineConfig) -> Way:
    """The `Way` in which blocks run on GPUs."""
    compiled = engine.compile is not False  # None is true on GPUs
    if engine.zero_stage < 3 and wants_graphs(engine, compiled=compiled):
        return GRAPHS
    return COMPILED if compiled else EAGER


def launches(config: Config, micro_batches: int) -> int:
    """Launches of one optimizer step of a rank on a GPU, with `micro_batches` micro-batches."""
    engine, depth = config.engine, config.model.depth
    way = way_of(engine)
    again = len(range(0, depth, engine.activation_checkpointing)) if engine.activation_checkpointing else 0
    of_a_block = way.launches + (GATHERED if engine.zero_stage == 3 else 0)
    outer = OUTER_PASSES + (ROUTED if routed_blocks(config.model) else 0)
    outer += MIDDLE if config.model.middle_head > 0 else 0
    return micro_batches * (depth * of_a_block + again * way.recomputed + outer) + UPDATE
