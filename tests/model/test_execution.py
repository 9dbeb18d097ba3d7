"""Execution modes do not change the results: padding, float8, compilation, CUDA graphs of sampling."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from jitscale.config import EngineConfig, ModelConfig, OptimConfig, load_config, routed_tokens
from jitscale.errors import ConfigError
from jitscale.model import attention, execution
from jitscale.model.attention import KERNELS
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.execution import prepare
from jitscale.model.float8 import float8_product
from jitscale.model.fused.choice import FusedKernels, Shapes
from jitscale.model.jit import JiT
from jitscale.model.layers import ALIGNMENT, ResidualKernels, SwiGLU, swiglu_width
from jitscale.training.optim import parameter_groups
from tests.support import ROOT, tiny

CPU = torch.device("cpu")
MODEL = replace(tiny.MODEL, hidden_size=40, depth=8, in_context_start=2)
ENGINE = EngineConfig(precision="fp32", attention="sdpa", align=False, compile=False)
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def network(engine: EngineConfig, model: ModelConfig = MODEL, dtype: torch.dtype = torch.float32) -> JiT:
    torch.manual_seed(0)
    net = JiT(model).to(dtype)
    # Layers that start at zero would hide errors of the layers below them.
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    prepare(net, engine, CPU, training=True)
    return net.train()


def passes(net: JiT, batch: int = 3, dtype: torch.dtype = torch.float32, kept: torch.Tensor | None = None) -> Result:
    torch.manual_seed(batch)
    t, middle = torch.rand(batch).to(dtype), net.config.middle_head > 0
    out = net(torch.randn(batch, 3, 16, 16, dtype=dtype), t, torch.arange(batch) % 10, kept, middle=middle)
    net.zero_grad()
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a: Result, b: Result, tolerance: float) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=tolerance, atol=tolerance)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        scale = float(a[1][name].abs().max())
        torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=tolerance * scale, msg=name)


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


@pytest.mark.parametrize("hidden", [1280, 1024, 1664])
def test_padding_a_feed_forward_layer_is_exact(hidden: int) -> None:
    """The widths of JiT-H, L and G, with two tokens in float64: output and all gradients agree."""
    torch.manual_seed(0)
    layer = SwiGLU(hidden, 0.0).double()
    assert layer.padding == -swiglu_width(hidden) % ALIGNMENT > 0
    x = torch.randn(1, 2, hidden, dtype=torch.float64, requires_grad=True)
    results = []
    for aligned in (False, True):
        layer.aligned = aligned
        out = layer(x)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for plain, padded in zip(*results, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


def test_padded_products_have_aligned_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix products of a feed-forward layer have aligned sizes, and autocast's dtype."""
    layer = SwiGLU(1280, 0.0)
    layer.aligned = True
    product = torch.nn.functional.linear
    seen = []

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seen.append((*weight.shape, weight.dtype))
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(1, 1, 1280))
    assert seen == [(2 * 3456, 1280, torch.bfloat16), (1280, 3456, torch.bfloat16)]


def test_a_padded_network_computes_and_stores_the_same() -> None:
    """In float64 only rounding remains. Names and shapes are those of a checkpoint."""
    plain = network(ENGINE, dtype=torch.float64)
    padded = network(replace(ENGINE, align=True), dtype=torch.float64)
    assert padded.blocks[0].mlp.padding > 0  # type: ignore[union-attr, operator]
    assert {k: v.shape for k, v in padded.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert_same(passes(plain, dtype=torch.float64), passes(padded, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("routed", [False, True])
def test_float8_stays_near_bf16(monkeypatch: pytest.MonkeyPatch, routed: bool) -> None:
    """float8 is emulated, with padding, because its products need multiples of 16.

    Names and shapes are those of a checkpoint.
    """
    pytest.importorskip("torchao", reason="needs torchao: pip install 'jitscale[float8]'")
    model, kept = replace(MODEL, hidden_size=64, depth=4), None
    if routed:
        model = replace(model, route_share=0.5, route_blocks=[1, -1], middle_head=2)
        kept = torch.stack([torch.randperm(16)[: routed_tokens(model)].sort().values for _ in range(3)])
    bf16 = replace(ENGINE, precision="autocast")
    results = {}
    for name, engine in (("bf16", bf16), ("float8", replace(bf16, float8=True, align=True))):
        net = network(engine, model)
        assert net.state_dict().keys() == JiT(model).state_dict().keys()
        with torch.autocast("cpu", torch.bfloat16):
            results[name] = passes(net, kept=kept)
    exact, rough = results["bf16"], results["float8"]
    difference = float((rough[0] - exact[0]).norm() / exact[0].norm())
    assert 0.002 < difference < 0.1, "the result is rounded, but only a little"
    for name in ("blocks.0.attn.qkv.weight", "blocks.2.mlp.w12.weight", "blocks.3.mlp.w3.bias"):
        cosine = torch.nn.functional.cosine_similarity(exact[1][name].flatten(), rough[1][name].flatten(), 0)
        assert float(cosine) > 0.97, name
    monkeypatch.setitem(sys.modules, "torchao.float8.config", None)
    with pytest.raises(ConfigError, match=r"engine.float8=true: torchao cannot be imported"):
        network(replace(bf16, float8=True))


def test_float8_takes_any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products need multiples of 16 rows, because backward sums over rows. Outputs and gradients do not change."""
    module = pytest.importorskip("torchao.float8.float8_linear", reason="needs torchao: pip install 'jitscale[float8]'")
    products = module.matmul_with_hp_or_float8_args
    apply, seen = products.apply, []

    def recorded(x: torch.Tensor, *others: Any) -> torch.Tensor:
        seen.append(len(x))
        result: torch.Tensor = apply(x, *others)
        return result

    monkeypatch.setattr(products, "apply", recorded)
    product, weight, bias = float8_product(CPU), torch.randn(32, 16, requires_grad=True), torch.randn(32)
    x, upstream = torch.randn(3, 6, 16), torch.randn(3, 6, 32)
    results = []
    for fill in (0, 14):  # 18 tokens, then 32 tokens whose last ones are zeros
        filled = torch.nn.functional.pad(x.flatten(0, 1), (0, 0, 0, fill)).requires_grad_()
        shaped = filled.unflatten(0, (3, 6)) if fill == 0 else filled
        out = product(shaped, weight, bias)
        assert out.shape == (*shaped.shape[:-1], 32)
        rows = out.flatten(0, -2)[:18]
        results.append((rows, *torch.autograd.grad((rows * upstream.flatten(0, 1)).sum(), [filled, weight])))
    assert seen == [32, 32]
    (own, own_x, own_weight), (zeros, zeros_x, zeros_weight) = results
    assert torch.equal(own, zeros)
    assert torch.equal(own_x, zeros_x[:18])
    assert torch.equal(own_weight, zeros_weight)


def test_float8_needs_aligned_widths() -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'jitscale[float8]'")
    with pytest.raises(ConfigError, match=r"engine\.float8=true needs widths that are multiples of 16"):
        network(EngineConfig(precision="autocast", float8=True, align=False))


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


# Class tokens enter inside the route, and the middle layer lies inside it.
ROUTED = replace(MODEL, route_share=0.5, route_blocks=[1, -1], middle_head=4)


def kept_tokens(batch: int, seed: int) -> torch.Tensor:
    draws = torch.rand(batch, 16, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1)[:, : routed_tokens(ROUTED)].sort(1).values


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
