"""Host time of a step: how long the processor of a rank needs to start the work of a step on its GPU.

It depends on the depth of the network and not on its width or the images of a GPU, so a GPU with few images waits.
Launches (kernels, copies, collectives) were counted with torch 2.11 and DeepSpeed 0.19.8 on a CUDA that executes
nothing, 2026-11-27, at depths of 8 to 32; tests/planner/test_host.py holds the counts. Times are those of one H200
machine, 2026-11-26/27.
"""

from jitscale.config import Config

# One launch on that machine. A GPU's work that takes less leaves the GPU idle.
LAUNCH_SECONDS = 10e-6
# What lies between the launches of a block, in forward and backward: Python, autograd, guards of the compiled code,
# DeepSpeed's hooks of each parameter. Fitted to steps of 64 images that the host limits (docs/performance.md): JiT-B
# takes 50 to 68 ms, JiT-L 115 to 117 ms. With the launches that makes 60 and 116 ms.
BLOCK_SECONDS = 3.85e-3

# Of a micro-batch, for each block: in forward and backward, compiled or not, and once more in the forward pass of a
# block that is computed again.
PASSES = {True: 82, False: 238}
RECOMPUTED = {True: 22, False: 79}
BY_PARAMETER = {0: 0, 1: 0, 2: 14, 3: 46}  # more in ZeRO stages that sort gradients, or gather weights, one by one
# Besides the blocks: of a micro-batch, and of the update with three averages.
OUTER_PASSES, UPDATE = 148, 217


def launches(config: Config, micro_batches: int) -> int:
    """Launches of an optimizer step of one rank on a GPU, in `micro_batches` micro-batches."""
    engine, depth = config.engine, config.model.depth
    compiled = engine.compile is not False  # None is on for GPUs
    again = len(range(0, depth, engine.activation_checkpointing)) if engine.activation_checkpointing else 0
    passes = depth * (PASSES[compiled] + BY_PARAMETER[engine.zero_stage]) + again * RECOMPUTED[compiled] + OUTER_PASSES
    return micro_batches * passes + UPDATE
