"""Internal guidance: its formula, its interval, and that it costs no evaluation of the network."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import jitscale
from jitscale.config import DiffusionConfig
from jitscale.config.schema import METHODS
from jitscale.diffusion.sampler import Sampler
from jitscale.model.cuda_graphs import CudaGraphs
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL

NULL = 10
LABELS = torch.tensor([1, 2])


class Counting:
    """A v-prediction network that records its calls. Its two predictions are multiples of (label + 1) z."""

    def __init__(self, final: float = 0.3, middle: float = 0.1) -> None:
        self.scales = torch.tensor([final, middle])
        self.calls: list[tuple[float, list[int], bool]] = []

    def __call__(self, z: Tensor, t: Tensor, y: Tensor, *, middle: bool = False) -> Tensor:
        self.calls.append((round(float(t[0]), 4), y.tolist(), middle))
        both = self.scales.view(2, 1, 1, 1, 1) * (y.view(-1, 1, 1, 1) + 1) * z
        return both if middle else both[0]


def noise() -> Tensor:
    return torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("guide", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_it_adds_no_evaluation(method: str, scale: float, guide: bool) -> None:
    """This holds with and without classifier-free guidance or a guide. The guide never computes its middle layer."""
    sampler = Sampler(method, 10, scale, (0.35, 0.8), "v", internal_interval=(0.2, 0.6))
    calls, of_guide = [], []
    for w in (1.0, 1.5):
        network, other = Counting(), Counting()
        guided = replace(sampler, internal_guidance=w)
        guided.sample(network, noise(), LABELS, NULL, other if guide else None)
        calls.append(network.calls)
        of_guide.append(other.calls)
        evaluations = [len(y) / len(LABELS) for _, y, _ in [*network.calls, *other.calls]]
        assert sum(guided.evaluations()) == sum(evaluations)
    assert [call[:2] for call in calls[0]] == [call[:2] for call in calls[1]]
    assert not any(middle for _, _, middle in [*calls[0], *of_guide[0], *of_guide[1]])
    assert of_guide[0] == of_guide[1]
    seen = [0.3, 0.4, 0.5]  # 0.2 and 0.6 are already outside. Heun's steps use each time twice.
    assert [t for t, _, middle in calls[1] if middle] == (sorted(seen * 2) if method == "heun" else seen)
    assert len(calls[1]) == (19 if method == "heun" else 10)


@pytest.mark.parametrize(("interval", "inside"), [((0.0, 0.4), [0.0, 0.2]), ((0.4, 1.0), [0.6, 0.8])])
def test_the_edges_of_the_interval(interval: tuple[float, float], inside: list[float]) -> None:
    """A low end of 0 includes t = 0, as for classifier-free guidance."""
    network = Counting()
    sampler = Sampler("ab2", 5, 1.0, prediction="v", internal_guidance=2.0, internal_interval=interval)
    sampler.sample(network, noise(), LABELS, NULL)
    assert [t for t, _, middle in network.calls if middle] == inside


def test_it_is_applied_first_inside_each_branch() -> None:
    """In one Euler step from t = 0 to 1, v = v_u + s (v_c - v_u), and each of v_u and v_c is v_m + w (v - v_m)."""
    step = Sampler("euler", 1, 1.0, (0.0, 1.0), "v", internal_guidance=1.5)
    z, labels = noise(), LABELS.view(-1, 1, 1, 1) + 1
    own = 0.1 + 1.5 * (0.3 - 0.1)

    def sampled(sampler: Sampler, guide: Counting | None = None) -> Tensor:
        return sampler.sample(Counting(), z, LABELS, NULL, guide)

    torch.testing.assert_close(sampled(step), z + own * labels * z)
    free = replace(step, guidance_scale=3.0)
    weak, strong = own * (NULL + 1) * z, own * labels * z
    torch.testing.assert_close(sampled(free), z + weak + 3.0 * (strong - weak))
    weak = 0.2 * labels * z
    torch.testing.assert_close(sampled(free, Counting(0.2, 9.0)), z + weak + 3.0 * (strong - weak))


def network(middle_head: int, **diffusion: Any) -> JiT:
    """The same network with or without a middle output layer. None of its weights is zero."""
    model = JiT(replace(MODEL, middle_head=middle_head), DiffusionConfig(**diffusion)).eval()
    torch.manual_seed(0)
    for _, parameter in sorted(model.named_parameters(), key=lambda named: ("middle" in named[0], named[0])):
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_scale_1_gives_the_same_samples_as_no_internal_guidance(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are bit-equal, and the middle layer is not computed."""
    settings: dict[str, Any] = {"seed": 3, "method": method, "steps": 4, "guidance_scale": 2.0}
    model = network(1)
    before = jitscale.sample(network(0), [1, 2], **settings)
    changed = jitscale.sample(model, [1, 2], **settings, internal_guidance=1.5)
    assert not torch.equal(changed, before)
    monkeypatch.setattr(model.middle_layer, "forward", None)
    assert torch.equal(jitscale.sample(model, [1, 2], **settings, internal_guidance=1.0), before)


def test_no_block_of_a_network_sees_more_images() -> None:
    """Count the images in each block and in the middle layer, without and with internal guidance."""
    model = network(1)
    seen: dict[str, int] = {}
    for name, module in [("middle", model.middle_layer), *model.blocks.named_children()]:
        seen[name] = 0

        def count(module: torch.nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            seen[name] += len(output)

        module.register_forward_hook(count)
    found = []
    for w in (1.0, 1.5):
        seen.update(dict.fromkeys(seen, 0))
        jitscale.sample(model, [1, 2], seed=3, method="heun", steps=4, guidance_scale=2.0, internal_guidance=w)
        found.append(dict(seen))
    images = 2 * (7 + 6)  # Each image has seven evaluations; six of them are repeated without labels.
    assert found[0] == {"middle": 0, **{str(index): images for index in range(MODEL.depth)}}
    assert found[1] == {**found[0], "middle": images}


@pytest.mark.parametrize(("rank", "same"), [(0, "x"), (48, "v")])
def test_it_works_with_rank_asymmetric_prediction(rank: int, same: str) -> None:
    """At the two ends, which are x- and v-prediction.

    The middle layer, guidance and a multistep method are included.
    """
    settings: dict[str, Any] = {"seed": 3, "method": "ab2", "steps": 5, "guidance_scale": 2.0, "time_shift": 1.5}
    found, expected = (
        jitscale.sample(network(1, **diffusion), [1, 2], **settings, internal_guidance=1.5)
        for diffusion in ({"prediction": "asym", "rank": rank}, {"prediction": same})
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_library_refuses_impossible_arguments() -> None:
    with pytest.raises(ValueError, match=r"internal_guidance: need a network with a middle output layer .* for 1\.5"):
        jitscale.sample(network(0), [1], internal_guidance=1.5)
    with pytest.raises(ValueError, match=r"time_shift: must be in \[0\.01, 100\], got -1"):
        jitscale.sample(network(0), [1], time_shift=-1)


class Eager(CudaGraphs):
    """Graphs that a CPU can record. A replay computes."""

    def _record(self, z: Tensor, t: Tensor, y: Tensor, *, middle: bool) -> Any:
        inputs = (z.clone(), t.clone(), y.clone())
        output = self._forward(*inputs, middle=middle)

        class Graph:
            def replay(self) -> None:
                output.copy_(forward(*inputs, middle=middle))

        forward = self._forward
        return Graph(), inputs, output


def test_cuda_graphs_are_called_with_the_middle_layer() -> None:
    """Each kind of call has a graph of its own, and the predictions equal the network's."""
    model, graphed = network(1), network(1)
    graphs = Eager(graphed.forward)
    graphed.forward = graphs  # type: ignore[method-assign, assignment]
    settings: dict[str, Any] = {"steps": 6, "guidance_scale": 2.0, "internal_guidance": 1.5}
    settings |= {"guidance_interval": (0.3, 0.8), "internal_interval": (0.2, 0.6)}
    assert torch.equal(jitscale.sample(graphed, [1, 2], **settings), jitscale.sample(model, [1, 2], **settings))
    assert {key[:2] for key in graphs._recorded} == {(2, False), (4, False), (4, True)}
