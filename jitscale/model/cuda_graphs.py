"""A network's forward pass as one CUDA graph for each batch size: the host launches the graph, not each kernel.

Shapes: B images of a batch, A channels, S image size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Forward = Callable[..., Tensor]  # as `JiT.forward` without kept tokens
# Other threads, such as those that fill page-locked memory, may call CUDA while a graph is captured.
CAPTURE_MODE = "thread_local"
WARM_UPS = 3  # passes before recording, so that compilation and tuning at first use are not recorded


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor


class CudaGraphs:
    """Replaces `forward`, without gradients: records the first batch of a size, and replays it for later batches.

    The weights must not move in memory. Each recorded size keeps memory for its activations.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recorded: dict[tuple[int, bool, bool], _Recorded] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, y: Tensor, *, middle: bool = False) -> Tensor:
        """The prediction (B, A, S, S) for z (B, A, S, S), t and y (B,), as a new tensor.

        With `middle`, (2, B, A, S, S): the second one is that of the middle output layer.
        """
        key = (len(z), middle, torch.is_autocast_enabled("cuda"))
        if key not in self._recorded:
            self._recorded[key] = self._record(z, t, y, middle=middle)
        graph, inputs, output = self._recorded[key]
        for kept, given in zip(inputs, (z, t, y), strict=True):
            kept.copy_(given)
        graph.replay()
        return output.clone()

    def _record(self, z: Tensor, t: Tensor, y: Tensor, *, middle: bool) -> _Recorded:
        inputs = (z.clone(), t.clone(), y.clone())
        # Without autocast's cache: it is freed at the end of the region, but the graph would still read from it.
        with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self._forward(*inputs, middle=middle)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode=CAPTURE_MODE):
                output = self._forward(*inputs, middle=middle)
        return _Recorded(graph, inputs, output)
