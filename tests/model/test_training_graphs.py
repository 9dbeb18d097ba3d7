"""CUDA graphs of training blocks change no loss and no gradient.

On CPUs graphs are emulated: a capture is a list of operators, and a replay runs them again on the same memory.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jitscale.config import EngineConfig, ModelConfig, image_tokens, routed_tokens
from jitscale.errors import ConfigError
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.model.training_graphs import TrainingGraphs
from tests.support import tiny

CPU = torch.device("cpu")
MODEL = replace(tiny.MODEL, depth=4, in_context_start=2)
# In-context tokens enter inside the route, and the middle layer reads the output of a routed block.
ROUTED = replace(MODEL, depth=5, route_share=0.5, route_blocks=[1, -1], middle_head=2)
ENGINE = EngineConfig(precision="fp32", attention="sdpa", align=False, compile=False)
STEPS = 4


class Recorder(TorchDispatchMode):
    """Records each operator with its arguments and results."""

    def __init__(self, operators: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operators.append((function, args, kwargs or {}, result))
        return result


class EmulatedGraph:
    """An emulated CUDA graph for CPUs."""

    made: ClassVar[list["EmulatedGraph"]] = []

    def __init__(self) -> None:
        self.operators: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0
        self.made.append(self)

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.recorder = Recorder(self.operators)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        self.recorder.__exit__(None, None, None)

    def replay(self) -> None:
        self.replays += 1
        for result, found in self.run():
            if result.data_ptr() != found.data_ptr():
                with torch.autograd._unsafe_preserve_version_counter(result):  # Autograd does not see a replay.
                    result.copy_(found)

    @torch.no_grad()
    def run(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for function, args, kwargs, results in self.operators:
            found = function(*args, **kwargs)
            pairs = zip(tree_leaves(results), tree_leaves(found), strict=True)
            yield from ((a.detach(), b) for a, b in pairs if isinstance(a, torch.Tensor))

    @torch.no_grad()
    def forget(self) -> None:
        """Destroy the results, as other graphs in the same memory would."""
        for _, args, kwargs, results in self.operators:
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
            for t in tree_leaves(results):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                    t.detach().fill_(float("nan") if t.is_floating_point() else 1)


@dataclass
class EmulatedGenerator:
    """torch's generator of the CPU, with the methods of a generator of a GPU."""

    get_state: Any = torch.get_rng_state
    set_state: Any = torch.set_rng_state
    get_offset: Any = torch.get_rng_state
    set_offset: Any = torch.set_rng_state


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[EmulatedGraph]:
    stream = SimpleNamespace(wait_stream=lambda other: None)
    parts: dict[str, Any] = {
        "CUDAGraph": EmulatedGraph,
        "default_generators": {None: EmulatedGenerator()},
        "Stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda device: stream,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "graph_pool_handle": lambda: None,
    }
    for name, part in parts.items():
        monkeypatch.setattr(torch.cuda, name, part)
    monkeypatch.setattr(EmulatedGraph, "made", [])
    return EmulatedGraph


@dataclass
class Run:
    losses: list[torch.Tensor] = field(default_factory=list)
    gradients: list[torch.Tensor] = field(default_factory=list)
    hooks: Counter[str] = field(default_factory=Counter)


def network(device: torch.device, dropout: float, model: ModelConfig = MODEL) -> JiT:
    torch.manual_seed(0)
    net = JiT(replace(model, attn_dropout=dropout, proj_dropout=dropout)).to(device).train()
    # Layers that start at zero would hide errors of the layers below them.
    for name, parameter in net.named_parameters():
        # Small queries and keys would hide errors of the rotations of routed tokens.
        large = model.route_share > 0 and ("q_norm" in name or "k_norm" in name)
        torch.nn.init.normal_(parameter, mean=2.0 if large else 0.0, std=0.05)
    return net


def batch(size: int, device: torch.device, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    z, t = torch.randn(size, 3, 16, 16, generator=generator), torch.rand(size, generator=generator)
    return z.to(device), t.to(device), (torch.arange(size) % 10).to(device)


def kept_tokens(size: int, model: ModelConfig, device: torch.device, step: int) -> torch.Tensor:
    draws = torch.rand(size, image_tokens(model), generator=torch.Generator().manual_seed(step))
    return draws.argsort(1)[:, : routed_tokens(model)].sort(1).values.to(device)


def trained(net: JiT, *, precision: str = "fp32", micro_batches: int = 1, seed: int = 0, routed_steps: int = 0) -> Run:
    """Train a few steps, the first of them with routed tokens.

    Between the steps come an evaluation and a smaller batch.
    """
    device, run = net.pos_embed.device, Run()

    def loss_of(size: int, number: int) -> torch.Tensor:
        z, t, y = batch(size, device, number)
        kept = kept_tokens(size, net.config, device, number) if step < routed_steps else None
        return (net(z, t, y, kept, middle=net.config.middle_head > 0) - z).square().mean()

    for name, parameter in net.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: run.hooks.update([name]))
    for step in range(STEPS):
        torch.manual_seed(100 * seed + step)
        for micro_batch in range(micro_batches):
            for graph in EmulatedGraph.made:
                graph.forget()
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "autocast"):
                loss = loss_of(3, 10 * step + micro_batch)
            loss.backward()
            run.losses.append(loss.detach())
        run.gradients += [p.grad.clone() for p in net.parameters() if p.grad is not None]
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]
                parameter.grad = None
        # Graphs are captured when the same batch comes a second time.
        if step not in (0, routed_steps):
            with torch.no_grad():
                run.losses.append(net.eval()(*batch(3, device, 7)).mean())
            net.train()
            run.losses.append(loss_of(2, 8).detach())
    return run


def both(
    device: torch.device,
    dropout: float,
    recompute: int,
    precision: str,
    micro_batches: int,
    model: ModelConfig = MODEL,
    routed_steps: int = 0,
) -> tuple[Run, Run]:
    found = []
    for graphs in (False, True):
        net = network(device, dropout, model)
        recomputed = [index for index in range(model.depth) if recompute and index % recompute == 0]
        if graphs:
            TrainingGraphs(net, recomputed=recomputed, accumulate=micro_batches > 1)
        found.append(trained(net, precision=precision, micro_batches=micro_batches, routed_steps=routed_steps))
    return found[0], found[1]


def assert_same(plain: Run, graphed: Run, tolerance: float) -> None:
    torch.testing.assert_close(torch.stack(plain.losses), torch.stack(graphed.losses), rtol=tolerance, atol=tolerance)
    for a, b in zip(plain.gradients, graphed.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * (0.1 + float(a.abs().max())))


@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_losses_and_gradients_equal_those_without_graphs(
    emulated: type[EmulatedGraph], precision: str, dropout: float, micro_batches: int, recompute: int
) -> None:
    """The dropout is the same, although all results of graphs are destroyed before the next pass.

    Sums differ in their last bits, because on CPUs they depend on the address of a tensor.
    """
    plain, graphed = both(CPU, dropout, recompute, precision, micro_batches)
    assert_same(plain, graphed, 1e-4)
    assert plain.hooks == graphed.hooks  # The hook of each parameter runs once in a backward pass.
    replays = STEPS * micro_batches - 1  # The first pass runs without graphs.
    assert [graph.replays for graph in emulated.made] == [replays] * 2 * MODEL.depth


ends_early = pytest.mark.parametrize("routed_steps", [0, 2, STEPS])


@ends_early
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize(("precision", "dropout"), [("fp32", 0.0), ("autocast", 0.2)])
def test_routed_tokens_and_a_middle_layer_change_nothing(
    emulated: type[EmulatedGraph],
    precision: str,
    dropout: float,
    micro_batches: int,
    recompute: int,
    routed_steps: int,
) -> None:
    """The rotations of each image change from pass to pass. When routing ends, the graphs are captured again."""
    plain, graphed = both(CPU, dropout, recompute, precision, micro_batches, ROUTED, routed_steps)
    assert_same(plain, graphed, 1e-4)
    assert plain.hooks == graphed.hooks
    of_parts = [steps * micro_batches - 1 for steps in (routed_steps, STEPS - routed_steps) if steps > 0]
    assert [graph.replays for graph in emulated.made] == [n for n in of_parts for _ in range(2 * ROUTED.depth)]


def test_which_blocks_share_memory_with_the_previous_one(emulated: type[EmulatedGraph]) -> None:
    """A block shares its input unless tokens are skipped, return or are added before it. The middle layer only reads.

    Blocks of the same tokens share one memory of the rotations. Without routing, this is the network's table.
    """
    net = network(CPU, 0.0, replace(ROUTED, in_context_start=3))
    graphs = TrainingGraphs(net, recomputed=[], accumulate=False)
    for step in range(2):
        net(*batch(3, CPU, step), kept_tokens(3, ROUTED, CPU, step), middle=True).sum().backward()
        net.zero_grad()
    blocks = graphs._graphs
    assert [block.seen.follows for block in blocks] == [False, False, True, False, False]
    assert blocks[2].x.data_ptr() == blocks[1].out.data_ptr()
    shapes = [tuple(block.rope.memory.shape) for block in blocks]
    assert shapes == [(2, 16, 16), (2, 3, 8, 16), (2, 3, 8, 16), (2, 3, 12, 16), (2, 20, 16)]
    assert blocks[1].rope is blocks[2].rope
    table = net.rope.untyped_storage().data_ptr()
    of_network = [block.rope.memory.untyped_storage().data_ptr() == table for block in blocks]
    assert of_network == [True, False, False, False, True]
    # The rotations are copied once for all blocks that read them.
    copies = []
    for rope in {id(block.rope): block.rope for block in blocks}.values():
        copies.append(rope.copied is not None)
    assert copies == [False, True, True, False]


def test_dropout_follows_the_seed(emulated: type[EmulatedGraph]) -> None:
    runs = []
    for seed in (0, 1):
        net = network(CPU, 0.2)
        TrainingGraphs(net, recomputed=[], accumulate=False)
        runs.append(trained(net, seed=seed))
    first, second = (run.losses[1] for run in runs)  # the loss of the second step, the first one from graphs
    assert not torch.equal(first, second)


def prepared(emulated: type[EmulatedGraph], network: JiT) -> TrainingGraphs:
    """The graphs after two steps. The second step replayed them."""
    graphs = TrainingGraphs(network, recomputed=[], accumulate=False)
    for _ in range(2):
        network(*batch(3, CPU, 0)).sum().backward()
        network.zero_grad()
    assert all(graph.replays == 1 for graph in emulated.made)
    return graphs


def test_an_overwritten_pass_cannot_be_differentiated(emulated: type[EmulatedGraph]) -> None:
    net = network(CPU, 0.0)
    prepared(emulated, net)
    first = net(*batch(3, CPU, 0)).sum()
    net(*batch(3, CPU, 0))
    with pytest.raises(RuntimeError, match="a later forward pass has overwritten"):
        first.backward()


def test_weights_must_keep_their_addresses(emulated: type[EmulatedGraph]) -> None:
    net = network(CPU, 0.0)
    prepared(emulated, net)
    weight = net.blocks[1].get_parameter("mlp.w3.weight")
    weight.data = weight.data.clone()
    with pytest.raises(RuntimeError, match="weights have moved"):
        net(*batch(3, CPU, 0))


def test_gradients_in_use_are_not_overwritten(emulated: type[EmulatedGraph]) -> None:
    net = network(CPU, 0.0)
    prepared(emulated, net)
    net(*batch(3, CPU, 0)).sum().backward()
    with pytest.raises(RuntimeError, match="gradients of the previous pass are still in use"):
        net(*batch(3, CPU, 0)).sum().backward()


def test_released_graphs_are_captured_again(emulated: type[EmulatedGraph]) -> None:
    """A measurement needs the memory. Training continues without a change."""
    net = network(CPU, 0.0)
    graphs = prepared(emulated, net)
    net(*batch(3, CPU, 1)).sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    before = len(emulated.made)
    graphs.release()
    graphs.release()  # Nothing is left to release.
    net(*batch(3, CPU, 1)).sum().backward()
    assert len(emulated.made) == 2 * before
    assert {graph.replays for graph in emulated.made[before:]} == {1}
    found = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_graphs_that_need_too_much_memory_are_refused_with_the_remedy(
    emulated: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network(CPU, 0.0)
    TrainingGraphs(net, recomputed=[], accumulate=False)
    net(*batch(3, CPU, 0)).sum().backward()

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TrainingGraphs, "_capture", full)
    with pytest.raises(ConfigError, match=r"do not fit into this GPU's memory; set engine\.cuda_graphs=false"):
        net(*batch(3, CPU, 0))


def test_graphs_need_a_gpu() -> None:
    engine = replace(ENGINE, cuda_graphs=True)
    with pytest.raises(ConfigError, match=r"engine\.cuda_graphs=true: cpu has none; set it to false, or take a GPU"):
        prepare(JiT(MODEL), engine, CPU, training=True)
    assert not prepare(JiT(MODEL), engine, CPU, training=False).graphs  # Sampling has a setting of its own.


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("recompute", [0, 2])
@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_graphs_change_nothing_on_a_gpu(precision: str, dropout: float, micro_batches: int, recompute: int) -> None:
    """Losses and gradients differ no more than two runs of the same network differ. The dropout is the same."""
    gpu = torch.device("cuda", 0)
    with deterministic():
        plain, graphed = both(gpu, dropout, recompute, precision, micro_batches)
    assert_same(plain, graphed, 1e-4)
    assert plain.hooks == graphed.hooks


@on_a_gpu
@ends_early
def test_routing_in_graphs_on_a_gpu(routed_steps: int) -> None:
    with deterministic():
        plain, graphed = both(torch.device("cuda", 0), 0.2, 2, "autocast", 1, ROUTED, routed_steps)
    assert_same(plain, graphed, 1e-4)


@on_a_gpu
@pytest.mark.parametrize("recompute", [0, 2])
def test_compiled_blocks_as_graphs_on_a_gpu(recompute: int) -> None:
    gpu, found = torch.device("cuda", 0), []
    engine = EngineConfig(attention="sdpa", activation_checkpointing=recompute)
    for graphs in (False, True):
        net = network(gpu, 0.2)
        assert prepare(net, replace(engine, cuda_graphs=graphs), gpu, training=True).graphs == graphs
        found.append(trained(net, precision="autocast"))
    torch.testing.assert_close(torch.stack(found[0].losses), torch.stack(found[1].losses), rtol=1e-2, atol=1e-2)


@on_a_gpu
def test_seeds_change_dropout_on_a_gpu() -> None:
    losses = []
    for seed in (0, 0, 1):
        net = network(torch.device("cuda", 0), 0.2)
        TrainingGraphs(net, recomputed=[], accumulate=False)
        losses.append(trained(net, seed=seed).losses[1])
    assert float((losses[0] - losses[1]).abs()) < 1e-5 < float((losses[0] - losses[2]).abs())
