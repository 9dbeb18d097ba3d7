"""Attention kernels agree with each other, drop weights as configured, and are chosen by their results."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from jitscale.errors import ConfigError
from jitscale.model import attention
from jitscale.model.attention import KERNELS, choose_kernel

CPU = torch.device("cpu")


@pytest.mark.parametrize("head_dim", [64, 80, 104])
@pytest.mark.parametrize("name", ["sdpa-flash", "sdpa", "reference"])  # These run on the CPU in float32.
def test_kernels_agree_forward_and_backward(name: str, head_dim: int) -> None:
    """The reference is explicit float64 arithmetic, at JiT's lengths and head dims. q, k and v are strided views."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 288, 3, 2, head_dim, requires_grad=True)
    out = KERNELS[name](*qkv.unbind(2), 0.0)
    weight = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, qkv, weight)
    exact = qkv.detach().double().requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in exact.unbind(2))
    expected = ((q @ k.transpose(2, 3)) / head_dim**0.5).softmax(-1) @ v
    (gradient,) = torch.autograd.grad(expected.transpose(1, 2), exact, weight.double())
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-5)


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def skip_if_absent(error: ConfigError) -> None:
    """Skip the test if the machine lacks a kernel. A kernel that exists and computes wrong values fails the test."""
    absent = ("No module named", "is older than", "no cuDNN", "No available kernel")
    if not any(reason in str(error) for reason in absent):
        raise error
    pytest.skip(str(error))


@on_a_gpu
@pytest.mark.parametrize("head_dim", [64, 80, 104])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_agree_on_a_gpu(name: str, head_dim: int) -> None:
    """In bf16, forward and backward. The error against float64 is at most twice the error of the authors' way."""
    torch.manual_seed(0)
    gpu = torch.device("cuda")
    shape = {"tokens": [256, 288], "heads": 2, "head_dim": head_dim, "dropouts": [0.0]}
    try:
        choose_kernel(name, **shape, dtype=torch.bfloat16, device=gpu)  # type: ignore[arg-type]
    except ConfigError as error:
        skip_if_absent(error)
    qkv = torch.randn(2, 288, 3, 2, head_dim, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(2, 288, 2, head_dim, device=gpu, dtype=torch.bfloat16)

    def passes(kernel: attention.Kernel, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = kernel(*inputs.unbind(2), 0.0)
        (gradient,) = torch.autograd.grad(out, inputs, weight.to(out.dtype))
        return out, gradient

    def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: float) -> torch.Tensor:
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / head_dim**0.5).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v)

    exact = passes(written_out, qkv.detach().double().requires_grad_())
    for found, theirs, right in zip(passes(KERNELS[name], qkv), passes(attention.unfused, qkv), exact, strict=True):
        assert float((found - right).norm()) <= 2 * float((theirs - right).norm())


@on_a_gpu
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("head_dim", [64, 80, 104])
@pytest.mark.parametrize("name", ["sdpa-cudnn", "sdpa-flash"])
def test_named_kernels_of_torch_on_a_gpu(name: str, head_dim: int) -> None:
    """The batch and the dropout are those of training. The result inside of a compiled graph is the same as outside."""
    gpu = torch.device("cuda")
    shape: dict[str, Any] = {"batch": 64, "tokens": [256, 288], "heads": 16, "head_dim": head_dim}
    try:
        choose_kernel(name, **shape, dropouts=[0.0, 0.2], dtype=torch.bfloat16, device=gpu)
    except ConfigError as error:
        skip_if_absent(error)
    qkv = torch.randn(2, 288, 3, 16, head_dim, device=gpu, dtype=torch.bfloat16, requires_grad=True)
    compiled = torch.compile(KERNELS[name], fullgraph=True, backend="aot_eager")
    results = []
    for kernel in (KERNELS[name], compiled):
        out = kernel(*qkv.unbind(2), 0.0)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), qkv)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_kernels_drop_weights(name: str) -> None:
    """All values are one: the mean of the outputs stays one, single outputs differ."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 64, 2, 16).unbind(0)
    out = KERNELS[name](q, k, torch.ones(8, 64, 2, 16), 0.5)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert float(out.std()) > 0.05


def chosen(asked: str, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> attention.ChosenKernel:
    return choose_kernel(asked, tokens=[16, 20], heads=2, head_dim=8, dropouts=[dropout], dtype=dtype, device=CPU)


def test_a_requested_kernel_works_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen("auto").name == "sdpa"
    assert chosen("reference", dropout=0.2).reason == "requested"
    assert chosen("sdpa-flash").reason == "requested"
    with pytest.raises(ConfigError, match=r"engine.attention=sdpa-flash does not work here \("):
        chosen("sdpa-flash", dropout=0.2)  # It has no dropout on a CPU, and no other kernel replaces it.
    for name in ("flash-attn", "flash-attn-4", "sdpa-cudnn"):
        with pytest.raises(ConfigError, match=rf"engine.attention={name} does not work here \(."):
            chosen(name)
    monkeypatch.setitem(KERNELS, "sdpa", lambda q, k, v, dropout: attention.unfused(q, k, 1.1 * v, dropout))
    with pytest.raises(ConfigError, match=r"output is off by 0\.1 of the largest element"):
        chosen("sdpa")


def test_a_gpu_takes_the_first_kernel_that_passes_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order and the reasons are tested. The probes fail as on a GPU, at the batch of the run."""
    tried = []
    broken = {attention.flash_attn: ImportError("No module named 'flash_attn'")}

    def probe(
        kernel: attention.Kernel,
        shape: tuple[int, ...],
        dropout: float,
        dtype: object,
        device: object,
        backward: bool,
        strided_values: bool,
    ) -> None:
        tried.append((kernel.__name__, shape, dropout, backward))
        if kernel in broken:
            raise broken[kernel]
        if kernel is attention.flash_attn_4:
            kernel(*torch.randn(3, 1, 4, 2, 8).unbind(0), dropout)

    cudnn = 91900
    monkeypatch.setattr(attention, "_probe", probe)
    monkeypatch.setitem(attention._operators, "forward", lambda q, k, v, scale: (v, None))
    monkeypatch.setattr(attention, "_version", lambda name: "1.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)

    def on_gpu(dropouts: list[float], asked: str = "auto", dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
        shape: dict[str, Any] = {"batch": 64, "tokens": [8], "heads": 2, "head_dim": 8, "dropouts": dropouts}
        found = choose_kernel(asked, **shape, dtype=dtype, device=torch.device("cuda"), backward=False)
        return found.name, found.reason

    packages = "flash-attn-4: has no dropout; flash-attn: No module named 'flash_attn'"
    assert on_gpu([0.0]) == ("flash-attn-4", "first choice")
    assert on_gpu([0.0, 0.2]) == ("sdpa-cudnn", packages)
    assert ("sdpa_cudnn", (64, 8, 2, 8), 0.2, False) in tried
    assert on_gpu([0.0, 0.2], dtype=torch.float32) == ("sdpa", "cuda, float32")
    cudnn = 91002
    found = on_gpu([0.2])
    assert found == (
        "sdpa-flash",
        f"{packages}; sdpa-cudnn: cuDNN 91002 is older than 91500, and wrong at some lengths",
    )
    with pytest.raises(ConfigError, match=r"attention=sdpa-cudnn does not work here \(cuDNN 91002 is older"):
        on_gpu([0.2], "sdpa-cudnn")
    assert on_gpu([0.2], "sdpa") == ("sdpa", "requested")
    cudnn = 91900
    broken[attention.sdpa_cudnn] = ValueError("gradient of q has elements that are infinite or nan")
    found = on_gpu([0.2])
    assert found == ("sdpa-flash", f"{packages}; sdpa-cudnn: gradient of q has elements that are infinite or nan")
    broken[attention.sdpa_flash] = RuntimeError("No available kernel")
    assert on_gpu([0.2])[0] == "sdpa"


def dropping(choose: Callable[[torch.Tensor, float], torch.Tensor]) -> attention.Kernel:
    """A kernel that keeps the weights (B, H, N, N) that `choose` selects."""

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        weights = attention._weights(q, k)
        return attention._weighted(weights * choose(weights, dropout), v)

    return kernel


def with_gradient_of_q(change: Callable[[torch.Tensor], torch.Tensor]) -> attention.Kernel:
    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        q = q.view_as(q)
        if q.requires_grad:
            q.register_hook(change)
        return attention.unfused(q, k, v, dropout)

    return kernel


def one_nan(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.clone()
    gradient[-1, -1, -1, -1] = torch.nan
    return gradient


def honest(weights: torch.Tensor, dropout: float) -> torch.Tensor:
    return (torch.rand_like(weights) >= dropout) / (1 - dropout)


PROBED: dict[str, tuple[attention.Kernel, str | None]] = {
    "the authors' way": (attention.unfused, None),
    "PyTorch's": (attention.sdpa, None),
    "written out": (dropping(honest), None),
    "NaN in a gradient": (with_gradient_of_q(one_nan), "gradient of q has elements that are infinite or nan"),
    "wrong gradient": (with_gradient_of_q(lambda g: 1.2 * g), r"gradient of q is off by 0\.2 of the largest element"),
    "too few dropped": (dropping(lambda w, p: honest(w, p / 2)), r"share of dropped weights is off: 0\.\d+ instead"),
    "not scaled": (dropping(lambda w, p: honest(w, p) * (1 - p)), r"output is off by 0\.2 of the largest element"),
    "same in every call": (
        dropping(lambda w, p: torch.arange(w.numel()).view_as(w) % 5 / 5 >= p), "does not differ between calls"
    ),
    "same in every head": (
        dropping(lambda w, p: honest(w[:1, :1], p).expand_as(w)), "does not differ between heads"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBED)
def test_the_probe_finds_errors_of_dropout(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The reference drops the same weights.

    It works slice by slice, although the kernel does not reveal the weights.
    """
    kernel, message = PROBED[case]
    monkeypatch.setattr(attention, "PROBE_ELEMENTS", 2 * 2 * 36**2)  # Two of the five samples fit at a time.
    torch.manual_seed(7)
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        with nullcontext() if message is None else pytest.raises(ValueError, match=message):
            attention._probe(kernel, (5, 36, 2, 16), 0.2, dtype, CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_sampling_is_probed_without_gradients() -> None:
    kernel = PROBED["NaN in a gradient"][0]
    with pytest.raises(ValueError, match="infinite or nan"):
        attention._probe(kernel, (3, 36, 2, 16), 0.0, torch.float32, CPU)
    assert torch.is_grad_enabled()
    recording = []

    def sampled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout: float) -> torch.Tensor:
        recording.append(torch.is_grad_enabled() or q.requires_grad)
        return kernel(q, k, v, dropout)

    attention._probe(sampled, (3, 36, 2, 16), 0.0, torch.float32, CPU, backward=False)
    assert recording == [False]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_named_kernel_of_torch_is_forced_inside_a_graph(recomputed: bool) -> None:
    """torch would choose another kernel, because FlashAttention is off. The graph has no breaks."""
    operators: list[str] = []

    def see(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: attention.Kernel) -> torch.Tensor:
        return kernel(q, k, v, 0.0) * 2

    torch.backends.cuda.enable_flash_sdp(False)
    try:
        for kernel, flash in ((attention.sdpa, False), (attention.sdpa_flash, True)):
            operators.clear()
            call = partial(checkpoint, run, use_reentrant=False) if recomputed else run
            compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=see))
            q, k, v = (torch.randn(2, 16, 2, 8, requires_grad=True) for _ in range(3))
            torch.autograd.grad(compiled(q, k, v, kernel).sum(), (q, k, v))
            assert any("_scaled_dot_product_flash_attention_for_cpu" in name for name in operators) == flash
        assert not torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_flash_sdp(True)


def test_a_kernel_without_package_metadata_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that was built in place and is on PYTHONPATH has no version metadata."""
    monkeypatch.setitem(KERNELS, "flash-attn", attention.unfused)
    found = chosen("flash-attn")
    assert (found.name, found.version) == ("flash-attn", "flash-attn of unknown version")


def test_head_dims_are_padded_exactly_for_flash_attn_4(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def op(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, None]:
        seen.append(q.shape[-1])
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).softmax(-1)
        return torch.einsum("bhnm,bmhd->bnhd", weights, v), None

    monkeypatch.setitem(attention._operators, "forward", op)
    torch.manual_seed(0)
    for head_dim in (80, 104):
        q, k, v = torch.randn(3, 1, 16, 2, head_dim).unbind(0)
        torch.testing.assert_close(attention.flash_attn_4(q, k, v, 0.0), attention.unfused(q, k, v, 0.0))
    assert seen == [80, 128]


@pytest.mark.usefixtures("dynamo")
def test_flash_attn_4_is_a_differentiable_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two functions need a GPU, so stand-ins replace them.

    The operator runs plain and inside of a compiled graph.
    """

    def forward(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, return_lse: bool
    ) -> tuple[torch.Tensor | None, ...]:
        logits = softmax_scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
        out = torch.einsum("bhnm,bmhd->bnhd", logits.softmax(-1), v)
        return out.contiguous(), logits.logsumexp(-1), None, None, None

    def backward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        gradient: torch.Tensor,
        lse: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        weights = (scale * torch.einsum("bnhd,bmhd->bhnm", q, k) - lse[..., None]).exp()
        of_weights = torch.einsum("bnhd,bmhd->bhnm", gradient, v)
        row = (gradient * out).sum(-1).transpose(1, 2)[..., None]
        of_logits = scale * weights * (of_weights - row)
        gradients = (
            torch.einsum("bhnm,bmhd->bnhd", of_logits, k),
            torch.einsum("bhnm,bnhd->bmhd", of_logits, q),
            torch.einsum("bhnm,bnhd->bmhd", weights, gradient),
        )
        return tuple(g.contiguous() for g in gradients)

    package = ModuleType("flash_attn.cute.interface")
    package._flash_attn_fwd, package._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    torch.manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 16, 2, 104, requires_grad=True) for _ in range(4))
    results = []
    compiled = torch.compile(lambda *x: attention.flash_attn_4(*x, 0.0), fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention, "_operators", {})
    for kernel in (attention.unfused, attention.flash_attn_4, lambda *x: compiled(*x[:3])):
        out = kernel(q, k, v, 0.0)
        results.append((out, *torch.autograd.grad(out, (q, k, v), gradient)))
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
