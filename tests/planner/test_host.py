"""The host time of a step, compared with counts and measurements, and the plan if the host limits a step."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from jitscale.config import Config, load_config
from jitscale.planner.choice import Candidate, candidate, fewer_gpus, recommend
from jitscale.planner.host import launches
from jitscale.planner.timing import Cluster, host_seconds
from tests.support import ROOT
from tests.support.tools import run_tool

# Kernels, graphs, copies, fills and collectives of a step of one rank of two, in autocast with three averages. The keys
# are depth, settings and micro-batches. Counted with torch 2.11 and DeepSpeed 0.19.8 on a CUDA that executes nothing,
# 2026-11-27.
COUNTED = [
    (8, {}, 1, 470),
    (16, {}, 1, 686),
    (8, {}, 2, 740),
    (16, {}, 2, 1108),
    (8, {"activation_checkpointing": 1}, 1, 478),
    (8, {"zero_stage": 2}, 1, 470),
    (16, {"zero_stage": 2}, 1, 686),
    (8, {"zero_stage": 2}, 2, 951),
    (8, {"cuda_graphs": False}, 1, 825),
    (16, {"cuda_graphs": False}, 1, 1401),
    (8, {"cuda_graphs": False}, 2, 1433),
    (8, {"cuda_graphs": False, "activation_checkpointing": 1}, 1, 975),
    (8, {"compile": False}, 1, 1095),
    (16, {"compile": False}, 1, 1910),
    (8, {"compile": False, "activation_checkpointing": 1}, 1, 1295),
]
# A step on one H200 machine, 2026-11-27. DeepSpeed reduced gradients one by one, as it does on several ranks. The
# columns are size, images, milliseconds until the host had started a step on an idle GPU, and milliseconds of a step.
WITH_GRAPHS = [("b", 64, 29.9, 31.5), ("l", 32, 60.2, 58.6)]
# A step at 64 images: with graphs the GPU limits it; JiT-H without graphs is limited by the host.
LIMITED_BY_GPU = {"l": 90.0, "h": 177.2, "g": 345.2}
WITHOUT_GRAPHS = (194, 210)


def shipped(size: str, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/jit_{size}_256.yaml", overrides)


def alone(size: str, images: int = 64, **engine: Any) -> Candidate:
    """A step on one GPU alone."""
    config = shipped(size, f"data.batch_size={images}", *(f"engine.{name}={value}" for name, value in engine.items()))
    return candidate(config, Cluster(gpus=1, gpu_memory=141e9), stage=1, micro_batch=images)


@pytest.mark.parametrize(("depth", "engine", "micro_batches", "counted"), COUNTED)
def test_launches_equal_the_counted_ones(depth: int, engine: dict[str, Any], micro_batches: int, counted: int) -> None:
    config = shipped("h")
    run = replace(config, model=replace(config.model, depth=depth), engine=replace(config.engine, **engine))
    # Stage 1 reduces once a step, and stage 2 moves more in later micro-batches. The formula ignores both.
    assert launches(run, micro_batches) == pytest.approx(counted, rel=0.03 if micro_batches == 1 else 0.16)


def test_launches_of_routing_and_a_middle_layer_are_counted() -> None:
    """Counted on one rank with two micro-batches.

    With graphs: 436 without both, 617 with both. Eager: 508, 669 and 747.
    """
    plain, model = launches(shipped("h"), 2), "model.route_share=0.5"
    assert launches(shipped("h", model, "model.middle_head=8"), 2) - plain == pytest.approx(617 - 436, abs=1)
    assert launches(shipped("h", model), 2) - plain == 747 - 669


def test_the_host_time_equals_the_measured_one() -> None:
    for size, images, host, step in WITH_GRAPHS:
        found = alone(size, images)
        assert 1e3 * found.host_seconds == pytest.approx(host, rel=0.05), size
        assert 1e3 * found.step_seconds == pytest.approx(step, rel=0.05), size
    for size, step in LIMITED_BY_GPU.items():
        assert 1e3 * alone(size).step_seconds == pytest.approx(step, rel=0.12), size
        assert not alone(size).host_bound
    least, most = WITHOUT_GRAPHS
    assert least < 1e3 * alone("h", cuda_graphs="false").step_seconds < most


def test_without_graphs_the_host_needs_longer() -> None:
    graphs, none = alone("h").host_seconds, alone("h", cuda_graphs="false").host_seconds
    assert none > 2 * graphs
    # Both settings turn graphs off by default. Blocks that are not compiled can have graphs too.
    assert alone("h", offload_optimizer="true").host_seconds == none
    assert alone("h", float8="true").host_seconds == none
    eager = alone("h", compile="false").host_seconds
    assert eager > none
    assert alone("h", compile="false", cuda_graphs="true").host_seconds == graphs
    for setting in ("null", "true"):  # Stage 3 has no graphs, whatever the setting.
        config = shipped("h", f"engine.cuda_graphs={setting}")
        stages = [
            candidate(config, Cluster(gpus=32, gpu_memory=141e9), stage=stage, micro_batch=32) for stage in (1, 2, 3)
        ]
        assert stages[0].host_seconds == stages[1].host_seconds == graphs
        assert stages[2].host_seconds > none


def test_the_slower_of_host_and_gpu_determines_the_time() -> None:
    config, cluster = shipped("h"), Cluster(gpus=64, gpu_memory=141e9)
    option = candidate(config, cluster, stage=1, micro_batch=16)
    assert option.host_bound
    assert option.step_seconds == option.host_seconds > option.gpu_seconds
    busy = candidate(config, replace(cluster, host=1e-3), stage=1, micro_batch=16)
    assert not busy.host_bound
    assert busy.step_seconds == busy.gpu_seconds == option.gpu_seconds
    assert busy.gpu_seconds == busy.compute_seconds + busy.communication.exposed
    # In more micro-batches a step has more launches. The number of images makes no difference.
    parts = [candidate(config, cluster, stage=1, micro_batch=size).host_seconds for size in (16, 8, 4)]
    assert all(1.8 * a < b < 2 * a for a, b in pairwise(parts))
    more = replace(config, data=replace(config.data, batch_size=4096))
    assert host_seconds(more, cluster) == host_seconds(config, cluster)
    assert candidate(config, replace(cluster, host=0.2), stage=1, micro_batch=8).host_seconds == 0.4


@pytest.mark.parametrize(("size", "gpus"), [("l", 16), ("h", 32), ("g", 64)])
def test_the_shipped_jobs_are_not_limited_by_the_host(size: str, gpus: int) -> None:
    config, cluster = shipped(size), Cluster(gpus=gpus, gpu_memory=141e9)
    here = recommend(config, cluster)
    assert here is not None
    assert here.step_seconds == here.gpu_seconds > here.host_seconds
    assert fewer_gpus(config, cluster) is None
    without = recommend(replace(config, engine=replace(config.engine, cuda_graphs=False)), cluster)
    assert without is not None
    assert without.host_bound


@pytest.mark.parametrize(("size", "gpus", "fewer"), [("h", 64, 32), ("g", 128, 64)])
def test_the_plan_suggests_fewer_gpus_with_more_images_each(size: str, gpus: int, fewer: int) -> None:
    config, cluster = shipped(size), Cluster(gpus=gpus, gpu_memory=141e9)
    here, found = recommend(config, cluster), fewer_gpus(config, cluster)
    assert here is not None
    assert here.host_bound
    assert found is not None
    assert found[0] == replace(cluster, gpus=fewer)
    assert found[1] == recommend(config, found[0])
    assert not found[1].host_bound
    assert found[1].step_seconds * fewer < here.step_seconds * gpus
    assert found[1].step_seconds < 2 * here.step_seconds


def test_fewer_gpus_are_not_suggested_without_a_saving() -> None:
    config, cluster = shipped("b", "data.batch_size=64"), Cluster(gpus=1, gpu_memory=141e9)
    assert fewer_gpus(config, cluster) is None
    # The candidates are whole nodes, or a part of one node: 12 GPUs would be busy too.
    found = fewer_gpus(shipped("h", "data.batch_size=360"), Cluster(gpus=24, gpu_memory=141e9))
    assert found is not None
    assert found[0].gpus == 8
    assert fewer_gpus(shipped("h"), Cluster(gpus=16, gpu_memory=141e9)) is None, "the GPUs are busy"
    # 16 GPUs with two micro-batches of 32 images would be as busy as 32 GPUs with one, for the same GPU-hours.
    cluster = Cluster(gpus=32, gpu_memory=141e9, host=0.1095)
    room = candidate(shipped("h"), cluster, stage=1, micro_batch=32).memory.total / (1 - cluster.margin)
    assert fewer_gpus(shipped("h"), cluster) is not None
    assert fewer_gpus(shipped("h"), replace(cluster, gpu_memory=1.01 * room)) is None


def plan(*arguments: str, expect: int = 0) -> str:
    finished = run_tool("plan", "--config", "configs/jit_h_256.yaml", "--gpu-memory", "141GB", *arguments)
    assert finished.code == expect, finished.err
    return finished.out if expect == 0 else finished.err


def test_the_plan_shows_both_times_and_a_warning() -> None:
    text = plan("--gpus", "64")
    assert "WARNING: 16 images per GPU are too few: the host starts a step in 78 ms, the GPU runs it in 54 ms" in text
    assert "With --gpus 32, 32 images per GPU: 99 ms per step, 10314 images/s" in text
    assert "1046 GPU-hours" in text
    assert "663 GPU-hours" in text
    assert "WARNING" not in plan("--gpus", "32")
    assert "WARNING" not in plan("--gpus", "64", "--host-ms", "50")
    alone = plan("--gpus", "1", "data.batch_size=16")
    assert "16 images per GPU are too few" in alone
    assert "No smaller number of GPUs takes fewer GPU-hours" in alone


def test_json_has_both_times() -> None:
    found = json.loads(plan("--gpus", "64", "--json"))
    here, fewer = found["recommended"], found["fewer_gpus"]
    assert (here["host_bound"], fewer["host_bound"], fewer["gpus"]) == (True, False, 32)
    assert here["images_per_second_per_gpu"] == pytest.approx(here["images_per_second"] / 64)
    assert fewer["images_per_second_per_gpu"] == pytest.approx(fewer["images_per_second"] / 32)
    assert fewer["gpu_hours"] < here["gpu_hours"]
    assert fewer["days"] > here["days"]
    quick = json.loads(plan("--gpus", "64", "--json", "--launch-us", "0"))["recommended"]
    assert here["host_seconds"] - quick["host_seconds"] == pytest.approx(launches(shipped("h"), 1) * 10e-6)
    assert json.loads(plan("--gpus", "64", "--json", "--host-ms", "50"))["fewer_gpus"] is None


@pytest.mark.parametrize("option", ["--host-ms", "--launch-us"])
def test_a_host_time_must_be_a_number(option: str) -> None:
    message = plan("--gpus", "8", option, "-1", expect=2)
    assert f"argument {option}: '-1' must be a number between 0 and 1e+06" in message
    assert len(message.strip().splitlines()) == 1
