"""The comparisons of the suite notice CUDA graphs and fused kernels that are wrong or were not used.

On CPUs graphs are emulated, as in tests/model/test_training_graphs.py, and torch's code replaces the fused kernels.
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import correct, correct_graphs, correct_norms
from benchmarks.correct import Comparison
from benchmarks.measuring import read_config
from benchmarks.suite_items import CONFIGS, SMALL_NETWORK
from jitscale.config import Config, EngineConfig
from jitscale.errors import ConfigError
from jitscale.model import execution, layers
from jitscale.model.jit import JiT
from jitscale.model.training_graphs import TrainingGraphs
from tests.model.test_training_graphs import EmulatedGraph, emulated

__all__ = ["emulated"]  # a fixture

CPU = torch.device("cpu")


@pytest.fixture
def config() -> Config:
    return read_config(CONFIGS["h"], ["run.max_steps=1000", "tracking.wandb=off", *SMALL_NETWORK])


def wrong(comparisons: list[Comparison]) -> list[str]:
    return [each.name for each in comparisons if each.error is not None and not each.holds]


# ---- CUDA graphs ----


@pytest.fixture
def graphs(emulated: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch) -> type[EmulatedGraph]:
    """If a network requests graphs, it gets emulated ones."""

    def prepare(model: JiT, engine: EngineConfig, device: torch.device, **more: Any) -> execution.Execution:
        if engine.compile:
            raise ConfigError("what is compiled cannot be emulated")
        with_graphs, every = engine.cuda_graphs, engine.activation_checkpointing
        engine.cuda_graphs = False
        engine.activation_checkpointing = 0 if with_graphs else every
        prepared = execution.prepare(model, engine, device, **more)
        if with_graphs:
            recomputed = [index for index in range(len(model.blocks)) if every and index % every == 0]
            TrainingGraphs(model, recomputed=recomputed, accumulate=more.get("micro_batches", 1) > 1)
        return prepared

    for module in (correct, correct_graphs):
        monkeypatch.setattr(module, "prepare", prepare)
    # On CPUs the last bits depend on the address of a tensor.
    monkeypatch.setattr(correct_graphs, "same", lambda a, b: correct.distance(a, b) < 0.05)
    cases = [(False, 0.2, 1, 2), (False, 0.0, 0, 1), (True, 0.0, 0, 1)]
    monkeypatch.setattr(correct_graphs, "CASES", cases)
    return emulated


def network_in_graphs(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[Comparison]:
    ways = [way for way in correct.ways() if way[0] in ("plain", "cuda_graphs", "cuda_graphs, recomputed")]
    assert len(ways) == 3
    monkeypatch.setattr(correct, "ways", lambda: ways)
    return list(correct._network(config, CPU, "smoke"))


def test_a_network_in_graphs_is_compared_where_they_are_replayed(
    config: Config, graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = network_in_graphs(config, monkeypatch)
    assert wrong(found) == []
    assert {each.name for each in found} >= {"cuda_graphs: output", "cuda_graphs, recomputed: gradients"}
    assert [graph.replays for graph in graphs.made] == [correct.GRAPH_PASSES - 1] * 2 * 3 * 2


def test_graphs_with_wrong_results_are_noticed(
    config: Config, graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a graph is replayed only once, so it repeats the outputs of its first inputs."""
    replay = EmulatedGraph.replay

    def replay_once(graph: EmulatedGraph) -> None:
        if graph.replays == 0:
            replay(graph)

    monkeypatch.setattr(EmulatedGraph, "replay", replay_once)
    assert {"cuda_graphs: output", "cuda_graphs: gradients"} <= set(wrong(network_in_graphs(config, monkeypatch)))
    assert (
        len([name for name in wrong(list(correct_graphs.training(config, CPU, "smoke"))) if "different" in name]) == 2
    )


def test_graphs_that_are_not_used_are_noticed(
    config: Config, graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingGraphs, "__init__", lambda self, network, **_: None)
    names = wrong(network_in_graphs(config, monkeypatch))
    assert names == [f"{way}: passes of blocks without a graph" for way in ("cuda_graphs", "cuda_graphs, recomputed")]
    names = wrong(list(correct_graphs.training(config, CPU, "smoke")))
    assert any(name.endswith("passes of blocks without a graph") for name in names)


def test_a_failed_capture_is_reported_as_wrong(
    config: Config, graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: EmulatedGraph, pool: object, capture_error_mode: str) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(EmulatedGraph, "capture_begin", fail)
    assert "cuda_graphs" in wrong(network_in_graphs(config, monkeypatch))
    found = list(correct_graphs.training(config, CPU, "smoke"))
    assert len(wrong(found)) == 2
    assert found[-1].note == "what is compiled cannot be emulated", "a refused way is not computed"
    assert found[-1].error is None


def test_training_in_graphs_gives_the_same_results(config: Config, graphs: type[EmulatedGraph]) -> None:
    found = list(correct_graphs.training(config, CPU, "smoke"))
    assert wrong(found) == []
    assert [each.error for each in found] == [0.0] * 4 + [None]
    assert graphs.made[0].replays == correct_graphs.STEPS * 2 - 1


def test_training_that_differs_reports_whether_it_is_reproducible(
    config: Config, graphs: type[EmulatedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correct_graphs, "same", lambda a, b: False)
    first, *_ = correct_graphs.training(config, CPU, "smoke")
    assert first.error > 0  # type: ignore[operator]
    assert "without graphs, a second run has" in first.note


# ---- fused kernels ----


def kept_by(like: Tensor, seed: Tensor | None, dropout: float) -> Tensor | float:
    """The factor of inverted dropout, a function of the seed."""
    if seed is None:
        return 1.0
    draws = torch.Generator().manual_seed(int(seed))
    return (torch.rand(like.shape, generator=draws) >= dropout) / (1 - dropout)


def heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
    found = correct_norms.exact_heads(qkv.float(), [q_weight, k_weight], rope)
    return tuple(each.to(qkv.dtype) for each in found)


def gate(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    y = layers.gated(h.float())
    return (y * kept_by(y, seed, dropout)).to(h.dtype)


def norm(x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    normed = layers.rms_norm(x.float(), weight)
    return (normed * (1 + scale.float()[:, None]) + shift.float()[:, None]).to(x.dtype)


def add(x: Tensor, branch: Tensor, by: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    return (x.float() + by.float()[:, None] * (branch.float() * kept_by(branch, seed, dropout))).to(x.dtype)


def add_and_norm(
    x: Tensor,
    branch: Tensor,
    by: Tensor,
    weight: Tensor,
    shift: Tensor,
    scale: Tensor,
    seed: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    out = add(x, branch, by, seed, dropout)
    return out, norm(out, weight, shift, scale)


@pytest.fixture
def compared(config: Config, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Comparison]]:
    """Compares stand-ins for the kernels with torch's code. `replaced` are wrong stand-ins."""

    def compare(**replaced: Any) -> list[Comparison]:
        own = {"split_heads": heads, "gated_with_seed": gate, "modulated_norm": norm, "gated_add": add}
        kernels = SimpleNamespace(**{**own, "add_and_norm": add_and_norm, "COMPILED": False, **replaced})
        for name in ("gated", "heads", "residual"):
            monkeypatch.setitem(sys.modules, f"jitscale.model.fused.{name}", kernels)
            monkeypatch.setattr(f"jitscale.model.fused.{name}", kernels, raising=False)
        return list(correct_norms.fused(config, CPU, "smoke"))

    return compare


def test_right_fused_kernels_are_accepted(compared: Callable[..., list[Comparison]]) -> None:
    found = compared()
    assert wrong(found) == []
    names = " ".join(each.name for each in found)
    assert all(word in names for word in ("heads, 20 tokens", "heads, 16 tokens", "heads first", "gate", "residual"))
    assert {"dropout 0.0", "dropout 0.2"} <= {each.name.split(", ")[2].partition(":")[0] for each in found}


class RedrawnInBackward(torch.autograd.Function):
    """A gate whose backward pass drops other elements than its forward pass."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.seed, ctx.dropout = seed, dropout
        return gate(h, seed, dropout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        h = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = gate(h, None if ctx.seed is None else ctx.seed + 1, ctx.dropout)
            return torch.autograd.grad(y, h, gradient)[0], None, None


def test_wrong_fused_kernels_are_noticed(compared: Callable[..., list[Comparison]]) -> None:
    def without_scale(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        return gate(h, seed, dropout) * (1 - dropout)

    def zero_where_small(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        """An error that a mask of the non-zero elements would hide."""
        y = gate(h, seed, dropout)
        return torch.where(y.abs() < 0.1, 0 * y, y)

    def other_share(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
        y = layers.gated(h.float())
        return (y * (kept_by(y, seed, dropout / 2) != 0) / (1 - dropout)).to(h.dtype)

    def gate_of_dropout_only(operator: Callable[..., Tensor]) -> list[str]:
        return wrong(compared(gated_with_seed=operator))

    with_dropout = "fused kernels, tiny, dropout 0.2"
    assert gate_of_dropout_only(without_scale) == [f"{with_dropout}: gate"]
    assert gate_of_dropout_only(RedrawnInBackward.apply) == [f"{with_dropout}: gate"]
    assert gate_of_dropout_only(other_share) == [f"{with_dropout}: gate: the share that is kept"]
    assert f"{with_dropout}: gate" in gate_of_dropout_only(zero_where_small)

    def not_rotated(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, rope: Tensor) -> tuple[Tensor, ...]:
        return heads(qkv, q_weight, k_weight, torch.stack([torch.ones_like(rope[0]), torch.zeros_like(rope[0])]))

    assert len(wrong(compared(split_heads=not_rotated))) == 4
    found = compared(modulated_norm=lambda x, weight, shift, scale: norm(x, weight, shift, 0 * scale))
    assert wrong(found) == [f"fused kernels, tiny, dropout {p}: residual" for p in (0.0, 0.2)]


def test_fused_kernels_without_a_gpu_are_not_computed(compared: Callable[..., list[Comparison]]) -> None:
    (only,) = compared(COMPILED=True)
    assert (only.error, only.note) == (None, "not runnable here: they need a GPU, and this is cpu")


def test_fused_kernels_without_triton_are_not_computed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gated", "heads", "residual"):
        monkeypatch.delitem(sys.modules, f"jitscale.model.fused.{name}", raising=False)
        monkeypatch.delattr(f"jitscale.model.fused.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    (only,) = correct_norms.fused(config, CPU, "smoke")
    assert only.error is None
    assert only.note.startswith("not runnable here: ")
    assert "triton" in only.note
