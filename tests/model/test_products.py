"""Padded and float8 matrix products do not change the results of the network."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from jitscale.config import EngineConfig, routed_tokens
from jitscale.errors import ConfigError
from jitscale.model.float8 import float8_product
from jitscale.model.jit import JiT
from jitscale.model.layers import ALIGNMENT, SwiGLU, swiglu_width
from tests.model.networks import CPU, ENGINE, MODEL, assert_same, network, passes


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
