"""A network's forward pass as one CUDA graph for each batch size: the host starts it whole, not kernel by kernel.

Shapes: B images of a batch, A channels, S image size.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Forward = Callable[..., Tensor]  # as `JiT.forward` without kept tokens
# Other threads, such as those that fill page-locked memory, may call CUDA while a graph is captured.
CAPTURE_MODE = "thread_local"
WARM_UPS = 3  # passes before recording: what is compiled or tuned at first use must not be recorded


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor]
    output: Tensor


class CudaGraphs:
    """Stands in for `forward`, without gradients; recorded at the first batch of a size, replayed at all others.

    The weights must stay where they are. Each recorded size holds its activations.
    """

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._recorded: dict[tuple[int, bool, bool], _Recorded] = {}

    @torch.no_grad()
    def __call__(self, z: Tensor, t: Tensor, y: Tensor, *, middle: bool = False) -> Tensor:
        """The prediction (B, A, S, S) for z (B, A, S, S), t and y (B,), in memory of its own.

        With `middle`, (2, B, A, S, S): that of the middle output layer too.
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
        # Weights that autocast has cast are forgotten when its region ends, and a graph would go on reading them.
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
