"""The benchmark runs, and its numbers are consistent. Their size is not checked."""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.forking import Process
from tests.support.tiny import OVERRIDES

ENVIRONMENT = {"command", "json", "device", "torch", "deepspeed", "torchao", "threads", "load", "date"}
USED = {"tflops_per_second", "mfu", "mfu_of_matmul"}
COMMON = {"config", "overrides", "batch", "images_per_second", "matmul_tflops_per_second", "peak_memory_mib"} | USED
FOREIGN = ("deepspeed", "omegaconf", "PIL", "wandb", "webdataset", "simplejpeg", "safetensors", "fsspec", "rich")


def benchmark(*arguments: str, expect: int = 0, without: tuple[str, ...] = ()) -> str:
    """Run the tool as on a machine that lacks the packages `without`."""
    if not without:
        fork = Process(["tools/benchmark.py", *arguments])
        said, _ = fork.communicate(timeout=300)
        assert fork.returncode == expect, said
        return said
    hide = f"import sys, runpy; sys.modules.update(dict.fromkeys({without!r})); sys.argv = sys.argv[1:]; "
    hide += "sys.path[0] = 'tools'; "  # as for a script
    command = [sys.executable, "-c", hide + "runpy.run_path(sys.argv[0], run_name='__main__')", "tools/benchmark.py"]
    finished = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == expect, finished.stderr
    return finished.stdout if expect == 0 else finished.stderr


def benchmark_json(*arguments: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The single JSON object among the tool's output."""
    (line,) = [line for line in benchmark(*arguments, "--json", without=without).splitlines() if line.startswith("{")]
    return json.loads(line)


@pytest.mark.slow
def test_the_rehearsal_runs_from_photographs_to_its_result() -> None:
    """The whole way from photographs to result.json, through Inception, with a small network."""
    counts = ["evaluation.num_images=10", "evaluation.sweep_images=10", "evaluation.block_size=10"]
    small = [*OVERRIDES[2:8], "model.num_classes=20", "engine.precision=fp32", "data.num_workers=0", *counts]
    result = benchmark_json("rehearsal", "--images", "20", "--batch", "4", *small)
    assert list(result["parts"]) == ["packing", "start", "steps", "save", "real", "sweep", "best"]
    assert all(seconds >= 0 and memory > 0 for seconds, memory in result["parts"].values())
    measured = json.loads(result["result"])
    assert measured["protocol"]["features"] == "inception"
    assert [row["guidance_scale"] for row in measured["table"][:2]] == [1.0, 3.0]
    assert {"fid", "sfid", "kid", "fid_floor", "kid_floor"} <= set(measured)


def test_step() -> None:
    arguments = ["step", "--steps", "3", "--warmup", "1", "--compare", "authors", *OVERRIDES]
    result: dict[str, Any] = benchmark_json(*arguments)
    own = {"steps", "ms_per_step", "ms_per_step_range", "ms", "share", "around_network", "engine", "execution"}
    own |= {"host_waits", "authors", "ratio", "network_ratio", "warmup", "compare"}
    assert set(result) == COMMON | ENVIRONMENT | own
    parts = {"data", "forward", "backward", "zero_backward", "optimizer", "ema", "tracking", "rest"}
    assert set(result["ms"]) == set(result["share"]) == parts
    assert sum(result["share"].values()) == pytest.approx(1.0)
    around = sum(share for name, share in result["share"].items() if name not in ("forward", "backward"))
    assert result["around_network"] == pytest.approx(around)
    assert result["images_per_second"] == pytest.approx(4 / result["ms_per_step"] * 1e3)
    low, high = result["ms_per_step_range"]
    assert 0 < low <= result["ms_per_step"] <= high
    assert result["peak_memory_mib"] > 0
    assert result["engine"] == "ZeRO stage 1"
    assert result["execution"].startswith("attention sdpa (torch ")
    assert result["mfu_of_matmul"] * result["matmul_tflops_per_second"] == pytest.approx(result["tflops_per_second"])
    # The verdict whether the weights moved. On GPUs it is read two steps later, when the host need not wait for it.
    assert result["host_waits"] == {"_local_scalar_dense": 1}
    theirs = result["authors"]
    assert set(theirs["ms"]) == {"forward", "backward", "optimizer", "ema"}
    assert result["ratio"] == pytest.approx(theirs["ms_per_step"] / result["ms_per_step"])


@pytest.mark.slow
def test_step_and_sample_run_without_the_foreign_packages() -> None:
    result = benchmark_json("step", "--steps", "1", "--warmup", "1", *OVERRIDES, without=FOREIGN)
    assert result["engine"].startswith("plain torch, since this machine lacks deepspeed, ")
    assert "--engine zero: the trainer needs simplejpeg, which this machine lacks;" in benchmark(
        "step", "--engine", "zero", without=("simplejpeg",), expect=2
    )
    assert result["host_waits"] == {}
    assert "data" not in result["ms"]
    assert "| images/s |" in benchmark("sample", "--batch", "1", "--sampler-steps", "2", *OVERRIDES, without=FOREIGN)


def test_sample() -> None:
    arguments = ["sample", "--batch", "2", "--sampler-steps", "50", "--compare", "authors", *OVERRIDES]
    result: dict[str, Any] = benchmark_json(*arguments)
    own = {"sampler_steps", "guidance", "seconds", "seconds_range", "evaluations_per_image", "network_calls"}
    own |= {"network_share", "authors", "ratio", "largest_difference", "largest_value"}
    own |= {"method", "repeats", "compare"}
    assert set(result) == COMMON | ENVIRONMENT | own
    assert 0 < result["network_share"] < 1
    # 49 Heun steps and one Euler step need 99 velocities. Times 0, 0.02, ... 0.1 lie before the guidance interval: the
    # first one counts once, the others twice, as the end of a step and as the start of the next one.
    # counts once, the others twice, as the end of a step and as the beginning of the next.
    assert result["evaluations_per_image"] == 99 + (99 - 11)
    assert result["network_calls"] == 99, "one call evaluates with and without the class, in one batch"
    assert result["authors"]["evaluations_per_image"] == result["authors"]["network_calls"] == 2 * 99
    assert result["largest_difference"] < 1e-4
    assert result["images_per_second"] == pytest.approx(2 / result["seconds"])


def test_the_authors_way_has_no_multistep_sampler() -> None:
    compared = ["sample", "--method", "ab2", "--compare", "authors", *OVERRIDES]
    assert "the authors have Euler and Heun steps at uniform times" in benchmark(*compared, expect=2)


@pytest.mark.slow
def test_attention() -> None:
    result = benchmark_json("attention", "--repeats", "2", *OVERRIDES)
    assert result["shape"] == [4, 20, 2, 16]
    assert set(result["kernels"]) == {"sdpa", "sdpa-flash", "reference"}
    assert set(result["missing"]) == {"flash-attn", "flash-attn-4", "sdpa-cudnn"}
    for found in result["kernels"].values():
        for part, products in (("forward", 2), ("backward", 4)):
            assert set(found[part]) == USED
            flops = products * 2 * 4 * 2 * 20**2 * 16
            assert found[part]["tflops_per_second"] == pytest.approx(flops / found["ms"][part] / 1e9)
        assert found["images_per_second"] == pytest.approx(4e3 / (found["ms"]["forward"] + found["ms"]["backward"]))
    assert "| sdpa: backward, of one large matrix product |" in benchmark("attention", "--repeats", "1", *OVERRIDES)


@pytest.mark.slow
def test_metrics() -> None:
    result = benchmark_json("metrics", "--images", "40")
    assert set(result["seconds"]) == {"fid", "sfid", "inception_score", "kid", "precision and recall"}


def test_the_table_and_a_refusal() -> None:
    table = benchmark("sample", "--batch", "1", "--sampler-steps", "1", *OVERRIDES)
    assert "| network evaluations per image | 1 |" in table
    assert "run.device=cuda" in benchmark("step", "run.device=cuda", *OVERRIDES, expect=2)


@pytest.mark.slow
def test_checkpoint() -> None:
    result: dict[str, Any] = benchmark_json("checkpoint", "--repeats", "1", *OVERRIDES)
    asked = {"config", "overrides", "batch", "repeats", "folder"}
    assert set(result) == {"bytes", "seconds", "range", "imports"} | asked | ENVIRONMENT
    assert set(result["seconds"]) == {"stall_sync", "stall_async", "written_async", "verify", "load"}
    assert result["seconds"]["stall_async"] < result["seconds"]["written_async"]
    assert all(seconds > 0 for seconds in result["imports"].values())


def test_data() -> None:
    arguments = ["--resolutions", "16", "24", "--images", "4", "--seconds", "0.1", "--resume-samples", "3000"]
    result: dict[str, Any] = benchmark_json("data", *arguments)
    asked = {"images", "resolutions", "seconds", "workers", "resume_samples"}
    assert set(result) == {"forms", "hand_off", "resume"} | asked | ENVIRONMENT
    assert set(result["forms"]) == {"16", "24"}
    for resolution, forms in result["forms"].items():
        assert set(forms) == {"stock", "original", "raw", "png", "webp", "jpeg"}
        assert forms["raw"]["bytes_per_image"] == 3 * int(resolution) ** 2 + 128
        assert all(form["range"][0] <= form["images_per_second"] <= form["range"][1] for form in forms.values())
    assert (result["resume"]["shards"], result["resume"]["samples"]) == (3, 3000)


@pytest.mark.slow
def test_the_table_of_data() -> None:
    arguments = ["--resolutions", "16", "--images", "4", "--seconds", "0.1", "--resume-samples", "3000"]
    assert "hand-off of raw at 16 px, 2 workers" in benchmark("data", *arguments)
