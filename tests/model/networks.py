"""A network prepared for an execution mode, its passes, and how they are compared."""

from dataclasses import replace

import torch

from jitscale.config import EngineConfig, ModelConfig, routed_tokens
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from tests.support import tiny

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


# Class tokens enter inside the route, and the middle layer lies inside it.
ROUTED = replace(MODEL, route_share=0.5, route_blocks=[1, -1], middle_head=4)


def kept_tokens(batch: int, seed: int) -> torch.Tensor:
    draws = torch.rand(batch, 16, generator=torch.Generator().manual_seed(seed))
    return draws.argsort(1)[:, : routed_tokens(ROUTED)].sort(1).values
