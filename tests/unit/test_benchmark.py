"""The benchmark runs and its numbers are consistent; how large they are is not checked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = (
    "model.image_size=16",
    "model.patch_size=4",
    "model.hidden_size=32",
    "model.depth=2",
    "model.num_heads=2",
    "model.bottleneck_dim=8",
    "model.in_context_len=4",
    "model.in_context_start=1",
    "model.num_classes=10",
)
ENVIRONMENT = {"device", "torch", "threads", "load", "date"}
COMMON = {"config", "overrides", "batch", "images_per_second", "tflops_per_second", "peak_memory_mib"} | ENVIRONMENT


def benchmark(*arguments: str, expect: int = 0) -> str:
    command = [sys.executable, "tools/benchmark.py", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stderr
    return finished.stdout if expect == 0 else finished.stderr


def test_step() -> None:
    result: dict[str, Any] = json.loads(benchmark("step", "--steps", "3", "--warmup", "1", "--json", *TINY))
    own = {"steps", "ms_per_step", "ms_per_step_range", "ms", "share", "around_network"}
    assert set(result) == COMMON | own
    parts = {"forward", "backward", "zero_backward", "optimizer", "ema", "tracking", "rest"}
    assert set(result["ms"]) == set(result["share"]) == parts
    assert sum(result["share"].values()) == pytest.approx(1.0)
    assert sum(result["ms"].values()) == pytest.approx(result["ms_per_step"])
    around = sum(share for name, share in result["share"].items() if name not in ("forward", "backward"))
    assert result["around_network"] == pytest.approx(around)
    assert result["images_per_second"] == pytest.approx(4 / result["ms_per_step"] * 1e3)
    low, high = result["ms_per_step_range"]
    assert 0 < low <= result["ms_per_step"] <= high
    assert result["peak_memory_mib"] > 0


def test_sample() -> None:
    result: dict[str, Any] = json.loads(benchmark("sample", "--batch", "2", "--sampler-steps", "4", "--json", *TINY))
    assert set(result) == COMMON | {"sampler_steps", "guidance", "seconds", "evaluations_per_image"}
    # 3 Heun steps and 1 Euler step: 7 velocities. All but the first lie inside the guidance interval and count twice.
    assert result["evaluations_per_image"] == 13
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"])


def test_the_table_and_a_refusal() -> None:
    table = benchmark("sample", "--batch", "1", "--sampler-steps", "1", *TINY)
    assert "| network evaluations an image | 1 |" in table
    assert "run.device=cuda" in benchmark("step", "run.device=cuda", *TINY, expect=2)


def test_checkpoint() -> None:
    result: dict[str, Any] = json.loads(benchmark("checkpoint", "--repeats", "1", "--json", *TINY))
    assert set(result) == {"config", "repeats", "bytes", "seconds", "range", "imports"} | ENVIRONMENT
    assert set(result["seconds"]) == {"stall_sync", "stall_async", "written_async", "verify", "load"}
    assert result["seconds"]["stall_async"] < result["seconds"]["written_async"]
    assert all(seconds > 0 for seconds in result["imports"].values())


def test_data() -> None:
    arguments = ["--resolutions", "16", "24", "--images", "4", "--seconds", "0.1", "--resume-samples", "3000", "--json"]
    result: dict[str, Any] = json.loads(benchmark("data", *arguments))
    assert set(result) == {"images", "forms", "hand_off", "resume"} | ENVIRONMENT
    assert set(result["forms"]) == {"16", "24"}
    for resolution, forms in result["forms"].items():
        assert set(forms) == {"stock", "original", "raw", "png", "webp", "jpeg"}
        assert forms["raw"]["bytes_per_image"] == 3 * int(resolution) ** 2 + 128
        assert all(form["range"][0] <= form["images_per_second"] <= form["range"][1] for form in forms.values())
    assert (result["resume"]["shards"], result["resume"]["samples"]) == (3, 3000)
    assert "hand-off of raw at 16 px, 2 workers" in benchmark("data", *arguments[:-1])
