"""A network's blocks in training as CUDA graphs: the host launches one graph for a block's pass, not each kernel.

The first micro-batch runs without graphs, so that compilation and tuning at first use are not captured. Before the
second one, the forward passes of all blocks are captured in their order, then their backward passes in reverse order.

All graphs share one memory pool. As without graphs, the memory that a block has saved for its backward pass is reused
after it. Therefore the order in time must be that of the capture: one forward pass of all blocks, then one backward
pass. Gradients must be used or copied before the next forward pass.

Parameters are inputs of a block, and their gradients are outputs of its backward graph. Therefore the hooks of
parameters, which reduce gradients in ZeRO, run outside the graphs.

Operations between blocks stay outside too: routing of tokens, in-context tokens, the middle output layer. They may read
a block's output until the next forward pass.

Shapes: B images of a micro-batch, N tokens, C hidden size, D head dim.
"""

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from jitscale.errors import ConfigError
from jitscale.model.cuda_graphs import CAPTURE_MODE, WARM_UPS

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]  # see `Block.forward`


class TrainingGraphs:
    """Replaces `forward` of a network's `blocks`.

    Graphs run in training mode with gradients enabled, for the first batch size that comes twice in a row. Any other
    pass runs without graphs. If the number of routed tokens changes, the graphs are captured again. Dropout follows
    torch's generator of the device, bit by bit as without graphs.
    """

    def __init__(self, network: nn.Module, *, recomputed: Collection[int], accumulate: bool) -> None:
        """A block whose index is in `recomputed` saves nothing: its backward pass runs its forward pass again.

        With `accumulate`, gradients stay in use during later passes; therefore the first ones are copied out of the
        pool.
        """
        self._blocks = list(cast(nn.ModuleList, network.blocks))
        self._forwards: list[Forward] = [block.forward for block in self._blocks]
        self._ordinary = [
            partial(checkpoint, forward, use_reentrant=False) if index in recomputed else forward
            for index, forward in enumerate(self._forwards)
        ]
        self._recomputed, self._accumulate = frozenset(recomputed), accumulate
        self._passing: int | None = None  # tokens of an image that pass the routed blocks; None: all
        self._signature: tuple[object, ...] = ()  # shapes and dtypes of the batch in `_seen`, which is captured next
        self._seen: list[_Seen] = []
        self._last: ReferenceType[Tensor] | None = None  # the output of the previous block
        self._graphs: list[_BlockGraphs] = []
        self._pass = _Pass()
        self._replays = self._learns = False  # in the current pass
        for index, block in enumerate(self._blocks):
            block.forward = partial(self._call, index)
        network.register_forward_pre_hook(self._before_pass, with_kwargs=True)

    def release(self) -> None:
        """Free the graphs and their memory, between two steps. The next pass captures them again."""
        if self._graphs:
            self._graphs = []
            gc.collect()
            torch.cuda.empty_cache()

    def _before_pass(self, network: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Release the graphs if the number of routed tokens changes, before new memory is allocated.

        A hook is needed, because the first block does not see that number. Its arguments are those of `JiT.forward`.
        """
        if not self._captures():
            return
        kept = named.get("kept", arguments[3] if len(arguments) > 3 else None)
        passing = None if kept is None else kept.shape[1]
        if passing != self._passing:
            self.release()
            self._passing, self._signature, self._seen = passing, (), []

    def _captures(self) -> bool:
        return self._blocks[0].training and torch.is_grad_enabled()

    def _call(self, index: int, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        if index == 0:
            self._begin_pass(x, condition)
        if self._replays:
            graphs = self._graphs[index]
            replayed: Tensor = _Replay.apply(graphs, x, condition, rope, *graphs.parameters)
            return replayed
        out: Tensor = self._ordinary[index](x, condition, rope)
        if self._learns:
            follows = self._last is not None and self._last() is x
            self._seen.append(_Seen(_shape_of(x), _shape_of(condition), rope, follows))
            self._last = ref(out)
        return out

    def _begin_pass(self, x: Tensor, condition: Tensor) -> None:
        """Decide whether all blocks replay, capture or run without graphs in this pass."""
        self._replays = self._learns = False
        if not self._captures():
            return
        about = [(t.shape, t.stride(), t.dtype, t.requires_grad) for t in (x, condition)]
        signature = (*about, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        if not self._graphs and signature == self._signature and len(self._seen) == len(self._blocks):
            try:
                self._graphs = self._capture(x.device)
            except torch.OutOfMemoryError as error:
                remedy = "set engine.cuda_graphs=false, or lower engine.micro_batch_size"
                raise ConfigError(f"CUDA graphs of the blocks do not fit into this GPU's memory; {remedy}") from error
        if self._graphs:
            self._replays = signature == self._signature
            self._pass.number += self._replays
        else:
            self._signature, self._seen, self._last, self._learns = signature, [], None, True

    def _capture(self, device: torch.device) -> "list[_BlockGraphs]":
        generator = torch.cuda.default_generators[device.index]
        state = generator.get_state()
        seen, aside, pool = self._seen, torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            # All blocks read one condition. A block writes to the next block's input, unless operations lie between.
            condition = _Shared(torch.zeros_like(seen[0].condition, device=device))
            # Rotations (2, N, D) are the network's own table and do not move. Rotations for each image (2, B, N, D)
            # change, so they need a buffer.
            ropes = {id(s.rope): _Shared(s.rope if s.rope.dim() == 3 else torch.zeros_like(s.rope)) for s in seen}
            graphs: list[_BlockGraphs] = []
            for index, each in enumerate(seen):
                # For the warm-up, a block that follows another one directly may share its input.
                x = graphs[-1].x if each.follows and graphs else torch.zeros_like(each.x, device=device)
                made = _BlockGraphs(
                    self._blocks[index],
                    self._forwards[index],
                    each,
                    x,
                    condition,
                    ropes[id(each.rope)],
                    recomputed=index in self._recomputed,
                    accumulate=self._accumulate,
                    shared=self._pass,
                )
                made.warm_up()
                graphs.append(made)
            # The first pass has left its activations in the allocator's cache; the pool needs the same amount again.
            # Besides, garbage collection of a graph during a capture would break the capture.
            gc.collect()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            out: Tensor | None = None
            for made in graphs:
                if made.seen.follows and out is not None:
                    made.x = out
                out = made.capture_forward(pool)
            gradient: Tensor | None = None
            for made in reversed(graphs):
                gradient_of_x = made.capture_backward(pool, gradient)
                gradient = gradient_of_x if made.seen.follows else None
        torch.cuda.current_stream(device).wait_stream(aside)
        generator.set_state(state)
        return graphs


class _Seen(NamedTuple):
    """The inputs of a block in the first pass."""

    x: Tensor  # shape, strides and dtype only
    condition: Tensor  # shape, strides and dtype only
    rope: Tensor  # the tensor itself
    follows: bool  # whether x is the output of the previous block


@dataclass
class _Pass:
    """A pass through all blocks."""

    number: int = 0


@dataclass
class _Shared:
    """An input that several blocks read in a pass; it is copied once."""

    memory: Tensor  # the tensor that the graphs read
    copied: ReferenceType[Tensor] | None = None

    def copy(self, given: Tensor) -> None:
        lies_there = given.data_ptr() == self.memory.data_ptr()
        if not lies_there and (self.copied is None or self.copied() is not given):
            self.memory.copy_(given)
            self.copied = ref(given)


@dataclass
class _BlockGraphs:
    """The graphs of one block, and the tensors that they read and write."""

    block: nn.Module
    run: Forward
    seen: _Seen
    x: Tensor  # (B, N, C)
    condition: _Shared  # (B, C)
    rope: _Shared  # (2, N, D), or (2, B, N, D) in routed blocks
    recomputed: bool
    accumulate: bool
    shared: _Pass
    offset: int = 0  # offset of the generator before the last forward pass
    _open: tuple[Tensor, list[Tensor]] | None = None  # the output and its leaves, between the two captures

    def __post_init__(self) -> None:
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        slots = [(m, name) for m in self.block.modules() for name, p in m.named_parameters(recurse=False)]
        self.slots: list[tuple[nn.Module, str]] = slots
        self.parameters = [module.get_parameter(name) for module, name in slots]
        self.addresses = [p.data_ptr() for p in self.parameters]
        self.generator = torch.cuda.default_generators[self.x.device.index]

    def warm_up(self) -> None:
        """Run forward and backward passes outside of graphs, without touching parameters' gradients or hooks."""
        for _ in range(WARM_UPS):
            out, leaves = self._traced()
            self._differentiated(out, leaves, torch.zeros_like(out))

    def capture_forward(self, pool: Any) -> Tensor:
        """Capture the forward pass; returns the output tensor that the graph writes."""
        with _captured(self.forward, pool):
            out, leaves = self._traced()
        self.out = out.detach()
        self._open = None if self.recomputed else (out, leaves)
        return self.out

    def capture_backward(self, pool: Any, gradient: Tensor | None) -> Tensor | None:
        """Capture the backward pass; returns the gradient of x that the graph writes.

        `gradient` is the output's gradient that the next block's graph writes; None: a new tensor is allocated for it.
        """
        self.gradient = torch.zeros_like(self.out) if gradient is None else gradient
        with _captured(self.backward, pool):
            out, leaves = self._open or self._traced()
            found = self._differentiated(out, leaves, self.gradient)
            # In the parameters' layout, so that autograd does not copy them.
            self.gradients = [None if g is None else g.contiguous() for g in found]
        self._open = None  # frees its activations for the previous blocks
        return self.gradients[0]

    def replay_forward(self, x: Tensor, condition: Tensor, rope: Tensor) -> Tensor:
        """Replay the forward pass; returns the output (B, N, C), which the next pass overwrites."""
        if self.addresses != [p.data_ptr() for p in self.parameters]:
            raise RuntimeError("CUDA graphs: weights have moved since the capture")
        if x.data_ptr() != self.x.data_ptr():
            self.x.copy_(x)
        self.condition.copy(condition)
        self.rope.copy(rope)
        if self.recomputed:
            self.offset = self.generator.get_offset()
        self.forward.replay()
        return self.out.detach()

    def replay_backward(self, gradient: Tensor) -> list[Tensor | None]:
        """Replay the backward pass; returns the gradients of x, the condition and the parameters.

        The next pass overwrites them.
        """
        if not self.accumulate and any(p.grad is not None for p in self.parameters):
            raise RuntimeError("CUDA graphs: gradients of the previous pass are still in use")
        if gradient.data_ptr() != self.gradient.data_ptr() or gradient.stride() != self.gradient.stride():
            self.gradient.copy_(gradient)
        if self.recomputed:  # the same dropout again
            offset = self.generator.get_offset()
            self.generator.set_offset(self.offset)
            self.backward.replay()
            self.generator.set_offset(offset)
        else:
            self.backward.replay()
        # If autograd holds the only reference to a tensor, it makes the tensor the parameter's gradient without a copy,
        # and accumulates later gradients in it.
        found = [None if g is None else g.detach() for g in self.gradients]
        if self.accumulate:
            first = [p.grad is None for p in self.parameters]
            taken = [g for g, of_first in zip(found[2:], first, strict=True) if g is not None and of_first]
            copies = [torch.empty_like(g) for g in taken]
            if copies:
                torch._foreach_copy_(copies, taken)
            left = iter(copies)
            found[2:] = [
                next(left) if g is not None and of_first else g for g, of_first in zip(found[2:], first, strict=True)
            ]
        return found

    def _traced(self) -> tuple[Tensor, list[Tensor]]:
        """Run the block; returns the output and its leaves: x, the condition, and aliases of the parameters.

        Aliases, because gradients of the parameters themselves would pass through autograd nodes of another stream, and
        call hooks.
        """
        leaves = [self.x.detach(), self.condition.memory.detach()]
        for leaf, like in zip(leaves, (self.seen.x, self.seen.condition), strict=True):
            leaf.requires_grad_(like.requires_grad)
        aliases = [nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in self.parameters]
        with _replaced(self.slots, aliases):
            out = self.run(leaves[0], leaves[1], self.rope.memory)
        # A later pass must not use weights that autocast has cast in this one. The cache cannot be disabled, because
        # then the blocks would be compiled again.
        torch.clear_autocast_cache()
        return out, [*leaves, *aliases]

    @staticmethod
    def _differentiated(out: Tensor, leaves: list[Tensor], gradient: Tensor) -> list[Tensor | None]:
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, gradient, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]


class _Replay(torch.autograd.Function):
    """A block's pass as an autograd function."""

    @staticmethod
    def forward(
        ctx: Any, graphs: _BlockGraphs, x: Tensor, condition: Tensor, rope: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.graphs, ctx.number = graphs, graphs.shared.number
        return graphs.replay_forward(x, condition, rope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.number != ctx.graphs.shared.number:
            raise RuntimeError("CUDA graphs: a later forward pass has overwritten the activations of this one")
        of_x, of_condition, *of_parameters = ctx.graphs.replay_backward(gradient)
        return None, of_x, of_condition, None, *of_parameters


def _shape_of(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)


@contextmanager
def _replaced(slots: Sequence[tuple[nn.Module, str]], parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Replace parameters of modules in the body of the `with` statement."""
    own: list[nn.Parameter | None] = [module._parameters[name] for module, name in slots]
    try:
        for (module, name), parameter in zip(slots, parameters, strict=True):
            module._parameters[name] = parameter
        yield
    finally:
        for (module, name), kept in zip(slots, own, strict=True):
            module._parameters[name] = kept


@contextmanager
def _captured(graph: torch.cuda.CUDAGraph, pool: Any) -> Iterator[None]:
    """Capture the body of the `with` statement. Unlike torch.cuda.graph, it does not wait and empty the cache."""
    graph.capture_begin(pool=pool, capture_error_mode=CAPTURE_MODE)
    try:
        yield
    finally:
        graph.capture_end()
