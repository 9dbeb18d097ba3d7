"""Host time of a step: next to what was counted and measured, and what the plan says where it limits a step."""

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

# Kernels, copies, fills and collectives of a step of one rank, in autocast with three averages. Counted with torch 2.11
# and DeepSpeed 0.19.8 on a CUDA that executes nothing, narrow networks, 2026-11-27.
COUNTED = [
    (12, {}, 1, 1337),
    (24, {}, 1, 2298),
    (32, {}, 1, 3034),
    (8, {}, 1, 1033),
    (16, {}, 1, 1701),
    (8, {}, 2, 1835),
    (16, {}, 2, 3157),
    (8, {"activation_checkpointing": 1}, 1, 1209),
    (8, {"activation_checkpointing": 1, "compile": False}, 1, 2940),
    (8, {"zero_stage": 2}, 1, 1149),
    (8, {"zero_stage": 3}, 1, 1401),
    (8, {"compile": False}, 1, 2308),
    (16, {"compile": False}, 1, 4214),
]
# Milliseconds of a step of 64 images on one H200 machine, 2026-11-26/27.
MEASURED = {"b": (50, 68), "l": (115, 117), "h": (208, 209)}


def shipped(size: str, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/jit_{size}_256.yaml", overrides)


def alone(size: str, **engine: Any) -> Candidate:
    """A step of 64 images on one GPU."""
    config = shipped(size, "data.batch_size=64", *(f"engine.{name}={value}" for name, value in engine.items()))
    return candidate(config, Cluster(gpus=1, gpu_memory=141e9), stage=1, micro_batch=64)


@pytest.mark.parametrize(("depth", "engine", "micro_batches", "counted"), COUNTED)
def test_launches_are_what_was_counted(depth: int, engine: dict[str, Any], micro_batches: int, counted: int) -> None:
    config = shipped("h")
    run = replace(config, model=replace(config.model, depth=depth), engine=replace(config.engine, **engine))
    assert launches(run, micro_batches) == pytest.approx(counted, rel=0.03)


def test_a_step_takes_what_was_measured() -> None:
    for size, (least, most) in MEASURED.items():
        assert 0.98 * least <= 1e3 * alone(size).step_seconds <= 1.02 * most, size
    assert alone("b").host_bound
    assert alone("l").host_bound
    assert not alone("h").host_bound


def test_the_slower_of_host_and_gpu_counts() -> None:
    config, cluster = shipped("h"), Cluster(gpus=32, gpu_memory=141e9)
    option = candidate(config, cluster, stage=1, micro_batch=32)
    assert option.host_bound
    assert option.step_seconds == option.host_seconds > option.gpu_seconds
    busy = candidate(config, replace(cluster, host=1e-3), stage=1, micro_batch=32)
    assert not busy.host_bound
    assert busy.step_seconds == busy.gpu_seconds == option.gpu_seconds
    assert busy.gpu_seconds == busy.compute_seconds + busy.communication.exposed
    # A step in more micro-batches is started more often; its images change nothing.
    parts = [candidate(config, cluster, stage=1, micro_batch=size).host_seconds for size in (32, 16, 8)]
    assert all(1.8 * a < b < 2 * a for a, b in pairwise(parts))
    more = replace(config, data=replace(config.data, batch_size=4096))
    assert host_seconds(more, cluster) == host_seconds(config, cluster)
    assert candidate(config, replace(cluster, host=0.2), stage=1, micro_batch=16).host_seconds == 0.4


@pytest.mark.parametrize(("size", "gpus", "fewer"), [("h", 32, 16), ("g", 64, 32)])
def test_fewer_gpus_with_more_images_each(size: str, gpus: int, fewer: int) -> None:
    """The shipped job sizes of H and G are limited by the host."""
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


def test_no_fewer_gpus_where_that_saves_nothing() -> None:
    config, cluster = shipped("b", "data.batch_size=64"), Cluster(gpus=1, gpu_memory=141e9)
    assert fewer_gpus(config, cluster) is None
    # Whole nodes, or a part of one: 12 GPUs would be busy too.
    found = fewer_gpus(shipped("h", "data.batch_size=576"), Cluster(gpus=24, gpu_memory=141e9))
    assert found is not None
    assert found[0].gpus == 8
    assert fewer_gpus(shipped("h"), Cluster(gpus=16, gpu_memory=141e9)) is None, "busy GPUs"
    # 16 GPUs would have room for two micro-batches of 32 images, as busy as 32 GPUs with one: as many GPU-hours.
    cluster = Cluster(gpus=32, gpu_memory=141e9, host=0.125)
    room = candidate(shipped("h"), cluster, stage=1, micro_batch=32).memory.total / (1 - cluster.margin)
    assert fewer_gpus(shipped("h"), cluster) is not None
    assert fewer_gpus(shipped("h"), replace(cluster, gpu_memory=1.01 * room)) is None


def plan(*arguments: str, expect: int = 0) -> str:
    finished = run_tool("plan", "--config", "configs/jit_h_256.yaml", "--gpu-memory", "141GB", *arguments)
    assert finished.code == expect, finished.err
    return finished.out if expect == 0 else finished.err


def test_the_plan_warns_and_shows_both() -> None:
    text = plan("--gpus", "32")
    assert "WARNING: 32 images a GPU are too few: the host needs 153 ms to start a step, the GPU 113 ms" in text
    assert "With --gpus 16, 64 images a GPU: 216 ms a step, 4736 images/s" in text
    assert "721 GPU-hours" in text
    assert "1022 GPU-hours" in text
    assert "WARNING" not in plan("--gpus", "16")
    assert "WARNING" not in plan("--gpus", "32", "--host-ms", "90")
    alone = plan("--gpus", "1", "data.batch_size=16")
    assert "16 images a GPU are too few" in alone
    assert "No smaller number of GPUs takes fewer GPU-hours" in alone


def test_json_has_both() -> None:
    found = json.loads(plan("--gpus", "32", "--json"))
    here, fewer = found["recommended"], found["fewer_gpus"]
    assert (here["host_bound"], fewer["host_bound"], fewer["gpus"]) == (True, False, 16)
    assert here["images_per_second_per_gpu"] == pytest.approx(here["images_per_second"] / 32)
    assert fewer["images_per_second_per_gpu"] == pytest.approx(fewer["images_per_second"] / 16)
    assert fewer["gpu_hours"] < here["gpu_hours"]
    assert fewer["days"] > here["days"]
    quick = json.loads(plan("--gpus", "32", "--json", "--launch-us", "0"))["recommended"]
    assert here["host_seconds"] - quick["host_seconds"] == pytest.approx(launches(shipped("h"), 1) * 10e-6)
    assert json.loads(plan("--gpus", "32", "--json", "--host-ms", "90"))["fewer_gpus"] is None


@pytest.mark.parametrize("option", ["--host-ms", "--launch-us"])
def test_a_host_time_is_a_number(option: str) -> None:
    message = plan("--gpus", "8", option, "-1", expect=2)
    assert f"argument {option}: '-1' must be a number between 0 and 1e+06" in message
    assert len(message.strip().splitlines()) == 1
