"""Execution modes do not change the results: compilation, recomputation, CUDA graphs of sampling."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from jitscale.config import OptimConfig, load_config
from jitscale.model import attention, execution
from jitscale.model.attention import KERNELS
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.execution import prepare
from jitscale.model.fused.choice import FusedKernels, Shapes
from jitscale.model.jit import JiT
from jitscale.model.layers import ResidualKernels
from jitscale.training.optim import parameter_groups
from tests.model.networks import CPU, ENGINE, MODEL, ROUTED, Result, assert_same, kept_tokens, network, passes
from tests.support import ROOT

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "autocast"])
def test_cuda_graphs_change_nothing(precision: str) -> None:
    """Batches have two sizes, and the middle layer is on or off.

    Replays get other inputs, inside regions of autocast.
    """
    gpu = torch.device("cuda")
    net = network(replace(ENGINE, precision=precision), replace(MODEL, middle_head=3)).to(gpu).eval()
    graphed = CudaGraphs(net.forward)
    for size in (2, 4, 2, 4):
        z, t, y = torch.randn(size, 3, 16, 16, device=gpu), torch.rand(size, device=gpu), torch.arange(size, device=gpu)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            assert torch.equal(graphed(z, t, y), net(z, t, y))
            assert torch.equal(graphed(z, t, y, middle=True), net(z, t, y, middle=True))


@pytest.mark.parametrize("fused", [False, True])
def test_the_probe_uses_the_networks_layout_of_v(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """With torch's code, v is a part of the product; with the fused kernels, it is a tensor of its own.

    The probe of dropout has the same layout.
    """
    probed, real = [], []

    def recording(kept: list[bool]) -> attention.Kernel:
        def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
            kept.append(v.is_contiguous())
            assert v.stride()[-1] == 1
            return attention.sdpa(q, k, v, dropout)

        return kernel

    def split_heads(qkv: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.contiguous() for x in qkv.unflatten(-1, (3, 2, -1)).unbind(2))

    found = FusedKernels("triton", "", "", split_heads if fused else None)  # type: ignore[arg-type]
    monkeypatch.setattr("jitscale.model.execution.choose_fused", lambda *_: found)
    monkeypatch.setitem(KERNELS, "sdpa", recording(probed))
    model = network(ENGINE, replace(MODEL, attn_dropout=0.2))
    for block in model.blocks:
        block.attn.kernel = recording(real)
    passes(model)
    assert set(probed) == set(real) == {fused}


@pytest.fixture
def half_compiled(monkeypatch: pytest.MonkeyPatch, dynamo: None) -> None:
    """Dynamo makes graphs and their derivatives.

    Inductor, which takes minutes, does not run; tests/versions trains with it.
    """
    compiler = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **rest: compiler(function, **{**rest, "backend": "aot_eager"})
    )


@pytest.mark.parametrize("every", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("half_compiled")
def test_blocks_compile_without_breaks_and_once(every: int) -> None:
    """Three graphs serve all blocks: image tokens alone, with in-context tokens, and with dropout.

    A graph break raises. The graphs have the shapes of the batch. Training has one batch size.
    """
    model = replace(MODEL, attn_dropout=0.2, proj_dropout=0.2)
    engine = replace(ENGINE, activation_checkpointing=every, align=True)
    compiled, eager = network(replace(engine, compile=True), model), network(engine, model)
    for batch, graphs in ((3, 3), (3, 3), (5, 6), (3, 6)):
        assert_same(passes(eager, batch), passes(compiled, batch), 1e-5)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]


@pytest.mark.parametrize("every", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("half_compiled")
def test_routed_blocks_compile_without_breaks_and_once(every: int) -> None:
    """Five graphs: all tokens or routed tokens, each with or without in-context tokens, and with dropout.

    When routing ends, one more is made: all tokens with dropout. A graph break raises.
    """
    model = replace(ROUTED, attn_dropout=0.2, proj_dropout=0.2)
    engine = replace(ENGINE, activation_checkpointing=every, align=True)
    compiled, eager = network(replace(engine, compile=True), model), network(engine, model)
    for kept, graphs in ((kept_tokens(3, 0), 5), (kept_tokens(3, 1), 5), (None, 6), (kept_tokens(3, 2), 6), (None, 6)):
        assert_same(passes(eager, kept=kept), passes(compiled, kept=kept), 1e-5)
        assert counters["stats"]["unique_graphs"] == graphs
        assert not counters["graph_break"]
    assert graphs * 3 <= execution.GRAPHS, "the limit also has room for the graphs of sampling"


@pytest.mark.parametrize("training", [True, False])
def test_kernels_are_probed_at_every_number_of_tokens(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """Training uses the lengths of the route, and all tokens for its last part. Sampling uses all tokens only."""
    asked: dict[str, Any] = {}

    def choose_kernel(name: str, **about: Any) -> attention.ChosenKernel:
        asked.update(about)
        return attention.ChosenKernel("sdpa", "", "")

    def choose_fused(name: str, shapes: Shapes, device: torch.device) -> FusedKernels:
        asked["shapes"] = shapes
        return FusedKernels("torch", "", "")

    monkeypatch.setattr("jitscale.model.execution.choose_kernel", choose_kernel)
    monkeypatch.setattr("jitscale.model.execution.choose_fused", choose_fused)
    for model, routed, tokens in (
        (ROUTED, 8, {16, 20, 8, 12}),
        (replace(ROUTED, in_context_start=1, route_share=0.25), 12, {16, 20}),
        (MODEL, 0, {16, 20}),
        (replace(MODEL, in_context_start=0), 0, {20}),
    ):
        net = JiT(model)
        prepare(net, ENGINE, CPU, training=training)
        assert set(asked["tokens"]) == (tokens if training else tokens & {16, 20})
        assert asked["shapes"].routed == (routed if training else 0)
        lengths: set[int] = set()
        for block in net.blocks:
            block.register_forward_pre_hook(lambda _, inputs, seen=lengths: seen.add(inputs[0].shape[1]))
        for kept in (None, torch.arange(routed).expand(2, -1))[: 1 + (training and routed > 0)]:
            net(torch.randn(2, 3, 16, 16), torch.rand(2), torch.arange(2), kept)
        assert lengths == set(asked["tokens"])


@pytest.mark.parametrize(("dropout", "ways"), [(0.0, {"align": True}), (0.2, {"activation_checkpointing": 1})])
def test_execution_modes_change_no_routed_pass(dropout: float, ways: dict[str, Any]) -> None:
    """Padded blocks, and recomputed blocks with dropout, give the same predictions and gradients."""
    model = replace(ROUTED, attn_dropout=dropout, proj_dropout=dropout)
    plain, other = (network(engine, model) for engine in (ENGINE, replace(ENGINE, **ways)))
    for seed in range(2):
        assert_same(passes(plain, kept=kept_tokens(3, seed)), passes(other, kept=kept_tokens(3, seed)), 1e-5)


def test_both_output_layers_have_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = ResidualKernels(*(lambda *_: torch.empty(0) for _ in range(3)))
    fused = FusedKernels("triton", "", "", residual=residual)
    monkeypatch.setattr("jitscale.model.execution.choose_fused", lambda *_: fused)
    net = network(ENGINE, ROUTED)
    assert net.final_layer.kernels is net.middle_layer.kernels is residual


@pytest.mark.usefixtures("half_compiled")
def test_sampling_has_the_same_graphs_for_every_batch() -> None:
    """Nothing is dropped, so there are two graphs: image tokens alone, and with in-context tokens."""
    networks = []
    for compiled in (True, False):
        net = network(ENGINE, replace(MODEL, attn_dropout=0.2, proj_dropout=0.2))
        prepare(net, replace(ENGINE, compile=compiled), CPU, training=False)
        networks.append(net.eval())
    for batch in (3, 5, 2, 8, 3):
        z, t, y = torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.arange(batch)
        with torch.no_grad():
            found, expected = (net(z, t, y) for net in networks)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.usefixtures("dynamo")
def test_no_graph_has_a_dynamic_number_of_tokens(monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    """One code object sees two lengths and several batches. The only symbol is the batch size of sampling."""
    symbols: list[set[object]] = []

    def see(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        sizes = [size for x in inputs if isinstance(x, torch.Tensor) for size in (*x.shape, *x.stride())]
        sizes += [x for x in inputs if not isinstance(x, torch.Tensor)]
        symbols.append(
            {str(s) for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}
        )
        return graph.forward

    monkeypatch.setattr(execution, "_with_parameters_anywhere", see)
    net = JiT(replace(MODEL, attn_dropout=0.2))
    prepare(net, replace(ENGINE, compile=True), CPU, training=training)
    net.train(training)
    for batch in (3, 5, 3, 7):
        with torch.set_grad_enabled(training):
            net(torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.arange(batch) % 10)
    if training:
        assert symbols == [set()] * 9, "each batch has three graphs: two lengths, and dropout"
    else:
        assert [len(found) for found in symbols] == [1, 1]


@on_a_gpu
@pytest.mark.usefixtures("dynamo")
def test_compiled_blocks_read_parameters_from_any_address() -> None:
    """Blocks share a graph, but ZeRO's flat buffers put the same bias at different multiples of 4 bytes.

    The error of compiled code against float64 may be twice the error of uncompiled code: some gradients, most of
    all those of the norms of q and k, are small sums of large terms, and the two ways round differently.
    """
    gpu = torch.device("cuda")
    model = replace(MODEL, hidden_size=56)  # 2 x int(4 x 56 x 2/3) = 298 is not a multiple of 4.
    engine = replace(ENGINE, align=True)
    torch.manual_seed(0)
    z, t, y = torch.randn(3, 3, 16, 16, device=gpu), torch.full((3,), 0.5, device=gpu), torch.arange(3, device=gpu)

    def run(dtype: torch.dtype, *, compiled: bool) -> Result:
        torch.manual_seed(0)
        net = JiT(model).to(gpu, dtype)
        offsets = set()
        for group in parameter_groups(net, OptimConfig()):
            flat = (torch.randn(sum(p.numel() for p in group["params"]), device=gpu) * 0.1).to(dtype)
            for p, part in zip(group["params"], flat.split([p.numel() for p in group["params"]]), strict=True):
                p.data = part.view(p.shape)
                offsets.add(part.storage_offset() % 4)
        assert len(offsets) > 1, "some parameters must not be aligned to 16 bytes"
        exact = dtype == torch.float64
        prepare(net, replace(engine, precision="fp32" if exact else "autocast", compile=compiled), gpu, training=True)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=not exact):
            out = net(z.to(dtype), t.to(dtype), y)
        out.to(torch.promote_types(out.dtype, torch.float32)).square().mean().backward()
        return out.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}

    right, eager = run(torch.float64, compiled=False), run(torch.float32, compiled=False)
    found = run(torch.float32, compiled=True)
    assert found[1].keys() == right[1].keys()
    for name, exact in {"output": right[0], **right[1]}.items():
        a, b = (result[0] if name == "output" else result[1][name] for result in (found, eager))
        floor = 0.05 * float(exact.norm())  # The norms of q and k have few weights, so their errors vary by chance.
        assert float((a - exact).norm()) <= 2 * float((b - exact).norm()) + floor, name


@pytest.mark.usefixtures("dynamo")
def test_compilation_treats_no_parameter_as_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """If they were static, the alignment of the first block would be assumed for all blocks that share its graph."""
    static: list[int] = []

    def see(graph: torch.fx.GraphModule, inputs: list[torch.Tensor], **_: Any) -> Any:
        placeholders = graph.graph.find_nodes(op="placeholder")
        assert any("tensor_dict" in node.meta for node in placeholders), (
            "this version of torch stores the flag elsewhere"
        )
        static.append(sum("_dynamo_static_input_type" in node.meta.get("tensor_dict", {}) for node in placeholders))
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", see)
    with torch.no_grad():
        net = network(replace(ENGINE, compile=True))
        net(torch.randn(3, 3, 16, 16), torch.rand(3), torch.arange(3))
    assert static == [0, 0]  # two graphs: image tokens alone, and with in-context tokens


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_compiled_code_gives_the_same_results() -> None:
    """The compiler is the one of real runs. The norms, rotation, modulation and gates are fused."""
    compiled, eager = network(replace(ENGINE, compile=True)), network(ENGINE)
    assert_same(passes(eager), passes(compiled), 1e-4)


VIEWS = {"_unsafe_view", "alias", "detach", "expand", "permute", "select", "slice", "split", "t", "transpose"}
VIEWS |= {"unbind", "unsqueeze", "view"}  # These operators only make views; they run nothing.
PRODUCTS = {"aten::addmm", "aten::mm", "mkldnn::_linear_pointwise"}


class Operators(TorchDispatchMode):
    """Counts the operators that run something."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function.overloadpacket.__name__ not in VIEWS
        return function(*args, **(kwargs or {}))


def kernels(run: Callable[[], object]) -> tuple[int, int, int]:
    """The numbers of fused kernels, matrix products and attentions in compiled code."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    counts = {event.key: event.count for event in profiler.key_averages()}
    fused = sum(n for key, n in counts.items() if "cpp_fused" in key)
    attentions = sum(n for key, n in counts.items() if key.startswith("aten::_scaled_dot_product_flash_attention"))
    return fused, sum(counts.get(key, 0) for key in PRODUCTS), attentions


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
def test_the_number_of_kernels_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """JiT-H's block in bf16 arithmetic, compiled by this version of torch. docs/performance.md has these numbers."""
    monkeypatch.setattr(torch._inductor.config.cpp, "enable_kernel_profile", True)
    file = ROOT / "configs/jit_h_256.yaml"
    model = load_config(file, ["run.max_steps=1", "model.depth=1", "model.in_context_start=0"]).model
    counts = []
    for compiled in (False, True):
        net = network(replace(ENGINE, precision="autocast", align=True, compile=compiled), model)
        x, condition = torch.randn(2, 288, 1280, requires_grad=True), torch.randn(2, 1280, requires_grad=True)

        def forward(net: JiT = net, x: torch.Tensor = x, condition: torch.Tensor = condition) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return net.blocks[0](x, condition, net.rope)

        gradient = torch.randn(2, 288, 1280)
        forward().backward(gradient)  # The first use compiles.
        out = forward()
        if compiled:
            counts += [kernels(forward), kernels(partial(out.backward, gradient))]
        else:
            with Operators() as ahead:
                forward()
            with Operators() as back:
                out.backward(gradient)
            counts += [ahead.count, back.count]
    assert counts == [75, 155, (7, 5, 1), (10, 10, 1)]
