"""What is counted from shapes next to real networks, and the plan that follows from it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from jitscale.config import (
    Config,
    EmaConfig,
    EngineConfig,
    ModelConfig,
    OptimConfig,
    image_shape,
    images_of_run,
    load_config,
    routed_blocks,
    routed_tokens,
)
from jitscale.model.attention import unfused
from jitscale.model.flops import forward_flops, mean_training_flops, training_flops
from jitscale.model.jit import JiT
from jitscale.planner.buckets import reduce_bucket_elements
from jitscale.planner.choice import candidate, recommend
from jitscale.planner.memory import (
    activation_bytes,
    objective_bytes,
    parameter_shapes,
    parameters_by_kind,
    state_memory,
)
from jitscale.planner.timing import Cluster, Communication, communication
from tests.support import ROOT
from tests.support.tiny import MODEL
from tests.support.tools import run_tool

TINY = replace(
    MODEL,
    image_size=64,
    patch_size=8,
    hidden_size=96,
    depth=4,
    num_heads=3,
    bottleneck_dim=24,
    in_context_len=8,
)
# Parameters: spec of the authors' code, for G from its layer sizes; GFLOP forward and TFLOP in training, rounded.
KNOWN = {
    "b": (131_123_712, 50.45, 0.1513),
    "l": (458_877_664, 175.9, 0.5277),
    "h": (952_514_368, 363.9, 1.0917),
    "g": (None, 767.5, 2.3025),
}


def planned(model: ModelConfig, decays: int = 0, **engine: Any) -> Config:
    """A run with `decays` averages."""
    averages = EmaConfig(decays=[1 - 0.1 / (index + 1) for index in range(decays)])
    return Config(model=model, engine=EngineConfig(**engine), ema=averages)


def traffic_of(
    model: ModelConfig, cluster: Cluster, micro_batch: int, micro_batches: int = 1, **engine: Any
) -> Communication:
    config = planned(model, micro_batch_size=micro_batch, **engine)
    config.data.batch_size = micro_batch * micro_batches * cluster.gpus
    return communication(config, cluster)


def shipped(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"jit_{name}.yaml", overrides)


@pytest.mark.parametrize("size", list(KNOWN))
def test_known_sizes(size: str) -> None:
    model = shipped(f"{size}_256").model
    parameters, forward, training = KNOWN[size]
    total = sum(parameters_by_kind(model).values())
    assert total == parameters if parameters is not None else total == pytest.approx(2007e6, rel=1e-3)
    assert forward_flops(model) / 1e9 == pytest.approx(forward, rel=1e-3)
    assert training_flops(model) / 1e12 == pytest.approx(training, rel=1e-3)


@pytest.mark.parametrize("model", [TINY, replace(TINY, in_context_len=0), replace(TINY, num_classes=0)])
def test_every_parameter_is_of_one_kind(model: ModelConfig) -> None:
    kinds = parameters_by_kind(model)
    network = JiT(model)
    assert sum(kinds.values()) == sum(p.numel() for p in network.parameters())
    blocks = list(network.blocks)
    assert kinds["attention"] == sum(
        p.numel() for b in blocks for m in (b.attn.qkv, b.attn.proj) for p in m.parameters()
    )  # type: ignore[union-attr]
    assert kinds["feed-forward"] == sum(p.numel() for b in blocks for p in b.mlp.parameters())  # type: ignore[union-attr]
    assert all(count > 0 for count in kinds.values())


class Kept:
    """Counts the bytes that autograd keeps inside the context, each storage once, parameters left out."""

    def __init__(self, network: JiT) -> None:
        tensors = [*network.parameters(), *network.buffers()]
        self._not_counted = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        self._held: dict[int, torch.Tensor] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._held.values())

    def __enter__(self) -> Kept:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._not_counted:
            self._held.setdefault(address, tensor)
        return tensor


def kept_bytes(model: ModelConfig, batch: int, precision: str, *, routed: bool = True) -> int:
    network = JiT(model).train()
    if precision == "bf16":
        network = network.bfloat16()
    z = torch.randn(batch, *image_shape(model)).to(next(network.parameters()).dtype)
    with Kept(network) as kept, torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        tokens = torch.arange(routed_tokens(model)).expand(batch, -1) if routed and routed_blocks(model) else None
        output = network(
            z, torch.rand(batch), torch.zeros(batch, dtype=torch.long), tokens, middle=model.middle_head > 0
        )
    assert output.requires_grad
    return kept.bytes


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (TINY, 1),
        (TINY, 6),
        (replace(TINY, in_context_len=0, depth=2), 3),
        (replace(TINY, hidden_size=192, num_heads=2, patch_size=16), 8),
        (replace(TINY, patch_size=16, in_channels=1, depth=3), 8),
    ],
)
def test_activations_are_what_autograd_keeps(model: ModelConfig, batch: int, precision: str) -> None:
    """Within 3%; 10% is asked for."""
    expected = activation_bytes(planned(model, precision=precision), batch)
    assert kept_bytes(model, batch, precision) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"route_share": 0.5},
        {"route_share": 0.25, "route_blocks": [0, 5], "in_context_start": 3},
        {"middle_head": 2},
        {"middle_head": 4, "route_share": 0.5, "route_blocks": [1, -1]},
    ],
)
def test_activations_of_routed_tokens_and_of_a_middle_layer(changes: dict[str, Any], precision: str) -> None:
    """Fewer if tokens are routed to the end of the run, and those of all tokens if not."""
    model = replace(TINY, **{"depth": 6, "route_blocks": [1, -1], **changes})
    config = planned(model, precision=precision)
    expected = activation_bytes(config, 6)
    assert kept_bytes(model, 6, precision) == pytest.approx(expected, rel=0.03)
    config.run.max_images, config.run.route_until_images = 100, 99
    of_all = activation_bytes(config, 6)
    assert kept_bytes(model, 6, precision, routed=False) == pytest.approx(of_all, rel=0.03)
    assert (of_all > 1.1 * expected) == (model.route_share > 0)
    config.run.route_until_images = 100
    assert activation_bytes(config, 6) == expected


def test_a_middle_layer_has_a_loss_of_its_own() -> None:
    for channels in (1, 3):
        sizes = [objective_bytes(replace(TINY, middle_head=block, in_channels=channels), 2) for block in (0, 2)]
        assert sizes == [2 * 4 * channels * 64**2 * tensors for tensors in (6, 9)]


def counted_flops(model: ModelConfig) -> int:
    """By torch, of forward and backward passes of one image, products and attention."""
    network = JiT(model).train()
    for block in network.blocks:
        block.attn.kernel = unfused  # torch does not count the fused one of CPUs
    kept = torch.arange(routed_tokens(model))[None] if routed_blocks(model) else None
    z = torch.randn(1, *image_shape(model))
    with FlopCounterMode(display=False) as counter:
        out = network(z, torch.rand(1), torch.zeros(1, dtype=torch.long), kept, middle=True)
        forward = counter.get_total_flops()
        out.square().mean().backward()
    assert counter.get_total_flops() > 2 * forward
    return forward


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"route_share": 0.0},
        {"middle_head": 1},
        {"middle_head": 6, "route_blocks": [0, 6]},
        {"route_share": 0.3, "in_context_start": 0},
        {"in_context_len": 0},
        {"in_channels": 1},
    ],
)
def test_flops_are_those_that_torch_counts(changes: dict[str, Any]) -> None:
    """Of a forward pass in training; to the last one."""
    model = replace(TINY, **{"depth": 7, "middle_head": 3, "route_share": 0.5, "in_context_start": 3, **changes})
    assert counted_flops(model) == forward_flops(model, training=True)
    assert forward_flops(model) == forward_flops(replace(model, route_share=0.0, middle_head=0))


@pytest.mark.parametrize(("size", "share"), [("b", 0.686), ("l", 0.608), ("h", 0.591), ("g", 0.584)])
def test_half_of_the_tokens_cost_so_much(size: str, share: float) -> None:
    """Of a step's operations, with the default blocks, all but two at each end."""
    config = shipped(f"{size}_256", "model.route_share=0.5")
    whole = training_flops(config.model, routed=False)
    assert whole == training_flops(shipped(f"{size}_256").model)
    assert training_flops(config.model) / whole == pytest.approx(share, abs=0.001)


def test_routing_shortens_the_plan() -> None:
    """By the operations that it saves, in the part of the run in which it acts."""
    plain, routed = shipped("h_256"), shipped("h_256", "model.route_share=0.5")
    cluster = Cluster(gpus=32, gpu_memory=141e9)
    before, after = (candidate(config, cluster, stage=1, micro_batch=32) for config in (plain, routed))
    saved = training_flops(routed.model) / training_flops(plain.model)
    assert after.compute_seconds / before.compute_seconds == pytest.approx(saved)
    assert after.memory.activations < 0.65 * before.memory.activations
    routed.run.route_until_images = images_of_run(routed) // 4 * 3
    ends = candidate(routed, cluster, stage=1, micro_batch=32)
    assert ends.compute_seconds / before.compute_seconds == pytest.approx(0.75 * saved + 0.25, rel=1e-6)
    assert ends.memory.activations == before.memory.activations, "the last part needs them"
    assert mean_training_flops(routed) == pytest.approx(
        0.75 * training_flops(routed.model) + 0.25 * training_flops(plain.model), rel=1e-6
    )


@pytest.mark.parametrize("precision", ["fp32", pytest.param("autocast", marks=pytest.mark.slow)])
def test_activations_of_jit_b(precision: str) -> None:
    model = replace(shipped("b_256").model, depth=6, num_classes=10)
    expected = activation_bytes(planned(model, precision=precision), 1)
    assert kept_bytes(model, 1, precision) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_keeps_inputs_and_one_block(monkeypatch: pytest.MonkeyPatch, every: int, precision: str) -> None:
    """What autograd keeps around checkpointed blocks, their inputs among it, and the largest one computed again."""
    network = JiT(TINY).train()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = network.to(dtype)
    blocks: list[int] = []

    def checkpointed(forward: Any) -> Any:
        def run(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            with Kept(network) as kept:
                forward(x, *others)
            blocks.append(kept.bytes)
            return checkpoint(forward, x, *others, use_reentrant=False)

        return run

    for block in network.blocks[::every]:
        monkeypatch.setattr(block, "forward", checkpointed(block.forward))
    z, t, y = torch.randn(8, 3, 64, 64, dtype=dtype), torch.rand(8), torch.zeros(8, dtype=torch.long)
    with Kept(network) as around:
        output = network(z, t, y)
    assert output.requires_grad
    expected = activation_bytes(planned(TINY, precision=precision, activation_checkpointing=every), 8)
    assert around.bytes + max(blocks) == pytest.approx(expected, rel=0.03)


def test_checkpointing_more_blocks_keeps_less() -> None:
    model = shipped("h_256").model
    kept = [activation_bytes(planned(model, precision="bf16", activation_checkpointing=k), 16) for k in (1, 2, 4, 0)]
    assert all(a < b for a, b in pairwise(kept))


def test_memory_by_the_rule_of_sixteen_bytes() -> None:
    """fp32: 4 bytes a parameter each for weight, gradient, master and average, 8 for moments."""
    model = shipped("b_256").model
    count = sum(parameters_by_kind(model).values())
    memory = {s: state_memory(planned(model, 3, zero_stage=s, precision="fp32"), ranks=8) for s in range(4)}
    assert memory[0].state == pytest.approx(count * (4 + 4 + 8 + 12 / 8))
    assert memory[1].state == pytest.approx(count * (4 + 4 + (4 + 8 + 12) / 8))
    assert memory[2].state == pytest.approx(count * (4 + (4 + 4 + 8 + 12) / 8))
    assert memory[3].state == pytest.approx(count * (4 + 4 + 4 + 8 + 12) / 8, rel=0.02)
    half = state_memory(planned(model, 3, zero_stage=3, precision="bf16"), ranks=8)
    assert half.weights == pytest.approx(memory[3].weights / 2)
    assert half.gradients == memory[3].gradients
    stage_2 = planned(model, zero_stage=2, precision="fp32")
    largest = max(math.prod(shape) for shape in parameter_shapes(model).values())
    assert state_memory(stage_2, ranks=8).buckets == 2 * 4 * reduce_bucket_elements(count, largest, 8)
    alone = planned(model, zero_stage=1, precision="fp32")
    assert state_memory(alone, ranks=1).buckets == 0, "one rank has nothing to reduce"


@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16"])
def test_more_ranks_or_a_higher_stage_never_take_more(precision: str) -> None:
    model = shipped("l_256").model
    table = {
        (stage, ranks): state_memory(planned(model, 2, zero_stage=stage, precision=precision), ranks).state
        for stage in (1, 2, 3)
        for ranks in (2, 4, 8, 64)
    }
    for ranks in (2, 4, 8, 64):
        assert table[1, ranks] > table[2, ranks] > table[3, ranks]
    for stage in (1, 2, 3):
        assert all(table[stage, a] > table[stage, b] for a, b in pairwise((2, 4, 8, 64)))


def test_bytes_and_seconds_on_the_wire() -> None:
    model = shipped("b_256").model
    size = 4 * 131_123_712
    node = Cluster(gpus=8, gpu_memory=80e9, intra=400e9)
    one, two, three = (traffic_of(model, node, 16, micro_batches=2, zero_stage=s) for s in (1, 2, 3))
    part = 7 / 8 * size
    assert one.bytes == pytest.approx(3 * part)  # all-reduce once, gather once
    assert two.bytes == pytest.approx(5 * part)  # all-reduce twice, gather once
    assert three.bytes == pytest.approx(6 * part)  # two gathers and a reduce-scatter, twice
    for traffic in (one, two, three):
        assert traffic.seconds == pytest.approx(traffic.bytes / 400e9)
    assert one.after_step == pytest.approx(part / 400e9)
    assert three.after_step == 0
    assert traffic_of(model, node, 16, zero_stage=1, precision="bf16").bytes == pytest.approx(1.5 * part)
    # Two nodes: each receives half through its eight cards, which is slower than the links inside.
    nodes = replace(node, gpus=16, inter=10e9)
    between = traffic_of(model, nodes, 16, zero_stage=1)
    assert between.after_step == pytest.approx(0.5 * size / (8 * 10e9))
    alone = traffic_of(model, replace(node, gpus=1), 16, zero_stage=3)
    assert (alone.bytes, alone.seconds, alone.exposed) == (0, 0, 0)


def test_what_backward_cannot_hide() -> None:
    model = shipped("h_256").model
    cluster = Cluster(gpus=64, gpu_memory=141e9)
    for stage in (1, 2, 3):
        exposed = [traffic_of(model, cluster, b, zero_stage=stage).exposed for b in (1, 4, 16, 64, 256)]
        assert exposed == sorted(exposed, reverse=True)
        enough = traffic_of(model, cluster, 1, zero_stage=stage).hiding_batch
        assert enough is not None
        batches = (enough, enough - 1, 10 * enough)
        at, below, above = (traffic_of(model, cluster, b, zero_stage=stage) for b in batches)
        assert at.exposed == above.exposed < below.exposed
        # With nothing but the first piece to wait for, and the gather after the update.
        assert at.exposed == pytest.approx(at.after_step + (at.seconds - at.after_step) / model.depth)
    waiting = traffic_of(model, replace(cluster, overlap=False), 16, zero_stage=1)
    assert waiting.exposed == pytest.approx(waiting.seconds)
    assert waiting.hiding_batch is None
    late = traffic_of(model, cluster, 16, zero_stage=1, precision="bf16")
    assert late.exposed == pytest.approx(late.seconds)


def test_hpz_gathers_for_backward_within_a_node() -> None:
    model = shipped("g_512").model
    cluster = Cluster(gpus=64, gpu_memory=141e9, inter=5e9)
    clusters = [replace(cluster, hpz=on) for on in (False, True)]
    plain, hpz = (traffic_of(model, one, 4, zero_stage=3, precision="bf16") for one in clusters)
    assert hpz.exposed < plain.exposed
    assert hpz.seconds < 0.7 * plain.seconds
    runs = [planned(model, zero_stage=3, precision="bf16", hpz_group_size=size) for size in (1, 8)]
    memory = [state_memory(run, ranks=64).weights for run in runs]
    assert memory[1] - memory[0] == pytest.approx(2 * sum(parameters_by_kind(model).values()) / 8)


def test_recommendations() -> None:
    small = recommend(shipped("b_256"), Cluster(gpus=8, gpu_memory=80e9))
    assert small is not None
    assert (small.stage, small.activation_checkpointing) == (1, 0)
    assert small.micro_batch_size > 16
    large = shipped("g_512")
    roomy = recommend(large, Cluster(gpus=64, gpu_memory=141e9))
    assert roomy is not None
    assert (roomy.micro_batch_size, roomy.activation_checkpointing) == (16, 0)
    tight = recommend(large, Cluster(gpus=64, gpu_memory=12e9))
    assert tight is not None
    assert tight.stage == 3
    assert tight.activation_checkpointing > 0
    assert tight.memory.total <= 0.9 * 12e9
    assert tight.step_seconds > roomy.step_seconds
    assert recommend(large, Cluster(gpus=1, gpu_memory=24e9)) is None


def test_the_recipe_of_bf16_weights_is_what_is_recommended() -> None:
    config = shipped("h_256_bf16")
    choice = recommend(config, Cluster(gpus=16, gpu_memory=141e9))
    assert choice is not None
    assert choice.stage == config.engine.zero_stage == 2
    autocast = recommend(shipped("h_256"), Cluster(gpus=16, gpu_memory=141e9))
    assert autocast is not None
    assert choice.communication.bytes == autocast.communication.bytes / 2
    assert choice.step_seconds < autocast.step_seconds
    assert choice.memory.total < autocast.memory.total - 5e9
    reason = "with bf16 weights, stage 1 would reduce whole gradients after backward"
    assert reason in plan("--config", "configs/jit_h_256_bf16.yaml", "--gpu-memory", "141GB", "--gpus", "16")


def test_a_recommended_choice_is_the_fastest_of_its_stage() -> None:
    config, cluster = shipped("h_256"), Cluster(gpus=16, gpu_memory=80e9)
    choice = recommend(config, cluster)
    assert choice is not None
    for micro_batch in (8, 16, 32, 64):
        other = candidate(config, cluster, stage=choice.stage, micro_batch=micro_batch)
        assert not other.fits or other.step_seconds >= choice.step_seconds * (1 - 1e-9)


def plan(*arguments: str, expect: int = 0) -> str:
    finished = run_tool("plan", *arguments)
    assert finished.code == expect, finished.err
    return finished.out if expect == 0 else finished.err


G = ("--config", "configs/jit_g_512.yaml", "--gpu-memory", "141GB")


def test_json_is_consistent() -> None:
    result = json.loads(plan(*G, "--gpus", "64", "--json", "data.batch_size=2048"))
    assert result["images_per_gpu"] == 32
    assert result["parameters"]["total"] == sum(n for kind, n in result["parameters"].items() if kind != "total")
    assert {s["stage"] for s in result["stages"]} == {1, 2, 3}, "stage 0 runs in fp32 only"
    for option in [*result["stages"], result["recommended"]]:
        parts = [size for part, size in option["memory"].items() if part != "total"]
        assert option["memory"]["total"] == pytest.approx(sum(parts))
        gpu = option["compute_seconds"] + option["communication"]["exposed"]
        assert option["step_seconds"] == pytest.approx(max(gpu, option["host_seconds"]))
        assert option["images_per_second"] == pytest.approx(2048 / option["step_seconds"])
        assert option["days"] * 86_400 * option["images_per_second"] == pytest.approx(768_700_200)
        assert option["gpu_hours"] == pytest.approx(option["days"] * 24 * 64)
    # 64 GPUs with 16 images each, whatever the batch of the run.
    assert [s["communication"]["hiding_batch"] for s in result["paper_batch"]] == [9, 9, 9]


def test_text() -> None:
    text = plan(*G, "--gpus", "64")
    assert "Times are estimates from the steps of one H200 machine" in text
    assert "Assumptions: products run at 39% of 989 TFLOP/s" in text
    overrides = text.strip().splitlines()[-1].split()
    assert [override.partition("=")[0] for override in overrides] == [
        "engine.zero_stage",
        "engine.micro_batch_size",
        "engine.activation_checkpointing",
    ]
    assert "Nothing fits" in plan("--config", "configs/jit_g_512.yaml", "--gpu-memory", "16GiB", "--gpus", "1")
    assert "| 0 | off |" in plan(*G, "--gpus", "8", "engine.precision=fp32")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--gpus", "8", "--gpu-memory", "141XB"), "argument --gpu-memory: '141XB' must be"),
        (("--gpus", "8", "--gpu-memory", "0GB"), "argument --gpu-memory: '0GB' must be"),
        (("--gpus", "0"), "argument --gpus: '0' is not a positive integer"),
        (("--gpus", "many"), "argument --gpus: 'many' is not a positive integer"),
        (("--gpus", "12"), "--gpus 12: must fill nodes of --gpus-per-node 8; for example 16"),
        (("--gpus", "7"), "data.batch_size=1024 must be a multiple of the number of ranks, 7"),
        (("--gpus", "8", "--mfu", "1.5"), "argument --mfu: '1.5' must be a number between 0 and 1"),
        (("--gpus", "8", "--bandwidth-inter", "50GB"), "argument --bandwidth-inter: '50GB' must be"),
        (("--gpus", "8", "--peak", "inf"), "argument --peak: 'inf' must be a number between 0 and 1e+09"),
        (("--gpus", "8", "optim.lrr=1"), "did you mean optim.lr?"),
    ],
)
def test_mistakes_are_one_line(arguments: tuple[str, ...], said: str) -> None:
    message = plan(*G, *arguments, expect=2)
    assert said in message
    assert len(message.strip().splitlines()) == 1


def test_muon_has_one_moment_for_hidden_matrices() -> None:
    config = planned(TINY, precision="fp32")
    adamw, muon = (
        state_memory(replace(config, optim=OptimConfig(name=name)), ranks=4).moments for name in ("adamw", "muon")
    )
    matrices = sum(
        p.numel()
        for name, p in JiT(TINY).named_parameters()
        if p.ndim == 2 and name.startswith(("blocks", "final_layer.ada"))
    )
    assert adamw - muon == pytest.approx(4 * matrices / 4)
