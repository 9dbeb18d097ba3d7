"""The memory and the communication of a run, and the plan that follows from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jitscale.config import ModelConfig, OptimConfig, images_of_run
from jitscale.model.flops import mean_training_flops, training_flops
from jitscale.model.jit import JiT
from jitscale.planner.buckets import reduce_bucket_elements
from jitscale.planner.choice import candidate, recommend
from jitscale.planner.memory import parameter_shapes, parameters_by_kind, state_memory
from jitscale.planner.timing import Cluster, Communication, communication
from tests.planner.runs import TINY, planned, shipped
from tests.support.tools import run_tool


def traffic_of(
    model: ModelConfig, cluster: Cluster, micro_batch: int, micro_batches: int = 1, **engine: Any
) -> Communication:
    config = planned(model, micro_batch_size=micro_batch, **engine)
    config.data.batch_size = micro_batch * micro_batches * cluster.gpus
    return communication(config, cluster)


def test_routing_shortens_the_plan() -> None:
    """The time falls by the saved operations, in the part of the run that routes."""
    plain, routed = shipped("h_256"), shipped("h_256", "model.route_share=0.5")
    cluster = Cluster(gpus=32, gpu_memory=141e9)
    before, after = (candidate(config, cluster, stage=1, micro_batch=32) for config in (plain, routed))
    saved = training_flops(routed.model) / training_flops(plain.model)
    assert after.compute_seconds / before.compute_seconds == pytest.approx(saved)
    assert after.memory.activations < 0.65 * before.memory.activations
    routed.run.route_until_images = images_of_run(routed) // 4 * 3
    ends = candidate(routed, cluster, stage=1, micro_batch=32)
    assert ends.compute_seconds / before.compute_seconds == pytest.approx(0.75 * saved + 0.25, rel=1e-6)
    assert ends.memory.activations == before.memory.activations, "the last part of the run keeps all tokens"
    assert mean_training_flops(routed) == pytest.approx(
        0.75 * training_flops(routed.model) + 0.25 * training_flops(plain.model), rel=1e-6
    )


def test_memory_by_the_rule_of_sixteen_bytes() -> None:
    """In fp32 each parameter takes 4 bytes for weight, gradient, master and average each, and 8 bytes for moments."""
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
    assert one.bytes == pytest.approx(3 * part)  # one all-reduce, one gather
    assert two.bytes == pytest.approx(5 * part)  # two all-reduces, one gather
    assert three.bytes == pytest.approx(6 * part)  # two gathers and a reduce-scatter, each twice
    for traffic in (one, two, three):
        assert traffic.seconds == pytest.approx(traffic.bytes / 400e9)
    assert one.after_step == pytest.approx(part / 400e9)
    assert three.after_step == 0
    assert traffic_of(model, node, 16, zero_stage=1, precision="bf16").bytes == pytest.approx(1.5 * part)
    # Each of two nodes receives half of the data through its eight cards, which are slower than the links inside a
    # node.
    nodes = replace(node, gpus=16, inter=10e9)
    between = traffic_of(model, nodes, 16, zero_stage=1)
    assert between.after_step == pytest.approx(0.5 * size / (8 * 10e9))
    alone = traffic_of(model, replace(node, gpus=1), 16, zero_stage=3)
    assert (alone.bytes, alone.seconds, alone.exposed) == (0, 0, 0)


def test_communication_that_backward_cannot_hide() -> None:
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
        # Only the first piece and the gather after the update are not hidden.
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


def test_the_recipe_of_bf16_weights_is_recommended() -> None:
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
    # There are 64 GPUs with 16 images each, whatever the batch of the run.
    assert [s["communication"]["hiding_batch"] for s in result["paper_batch"]] == [9, 9, 9]


def test_the_text_of_a_plan() -> None:
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
def test_a_mistake_is_a_one_line_error(arguments: tuple[str, ...], said: str) -> None:
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
