"""The fused kernels in a network, on a GPU: errors, dropout and recomputation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from jitscale.config import EngineConfig
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from tests.support import tiny

GPU = torch.device("cuda")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LARGE = replace(
    tiny.MODEL,
    **{"image_size": 256, "patch_size": 16, "hidden_size": 320, "depth": 4, "num_heads": 4, "num_classes": 10},
    **{"in_context_len": 32, "in_context_start": 1},
)


def step(engine: EngineConfig, dropout: float, seed: int = 0) -> list[Tensor]:
    """Loss and gradients of a training step. Only the execution may differ."""
    torch.manual_seed(0)
    net = JiT(replace(LARGE, proj_dropout=dropout))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    net = net.to(GPU).train()
    execution = prepare(net, engine, GPU, training=True)
    assert execution.fused.name == engine.fused_kernels
    inputs = torch.randn(8, 3, 256, 256).to(GPU), torch.rand(8).to(GPU), torch.arange(8).to(GPU)
    torch.manual_seed(seed)
    with torch.autocast("cuda", torch.bfloat16, enabled=engine.precision == "autocast"):
        out = net(*inputs)
    loss = out.float().square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.parametrize("recompute", [0, 1])
def test_a_compiled_network_is_as_exact_as_torchs(recompute: int) -> None:
    """The error of bf16 gradients against float32 is at most 1.5 times the error of torch's code."""
    engine = EngineConfig(precision="autocast", activation_checkpointing=recompute)
    exact = step(EngineConfig(precision="fp32", compile=False, fused_kernels="torch"), 0.0)
    theirs, ours = (step(replace(engine, fused_kernels=name), 0.0) for name in ("torch", "triton"))
    for found, reference, right in zip(ours, theirs, exact, strict=True):
        limit = 1.5 * float((reference - right).norm()) + 1e-3 * float(right.norm())
        assert float((found - right).norm()) <= limit


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", [0, 1])
def test_a_step_with_dropout_is_reproducible(recompute: int, compiled: bool) -> None:
    """The results are bit-equal under the same seed, also with a recomputed block.

    Another seed drops other elements.
    """
    engine = EngineConfig(
        precision="autocast", activation_checkpointing=recompute, compile=compiled, fused_kernels="triton"
    )
    first, again, other = step(engine, 0.2), step(engine, 0.2), step(engine, 0.2, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_blocks_drop_the_same_elements(compiled: bool) -> None:
    """In float32, the norm of the gradient equals the loss's difference quotient along it, under the same seed."""
    engine = EngineConfig(precision="fp32", activation_checkpointing=1, compile=compiled, fused_kernels="triton")
    torch.manual_seed(0)
    net = JiT(replace(LARGE, proj_dropout=0.2))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    net = net.to(GPU).train()
    prepare(net, engine, GPU, training=True)
    inputs = torch.randn(4, 3, 256, 256).to(GPU), torch.rand(4).to(GPU), torch.arange(4).to(GPU)

    def loss() -> Tensor:
        torch.manual_seed(1)
        return net(*inputs).double().square().mean()

    weights = [block.mlp.w12.weight for block in net.blocks]  # type: ignore[union-attr]
    gradients = torch.autograd.grad(loss(), weights)  # type: ignore[arg-type]
    squared = sum(float(g.double().square().sum()) for g in gradients)
    moved = []
    # one step forward, then two steps back
    for distance in (1e-2, -2e-2):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.add_(gradient, alpha=distance / squared**0.5)  # type: ignore[operator, union-attr]
        moved.append(float(loss().detach()))
    assert (moved[0] - moved[1]) / 2e-2 == pytest.approx(squared**0.5, rel=0.02)
