"""Token routing and the middle output layer, compared with each image computed alone, token by token."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from jitscale.config import DiffusionConfig, ModelConfig, image_tokens, middle_is_routed, routed_blocks, routed_tokens
from jitscale.model.jit import JiT
from jitscale.training.losses import Losses
from tests.support import tiny

MODEL = replace(tiny.MODEL, depth=6, in_context_start=2, route_share=0.5, route_blocks=[1, -1])
BATCH = 3


def network(model: ModelConfig) -> JiT:
    torch.manual_seed(0)
    net = JiT(model).train()
    # Layers that start at zero would hide errors of the layers below them.
    for name, parameter in net.named_parameters():
        # Small queries and keys would hide errors of the rotation.
        torch.nn.init.normal_(parameter, mean=2.0 if "q_norm" in name or "k_norm" in name else 0.0, std=0.1)
    return net


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, 16, 16), torch.rand(BATCH), torch.arange(BATCH)


def kept_tokens(model: ModelConfig) -> torch.Tensor:
    draws = torch.rand(BATCH, image_tokens(model), generator=torch.Generator().manual_seed(2))
    return draws.argsort(1)[:, : routed_tokens(model)].sort(1).values


def image_alone(
    net: JiT, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor, kept: list[int]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Both predictions for one image. Every token is a tensor of its own, with its rotation."""
    config = net.config
    label = net.y_embedder(y)
    condition = net.t_embedder(t) + label
    image = list((net.x_embedder(z) + net.pos_embed)[0].unbind(0))
    turns = list(net.rope[:, config.in_context_len :].unbind(1))
    classes: list[torch.Tensor] = []
    middle = None
    for index, block in enumerate(net.blocks):
        if config.in_context_len > 0 and index == config.in_context_start:
            classes = list((label + net.in_context_posemb[0]).unbind(0))
        seen = kept if index in routed_blocks(config) else list(range(len(image)))
        upright = list(net.rope[:, : len(classes)].unbind(1))
        rope = torch.stack([*upright, *(turns[token] for token in seen)], dim=1)
        x = block(torch.stack([*classes, *(image[token] for token in seen)])[None], condition, rope)[0]
        classes = list(x[: len(classes)].unbind(0))
        for token, value in zip(seen, x[len(classes) :], strict=True):
            image[token] = value
        if index == config.middle_head - 1:
            found = [net.middle_layer(image[token][None, None], condition)[0, 0] for token in seen]
            nothing = torch.zeros_like(found[0])
            middle = torch.stack([found[seen.index(i)] if i in seen else nothing for i in range(len(image))])
    final = net.final_layer(torch.stack(image)[None], condition)
    return net.unpatchify(final)[0], None if middle is None else net.unpatchify(middle[None])[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"middle_head": 1},  # before the route
        {"middle_head": 2},  # in its first block
        {"middle_head": 5},  # in its last block
        {"middle_head": 3, "in_context_start": 4},
        {"middle_head": 3, "in_context_start": 1},  # class tokens enter where the other tokens return
        {"middle_head": 4, "in_context_start": 5, "route_blocks": [1, 4]},  # class tokens enter after the route
        {"middle_head": 5, "in_context_start": 0, "route_blocks": [2, 4]},
        {"in_context_len": 0, "route_blocks": [0, 6]},  # all blocks are routed
        {"in_context_start": 3, "route_blocks": [3, 6], "route_share": 0.3},
        {"route_blocks": [5, 6], "route_share": 0.9},
        {"route_share": 0.0, "middle_head": 3},
    ],
)
def test_a_batch_equals_its_images_alone(changes: dict[str, Any]) -> None:
    """The predictions and the gradients of all parameters agree."""
    model = replace(MODEL, **changes)
    net, (z, t, y), kept = network(model), batch(), kept_tokens(model)
    with_middle = model.middle_head > 0
    found = net(z, t, y, kept if model.route_share > 0 else None, middle=with_middle)
    alone = [image_alone(net, z[i : i + 1], t[i : i + 1], y[i : i + 1], kept[i].tolist()) for i in range(BATCH)]
    parts = [torch.stack([final for final, _ in alone])]
    if with_middle:
        parts.append(torch.stack([middle for _, middle in alone if middle is not None]))
    expected = torch.stack(parts) if with_middle else parts[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    names, parameters = zip(*net.named_parameters(), strict=True)
    gradients = [torch.autograd.grad(out.square().mean(), parameters, allow_unused=True) for out in (found, expected)]
    for name, a, b in zip(names, *gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert float(a.abs().max()) > 0, name
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * float(b.abs().max()), msg=name)


def test_skipped_and_kept_tokens_do_not_see_each_other() -> None:
    """All blocks are routed, so pixels of skipped tokens change no kept token, and the other way round."""
    model = replace(MODEL, in_context_len=0, route_blocks=[0, 6])
    net, (z, t, y), kept = network(model), batch(), kept_tokens(model)
    z.requires_grad_()
    pixels = torch.zeros(BATCH, 16).scatter(1, kept, 1.0).view(BATCH, 1, 4, 4).repeat_interleave(4, 2)
    pixels = pixels.repeat_interleave(4, 3)
    out = net(z, t, y, kept)
    for mask in (pixels, 1 - pixels):
        (gradient,) = torch.autograd.grad((out * mask).sum(), z, retain_graph=True)
        assert float((gradient * mask).abs().max()) > 0
        assert float((gradient * (1 - mask)).abs().max()) == 0


def test_keeping_all_tokens_equals_no_routing() -> None:
    model = replace(MODEL, middle_head=3)
    net, inputs = network(model), batch()
    every = torch.arange(16).expand(BATCH, -1)
    torch.testing.assert_close(net(*inputs, every, middle=True), net(*inputs, middle=True), rtol=1e-5, atol=1e-6)


def test_inputs_for_missing_parts_of_the_network_are_refused() -> None:
    net, inputs = network(replace(MODEL, route_share=0.0, middle_head=0)), batch()
    with pytest.raises(ValueError, match="kept: this network routes no tokens"):
        net(*inputs, torch.arange(8).expand(BATCH, -1))
    with pytest.raises(ValueError, match="middle: this network has no middle output layer"):
        net(*inputs, middle=True)


def test_unused_parts_of_the_network_change_no_prediction() -> None:
    """With a route, a middle layer or neither, the weights are the same, and so is the prediction from all tokens."""
    plain, both = (network(replace(MODEL, route_share=share, middle_head=0)) for share in (0.0, 0.5))
    inputs = batch()
    assert torch.equal(plain(*inputs), both(*inputs))
    torch.manual_seed(5)
    drawn = JiT(replace(MODEL, middle_head=3))
    torch.manual_seed(5)
    without = JiT(MODEL)
    assert all(torch.equal(drawn.get_parameter(name), p) for name, p in without.named_parameters())
    more = {name for name, _ in drawn.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert {name.split(".")[0] for name in more} == {"middle_layer"}
    with torch.no_grad():
        for name, p in plain.named_parameters():
            drawn.get_parameter(name).copy_(p)
    assert torch.equal(drawn(*inputs), plain(*inputs))
    assert torch.equal(drawn(*inputs, middle=True)[0], plain(*inputs))


@pytest.mark.parametrize("middle_head", [1, 3, 5, 6])
def test_the_middle_loss_counts_the_tokens_of_its_layer(middle_head: int) -> None:
    model = replace(MODEL, middle_head=middle_head, depth=7)
    losses = Losses(model, DiffusionConfig(loss="x"), None, compiled=False)
    x, e, z = (torch.randn(BATCH, 3, 16, 16) for _ in range(3))
    t, kept = torch.rand(BATCH), kept_tokens(model)
    seen = torch.zeros(BATCH, 16).scatter(1, kept, 1.0).view(BATCH, 1, 4, 4)
    seen = seen.repeat_interleave(4, 2).repeat_interleave(4, 3).expand_as(x)
    prediction = torch.stack([x + 1, x + torch.where(seen > 0, 2.0, 30.0)])
    final, middle = losses(prediction, x, e, z, t, kept)
    assert middle is not None
    torch.testing.assert_close(final, torch.ones(BATCH))
    assert middle_is_routed(model) == (middle_head in (3, 5, 6))
    expected = torch.full((BATCH,), 4.0 if middle_is_routed(model) else (4.0 + 900.0) / 2)
    torch.testing.assert_close(middle, expected)
    _, of_all = losses(prediction, x, e, z, t, None)  # The last part of training has no routing.
    torch.testing.assert_close(of_all, torch.full((BATCH,), (4.0 + 900.0) / 2))
