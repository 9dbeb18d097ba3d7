"""The fused kernels against float64, on a GPU or in Triton's interpreter, and the choice between them and torch's code.

The tests of the kernels need triton. Without a GPU they run in a process of their own, because the interpreter must be
chosen before triton is imported. torch for CPUs comes without triton; then they are skipped.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jitscale.config import EngineConfig
from jitscale.errors import ConfigError
from jitscale.model import fused, layers
from jitscale.model.execution import prepare
from jitscale.model.fused import choice
from jitscale.model.fused.choice import Shapes, choose_fused
from jitscale.model.jit import JiT
from tests.support import ROOT, tiny

ON_GPU = torch.cuda.is_available()
INTERPRETED = not ON_GPU and os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
CPU = torch.device("cpu")
BF16_ERROR = 0.008 if INTERPRETED else 0.004  # Values are rounded once; the interpreter truncates the last bits.

kernels = pytest.mark.skipif(not (ON_GPU or INTERPRETED), reason="needs a GPU or Triton's interpreter")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the kernels' tests run in this process")
def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "kernel", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def exact_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    """The reference, in the dtype of the inputs, float64."""
    q, k, v = qkv.unflatten(-1, (3, -1, rope.shape[-1])).unbind(2)
    cos, sin = rope.unsqueeze(-2)

    def rotated(x: Tensor, weight: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layers.NORM_EPS) * weight
        return x * cos + torch.stack([x[..., 1::2], x[..., ::2]], -1).flatten(-2) * sin

    return rotated(q, q_weight), rotated(k, k_weight), v


def gradients_of(out: Any, inputs: list[Tensor], gradients: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, gradients)


def assert_near(found: Tensor, exact: Tensor, error: float) -> None:
    assert exact.dtype == torch.float64
    off = float((found.detach().double() - exact.detach()).abs().max() / exact.detach().abs().max())
    assert off < error, off


def heads_case(batch: int, grid: int, heads: int, head_dim: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """qkv and the norms' weights, which require gradients. The strided rotation is that of image tokens alone."""
    qkv = random(batch, grid**2, 3 * heads * head_dim, seed=0, dtype=dtype)
    weights = [1 + 0.3 * random(head_dim, seed=seed) for seed in (1, 2)]  # float32, even if qkv is in bf16
    rope = layers.rope_table(head_dim, grid, 5).to(DEVICE)[:, 5:]
    return [x.requires_grad_() for x in (qkv, *weights)], rope


@kernels
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("batch", [1, 5, 9])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, BF16_ERROR)])
def test_kernels_of_the_heads_take_rotations_of_each_image(
    dtype: torch.dtype, error: float, batch: int, strided: bool
) -> None:
    """Tokens are routed. Outputs and gradients agree, although the images of one program have different rotations."""
    grid, heads, head_dim = (16, 16, 80) if ON_GPU else (2, 3, 80)
    inputs, _ = heads_case(batch, grid, heads, head_dim, dtype)
    table = layers.rope_table(head_dim, 2 * grid, 0)
    draws = torch.rand(batch, table.shape[1], generator=torch.Generator().manual_seed(4))
    rope = table[:, draws.argsort(1)[:, : grid**2]].to(DEVICE)
    if strided:
        rope = F.pad(rope, (0, 0, 3, 0))[:, :, 3:]
    given = tuple(random(3, batch, grid**2, heads, head_dim, seed=3, dtype=dtype))
    out = heads_operator()(*inputs, rope)
    found = (*out, *gradients_of(out, inputs, given))
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = exact_heads(*doubled, rope.double())
    exact = (*exact_out, *gradients_of(exact_out, doubled, tuple(g.double() for g in given)))
    for a, b in zip(found, exact, strict=True):
        assert_near(a, b, error)
    # The result must equal that of the image alone with its rotation.
    for image in range(batch):
        alone = heads_operator()(inputs[0][image : image + 1], *inputs[1:], rope[:, image])
        assert all(torch.equal(a[image], b[0]) for a, b in zip(out, alone, strict=True))


@kernels
@pytest.mark.parametrize("layout", ["contiguous", "heads first", "last stride not 1", "odd strides"])
@pytest.mark.parametrize("head_dim", [64, 80, 104])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, BF16_ERROR)])
def test_kernels_of_the_heads_are_exact(dtype: torch.dtype, error: float, head_dim: int, layout: str) -> None:
    """Outputs and all gradients agree, for all layouts in which attention may return its gradients."""
    batch, grid, heads = (64, 16, 16) if ON_GPU else (5, 2, 3)
    inputs, rope = heads_case(batch, grid, heads, head_dim, dtype)
    given = random(3, batch, heads, grid**2, head_dim, seed=3, dtype=dtype).transpose(2, 3)
    if layout == "contiguous":
        given = given.contiguous()
    elif layout == "last stride not 1":
        given = given.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == "odd strides":
        given = F.pad(given, (0, 3))[..., :head_dim]
    out = heads_operator()(*inputs, rope)
    found = (*out, *gradients_of(out, inputs, tuple(given)))
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    exact_out = exact_heads(*doubled, rope.double())
    exact = (*exact_out, *gradients_of(exact_out, doubled, tuple(given.double())))
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert_near(a, b, error)
    assert all(x.is_contiguous() and x.dtype == dtype for x in out)
    assert [x.dtype for x in found[3:]] == [dtype, torch.float32, torch.float32]
    again = gradients_of(heads_operator()(*inputs, rope), inputs, tuple(given))
    assert all(torch.equal(a, b) for a, b in zip(found[3:], again, strict=True)), "the gradients are not deterministic"


@kernels
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("width", [40, 768, 1280])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, BF16_ERROR)])
def test_kernels_of_the_residual_are_exact(dtype: torch.dtype, error: float, width: int, dropout: float) -> None:
    """The three steps of a block: outputs and all gradients agree.

    Shifts, scales and gates are strided as in the block.
    """
    from jitscale.model.fused import residual  # noqa: PLC0415  # imports triton

    batch, tokens = (64, 288) if ON_GPU else (2, 75)  # The sums over tokens have more than one part.
    x, branch, other = (random(batch, tokens, width, seed=seed, dtype=dtype) for seed in range(3))
    weight, modulation = 1 + 0.3 * random(width, seed=3), 0.3 * random(batch, 6 * width, seed=4, dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, branch, other, weight, modulation)]
    given = [random(batch, tokens, width, seed=seed, dtype=dtype) for seed in (5, 6, 7)]
    seed = torch.full((1,), 1 << 40, device=DEVICE) if dropout > 0 else None
    ones = torch.ones(batch, tokens, width, device=DEVICE)
    kept = residual.gated_add(0 * ones, ones, ones[:, 0].contiguous(), seed, dropout).double()
    assert abs(float((kept == 0).double().mean()) - dropout) < 0.02
    assert torch.equal(kept, 0 * kept + 1) if dropout == 0 else set(kept.unique().tolist()) == {0.0, float(kept.max())}

    def steps() -> tuple[Tensor, ...]:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        y1 = residual.modulated_norm(x, weight, shift1, scale1)
        out, y2 = residual.add_and_norm(x, branch, gate1, weight, shift2, scale2, seed, dropout)
        return y1, y2, residual.gated_add(out, other, gate2, None, 0.0)

    out = steps()
    found = (*out, *gradients_of(out, inputs, given))
    doubled = [tensor.detach().double().requires_grad_() for tensor in inputs]
    shift1, scale1, gate1, shift2, scale2, gate2 = doubled[4].chunk(6, dim=-1)

    def exact_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + layers.NORM_EPS) * doubled[3]
        return layers.modulate(x, shift, scale)

    total = doubled[0] + gate1[:, None] * (doubled[1] * kept)
    exact_out = (
        exact_norm(doubled[0], shift1, scale1),
        exact_norm(total, shift2, scale2),
        total + gate2[:, None] * doubled[2],
    )
    exact = (*exact_out, *gradients_of(exact_out, doubled, [tensor.double() for tensor in given]))
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        assert_near(a, b, 2 * error)  # The sum is rounded, and its norm is rounded again; gradients of x are added.
    again = gradients_of(steps(), inputs, given)
    assert all(torch.equal(a, b) for a, b in zip(found[3:], again, strict=True)), "the gradients are not deterministic"


def heads_operator() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from jitscale.model.fused import heads  # noqa: PLC0415  # imports triton

    return heads.split_heads


def gated_operator() -> Callable[[Tensor, Tensor | None, float], Tensor]:
    from jitscale.model.fused import gated  # noqa: PLC0415  # imports triton

    return gated.gated_with_seed


@kernels
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("inner", [64, 341, 640])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, BF16_ERROR)])
def test_kernels_of_the_gate_are_exact(dtype: torch.dtype, error: float, inner: int, dropout: float) -> None:
    """Output and gradient agree and drop the same elements, also if a width is not a multiple of any block size."""
    shape = (64, 288) if ON_GPU else (3, 7)
    h = random(*shape, 2 * inner, seed=0, dtype=dtype).requires_grad_()
    given = random(*shape, inner, seed=1, dtype=dtype)
    seed = torch.tensor([12345678901], device=DEVICE) if dropout else None
    y = gated_operator()(h, seed, dropout)
    (found,) = gradients_of(y, [h], given)
    doubled = h.detach().double().requires_grad_()
    gate, value = doubled.chunk(2, -1)
    exact = F.silu(gate) * value
    if dropout:
        assert 0.7 < float((y != 0).double().mean()) < 0.9
        exact = exact * (y != 0) / (1 - dropout)
    (exact_gradient,) = gradients_of(exact, [doubled], given.double())
    assert_near(y, exact, max(error, 1e-5 if dropout else 0))  # The probability is a multiple of 2^-16.
    assert_near(found, exact_gradient, max(error, 1e-5 if dropout else 0))
    assert y.dtype == found.dtype == dtype


@kernels
def test_kernels_drop_independently() -> None:
    """The share, its spread over rows and columns, and neighbours are tested. Eight rows share a random number."""
    rows, columns, dropout = 512, 384, 0.2
    ones = torch.ones(rows, 2 * columns, device=DEVICE)
    masks = []
    for number in (1, 2, 1):
        y = gated_operator()(ones, torch.tensor([number << 40], device=DEVICE), dropout)
        masks.append((y == 0).double())
        assert float(y.max()) == pytest.approx(float(F.silu(torch.ones(()))) / (1 - dropout), rel=1e-4)
    first, second, again = masks
    assert torch.equal(first, again)
    spread = (dropout * (1 - dropout)) ** 0.5
    assert float(first.mean()) == pytest.approx(dropout, abs=5 * spread / (rows * columns) ** 0.5)
    for axis, count in ((0, rows), (1, columns)):
        assert float(first.mean(axis).std()) == pytest.approx(spread / count**0.5, rel=0.2)
    centred = (first - dropout) / spread
    shifted = [centred.roll(by, axis) for axis in (0, 1) for by in range(1, 9)]
    for other in (*shifted, (second - dropout) / spread):
        assert abs(float((centred * other).mean())) < 5 / (rows * columns) ** 0.5


@kernels
@pytest.mark.parametrize("dropout", [0.999995, 1 - 2**-20])
def test_kernels_take_every_probability_below_one(dropout: float) -> None:
    """The largest are rounded to 1 - 2^-16, not to 1: outputs stay finite, and nearly all elements are dropped."""
    from jitscale.model.fused import residual  # noqa: PLC0415  # imports triton

    seed, ones = torch.tensor([1 << 40], device=DEVICE), torch.ones(2, 32, 64, device=DEVICE)
    added = residual.gated_add(0 * ones, ones, ones[:, 0].contiguous(), seed, dropout)
    for out in (added, gated_operator()(ones, seed, dropout)):
        assert torch.isfinite(out).all()
        assert float((out == 0).double().mean()) > 0.99


@kernels
def test_kernels_seeds_follow_the_default_generator() -> None:
    from jitscale.model.fused import gated  # noqa: PLC0415  # imports triton

    h = random(4, 8, 128, seed=0)
    torch.manual_seed(0)
    before = torch.get_rng_state() if not ON_GPU else torch.cuda.get_rng_state()
    gated.gated(h, 0.0)
    after = torch.get_rng_state() if not ON_GPU else torch.cuda.get_rng_state()
    assert torch.equal(before, after), "without dropout no random numbers are drawn"
    first, second = gated.gated(h, 0.5), gated.gated(h, 0.5)
    torch.manual_seed(0)
    assert torch.equal(first, gated.gated(h, 0.5))
    assert not torch.equal(first, second)


@kernels
def test_kernels_pass_the_probe() -> None:
    shapes = replace(SMALL, grid=2, prefix=1, inner=200, routed=2)
    if ON_GPU:
        shapes = replace(SMALL, grid=16, prefix=32, heads=16, head_dim=80, inner=3456, routed=128)
    choice._try_split_heads(heads_operator(), shapes, DEVICE)
    choice._try_gated(gated_operator(), shapes, DEVICE)
    from jitscale.model.fused import residual  # noqa: PLC0415  # imports triton

    choice._try_residual(residual, shapes, DEVICE)


# ---- the choice, without triton ----

SMALL = Shapes(
    grid=3,
    prefix=2,
    heads=3,
    head_dim=16,
    inner=64,
    dropouts=[0.0, 0.2],
    dtype=torch.bfloat16,
    weight_dtype=torch.float32,
)


def torch_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Like the fused operator: computed in float32 and rounded once."""
    q, k, v = exact_heads(qkv.float(), q_weight.float(), k_weight.float(), rope)
    return q.to(qkv.dtype), k.to(qkv.dtype), v.to(qkv.dtype)


def torch_gated(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    if seed is None:
        return layers.gated(h)
    draws = torch.rand(h[..., ::2].shape, generator=torch.Generator().manual_seed(int(seed)))
    return layers.gated(h) * (draws >= dropout) / (1 - dropout)


def test_the_probe_accepts_right_and_refuses_wrong_operators() -> None:
    choice._try_split_heads(torch_heads, SMALL, CPU)
    choice._try_gated(torch_gated, SMALL, CPU)
    state = torch.get_rng_state()
    choice._try_gated(torch_gated, SMALL, CPU)
    assert torch.equal(torch.get_rng_state(), state), "the probe does not change the run's random state"

    def not_rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        return torch_heads(qkv, q_weight, k_weight, torch.stack([torch.ones_like(rope[0]), torch.zeros_like(rope[1])]))

    def k_without_gradient(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        return torch_heads(qkv, q_weight, k_weight.detach() + 0 * k_weight, rope)

    wrong: list[tuple[Any, str]] = [
        (not_rotated, r"q at 9 tokens is off by [\d.]+ of the largest element"),
        (k_without_gradient, r"gradient of k's weight at 9 tokens is off"),
    ]
    for operator, message in wrong:
        with pytest.raises(ValueError, match=message):
            choice._try_split_heads(operator, SMALL, CPU)
    routed = replace(SMALL, routed=4)
    choice._try_split_heads(torch_heads, routed, CPU)

    def first_images(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        return torch_heads(qkv, q_weight, k_weight, rope if rope.dim() == 3 else rope[:, 0])

    def not_with_class_tokens(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (torch_heads if inputs[0].shape[1] != 4 + SMALL.prefix else first_images)(*inputs)

    for wrongly_turned, count in ((first_images, 4), (not_with_class_tokens, 6)):
        with pytest.raises(ValueError, match=rf"q at {count} routed tokens is off"):
            choice._try_split_heads(wrongly_turned, routed, CPU)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"output of the gate at dropout 0\.2 is off"):
        choice._try_gated(lambda h, seed, dropout: torch_gated(h, seed, dropout) * (1 - dropout), SMALL, CPU)
    with pytest.raises(ValueError, match=r"share kept by the gate at dropout 0\.2 is off"):
        choice._try_gated(lambda h, seed, dropout: torch_gated(h, None, 0.0) / (1 - dropout), SMALL, CPU)
    with pytest.raises(ValueError, match=r"gradient of the gate at dropout 0\.0 is off"):
        choice._try_gated(lambda h, seed, dropout: torch_gated(h.detach() + 0 * h, seed, dropout), SMALL, CPU)


def test_cpus_use_torchs_code() -> None:
    assert str(choose_fused("auto", SMALL, CPU)) == "torch (cpu)"
    assert str(choose_fused("torch", SMALL, CPU)) == "torch (requested)"
    with pytest.raises(ConfigError, match=r"engine.fused_kernels=triton needs a GPU, and this is cpu; choose auto or"):
        choose_fused("triton", SMALL, CPU)


def test_the_reason_for_torchs_code_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without triton, torch's code is used and the reason is logged.

    If the kernels were requested, the run refuses to start.
    """
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("heads", "gated", "residual", "dropping"):
        monkeypatch.delitem(sys.modules, f"jitscale.model.fused.{name}", raising=False)
        # An import looks at this attribute first.
        monkeypatch.delattr(fused, name, raising=False)
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    gpu = torch.device("cuda")
    found = choose_fused("auto", SMALL, gpu)
    assert found.split_heads is found.gated is None
    assert str(found).startswith("torch (triton: ModuleNotFoundError: ")
    assert str(choose_fused("auto", replace(SMALL, dtype=torch.float32), gpu)) == "torch (cuda, float32)"
    with pytest.raises(
        ConfigError, match=r"engine.fused_kernels=triton does not work here \(ModuleNotFoundError: .*64"
    ):
        choose_fused("triton", SMALL, gpu)
    monkeypatch.setattr(torch, "__version__", "2.6.0")
    assert str(choose_fused("auto", SMALL, gpu)) == "torch (torch 2.6.0: Triton's kernels are tested from 2.11 on)"


MODEL = replace(tiny.MODEL, hidden_size=64, depth=4, num_heads=4, in_context_start=1, proj_dropout=0.2)


@pytest.mark.parametrize("align", [False, True])
def test_blocks_use_the_chosen_operators(monkeypatch: pytest.MonkeyPatch, align: bool) -> None:
    """The operators get the layer's weights and rotation, padded or not. Dropout is on in training only."""
    seen = []

    def gated(h: Tensor, dropout: float) -> Tensor:
        seen.append((h.shape[-1], dropout))
        return layers.gated(h)

    fused = choice.FusedKernels("triton", "1.0", "agrees with torch", torch_heads, gated)
    engine = EngineConfig(precision="fp32", attention="sdpa", align=align, compile=False)
    inputs = (torch.randn(2, 3, 16, 16), torch.rand(2), torch.arange(2))
    outputs = []
    for chosen in (None, fused):
        if chosen is not None:
            monkeypatch.setattr("jitscale.model.execution.choose_fused", lambda *_: fused)
        torch.manual_seed(0)
        net = JiT(MODEL)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        execution = prepare(net, engine, CPU, training=True)
        outputs.append(net.eval()(*inputs))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    width = 2 * 192 if align else 2 * 170
    assert seen == [(width, 0.0)] * 4
    seen.clear()
    net.train()(*inputs)
    assert seen == [(width, dropout) for dropout in (0.0, 0.2, 0.2, 0.0)]
    assert "fused kernels triton 1.0 (agrees with torch)" in str(execution)
    assert execution.by_block, "with ZeRO-3, the norms' weights must be gathered with the block"
