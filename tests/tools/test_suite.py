"""The suite of benchmarks goes on after every stop, keeps what fails, and runs where our packages are absent."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import suite, trace
from benchmarks.bare_config import bare_config
from benchmarks.report import report
from benchmarks.suite_items import PARTS, Item, items, names
from jitscale.config import Config, TrackingConfig, load_config
from jitscale.errors import ConfigError, UserError
from jitscale.tracking import check_wandb
from tests.support import ROOT

# What a machine with torch and CUDA has not, of all that the project needs or knows.
ABSENT = ["deepspeed", "omegaconf", "wandb", "simplejpeg", "webdataset", "braceexpand", "submitit", "torchao"]
ABSENT += ["flash_attn", "hjson", "pydantic", "moto", "s3fs"]
# Stands in for tools/benchmark.py: the first word of an item's settings says how it goes.
STAND_IN = """
import json, os, sys, time
case = sys.argv[-1]
print("begun", case, file=sys.stderr)
if case == "memory":
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 GiB.")
if case == "refused":
    print("error: engine.attention=x does not work here; choose auto", file=sys.stderr)
    sys.exit(2)
if case == "killed":
    os.kill(os.getpid(), 9)
if case == "slow":
    if os.fork() == 0:
        open("child", "w").write(str(os.getpid()))
    time.sleep(600)
print(json.dumps({"command": "stand-in", "images_per_second": 1.0}))
"""


def options(out: Path, **others: Any) -> Namespace:
    given = {"out": out, "minutes": 1.0, "parts": [], "wheels": None, "retry": False, "smoke": False, "list": False}
    return Namespace(**given | others)


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Items that a stand-in runs: change the list to change what there is."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    wanted: list[str] = []

    def chosen(parts: list[str]) -> list[Item]:
        return [Item(f"item-{case}", "step", case, (), seconds=1 if case == "slow" else 5) for case in wanted]

    monkeypatch.setattr(suite, "TOOL", tmp_path / "stand_in.py")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    monkeypatch.setattr(suite, "chosen", chosen)
    monkeypatch.setattr(Item, "arguments", lambda item, *, smoke: [item.command])
    monkeypatch.setattr(suite, "LIMIT", 2)
    monkeypatch.setattr(suite, "GRACE_SECONDS", 0.5)
    return wanted


def test_what_fails_is_a_result_and_nothing_is_measured_twice(tmp_path: Path, cases: list[str]) -> None:
    cases += ["memory", "refused", "killed", "slow", "sound"]
    states = suite.measure(options(tmp_path / "out"))["items"]
    wanted = ["out of memory", "refused", "failed", "too slow", "done"]
    assert list(states.values()) == wanted
    kept = suite.read_results(tmp_path / "out")
    reasons = {name: record.get("reason", "") for name, record in kept.items()}
    assert reasons["item-memory"].endswith("CUDA out of memory. Tried to allocate 20.00 GiB.")
    assert reasons["item-refused"] == "engine.attention=x does not work here; choose auto"
    assert "signal SIGKILL" in reasons["item-killed"]
    assert reasons["item-slow"] == "had not ended after 2 s"
    assert kept["item-sound"]["result"]["images_per_second"] == 1.0
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}/cmdline").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"
    before = (tmp_path / "out/results.json").read_bytes()
    assert list(suite.measure(options(tmp_path / "out"))["items"].values()) == wanted
    assert (tmp_path / "out/results.json").read_bytes() == before
    cases.remove("slow")
    suite.measure(options(tmp_path / "out", retry=True))
    again = suite.read_results(tmp_path / "out")
    assert again["item-sound"] == kept["item-sound"]
    assert set(again) == set(kept)


def test_an_item_that_does_not_fit_is_left_for_the_next_call(tmp_path: Path, cases: list[str]) -> None:
    cases += ["sound", "other"]
    seconds = suite.SPARE_SECONDS + 10.0
    short = options(tmp_path / "out", minutes=seconds / 60)
    suite.chosen = lambda parts: [  # type: ignore[assignment]  # of the fixture's monkeypatch, which restores it
        Item("first", "step", "sound", (), seconds=2),
        Item("long", "step", "sound", (), seconds=100),
    ]
    assert suite.measure(short)["items"] == {"first": "done", "long": "later"}
    # The next call begins with it, though it is estimated at more than the call has.
    assert suite.measure(short)["items"] == {"first": "done", "long": "done"}


def test_a_stop_ends_the_item_and_loses_nothing(tmp_path: Path) -> None:
    """SIGTERM in the middle of the second item."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    program = f"""
import sys
from pathlib import Path
from argparse import Namespace
from benchmarks import suite
from benchmarks.suite_items import Item
suite.TOOL, suite.ROOT, suite._count_gpus = Path({str(tmp_path / "stand_in.py")!r}), Path({str(tmp_path)!r}), lambda: 0
suite.chosen = lambda parts: [Item(case, "step", case, (), seconds=20) for case in ("sound", "slow")]
Item.arguments = lambda item, *, smoke: [item.command]
suite.measure(Namespace(out=Path({str(tmp_path / "out")!r}), minutes=5, parts=[], wheels=None, retry=False,
                        smoke=False, list=False))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools")])
    with subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}) as process:
        while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert list(suite.read_results(tmp_path / "out")) == ["sound"]
    child = int((tmp_path / "child").read_text())
    assert not Path(f"/proc/{child}").exists() or Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"


def test_wheels_are_installed_for_the_items(tmp_path: Path, cases: list[str]) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "images = 7\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    (tmp_path / "stand_in.py").write_text("import carried\nprint('{\"images_per_second\": %d}' % carried.images)\n")
    cases.append("sound")
    suite.measure(options(tmp_path / "out", wheels=wheels))
    assert suite.read_results(tmp_path / "out")["item-sound"]["result"]["images_per_second"] == 7
    assert importlib.util.find_spec("carried") is None, "the path of this process is as before"


def test_wheels_that_are_none_are_refused(tmp_path: Path, cases: list[str]) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(UserError, match=r"no \*\.whl there"):
        suite.measure(options(tmp_path / "out", wheels=wheels))
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(UserError, match="pip cannot install them"):
        suite.measure(options(tmp_path / "out", wheels=wheels))


def test_items_are_named_once_and_know_their_part() -> None:
    listed = items()
    assert len({item.name for item in listed}) == len(listed)
    assert {item.part for item in listed} == set(PARTS)
    assert set(names()) == {*PARTS, *(item.name for item in listed)}
    unknown = Item("x", "step", "step", (), ("engine.nothing=1",))
    assert unknown.obstacle(1, smoke=False) == "this checkout has no setting engine.nothing"
    other = Item("x", "step", "step", (), ("engine.attention=nothing",))
    assert other.obstacle(1, smoke=False) == "this checkout has no engine.attention=nothing"
    assert Item("x", "step", "step", (), packages=("absent_one",)).obstacle(1, smoke=False) == (
        "this machine lacks absent_one"
    )
    assert Item("x", "multi", "multi", (), gpus=2).obstacle(1, smoke=False) == (
        "this machine has 1 GPU, and 2 are needed"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("jit_*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_without_omegaconf_is_the_same(path: Path) -> None:
    overrides = [
        "engine.align=null",
        "optim.lr=1e-4",
        "ema.decays=[0.9,0.9999]",
        "run.max_steps=3",
        "tracking.wandb=off",
    ]
    assert bare_config(path, overrides) == load_config(path, overrides)
    for wrong in ("engine.nothing=1", "data.batch_size=x", "data.batch_size=0", "engine.precision=fp8", "word"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            bare_config(path, [wrong])


def test_only_who_records_there_needs_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(Config(tracking=TrackingConfig(wandb="off")))
    for mode in ("online", "offline"):
        with pytest.raises(ConfigError, match=f"tracking.wandb={mode}: the package wandb is not installed"):
            check_wandb(Config(tracking=TrackingConfig(wandb=mode)))
    # The trainer and all that it imports, in a process that has imported nothing yet.
    program = "import sys; sys.modules.update(wandb=None, submitit=None); import jitscale.train"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


def test_a_trace_gives_the_work_of_kernels() -> None:
    bf16 = "c10::BFloat16"
    product = {"Input Dims": [[4], [6, 2], [2, 4]], "Input type": [bf16] * 3}
    fused = {"Input Dims": [[8, 2], [8, 2], []], "Input type": ["float", bf16, "Scalar"]}
    attention = {"Input Dims": [[2, 288, 16, 80]] * 3, "Input type": [bf16] * 3}
    events = [
        event("cpu_op", "aten::addmm", 0, 5, **{"External id": 1, **product}),
        event("cpu_op", "triton_poi_fused_0", 6, 5, **{"External id": 2, **fused}),
        event("cpu_op", "aten::_flash_attention_forward", 12, 5, **{"External id": 3, **attention}),
        event("cuda_runtime", "cudaLaunchKernel", 1, 1),
        event("cuda_driver", "cuLaunchKernelEx", 7, 1),
        event("cuda_runtime", "cudaStreamSynchronize", 8, 1),
        event("kernel", "nvjet_hsh", 10, 1000, **{"External id": 1}),
        event("kernel", "triton_poi_fused_0", 900, 200, **{"External id": 2}),
        event("kernel", "flash_fwd", 2000, 100, **{"External id": 3}),
        event("kernel", "ncclDevKernel_AllReduce", 1050, 100),
    ]
    kernels, launches = trace.trace_of(events, on_gpu=True)
    assert launches == 2
    by_name = {kernel.name: kernel for kernel in kernels}
    assert by_name["nvjet_hsh"].flops == 2 * 6 * 2 * 4
    assert by_name["nvjet_hsh"].bytes == 2 * (4 + 12 + 8 + 24)
    assert (by_name["triton_poi_fused_0"].flops, by_name["triton_poi_fused_0"].bytes) == (None, 16 * 4 + 16 * 2)
    assert by_name["flash_fwd"].flops == 4 * 2 * 16 * 288**2 * 80
    assert trace.busy_ms(kernels) == pytest.approx((1150 - 10 + 100) / 1e3)
    assert trace.overlap_ms(kernels[3:], kernels[:3]) == pytest.approx(0.05)
    kinds = trace.by_kind(kernels)
    assert list(kinds)[:2] == ["matrix products", "fused by Inductor, or Triton"], "the longest first"
    assert set(kinds) == {"matrix products", "fused by Inductor, or Triton", "NCCL", "attention"}
    assert kinds["matrix products"]["gflop"] == pytest.approx(96 / 1e9)
    assert trace.by_name(kernels)[0]["name"] == "nvjet_hsh"


def run_suite(folder: Path, *parts: str, absent: list[str]) -> dict[str, Any]:
    """What `suite` with tiny sizes finds where the modules `absent` cannot be imported."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "tools/benchmark.py", "suite", "--out", str(folder / "out"), "--smoke"]
    command += ["--minutes", "60", *(["--parts", *parts] if parts else [])]
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "out/results.json").read_text())["items"]


def test_the_suite_where_our_packages_are_absent(tmp_path: Path) -> None:
    found = run_suite(tmp_path, "correct-norms", "profile-h-64", "step-h-64-attention-flash-attn", absent=ABSENT)
    assert {name: record["status"] for name, record in found.items()} == {
        "profile-h-64": "done",
        "correct-norms": "done",
        "step-h-64-attention-flash-attn": "refused",
    }
    assert found["correct-norms"]["result"]["wrong"] == []
    assert found["profile-h-64"]["result"]["engine"].startswith("plain torch, since this machine lacks deepspeed, ")
    said = report(tmp_path / "out")
    assert "**Tiny sizes" in said
    assert "**Where a step goes: H at 256 px, 64 images (plain torch" in said
    assert "| correct-norms | 5 comparisons, all right |" in said
    assert "| step-h-64-attention-flash-attn | refused | engine.attention=flash-attn does not work here" in said


ON_GPUS_ONLY = {"graphs", "bf16", "flash"}  # in the names of items that are refused on a CPU


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("absent", [ABSENT, ["wandb", "submitit"]], ids=["bare", "with ZeRO"])
def test_every_item_runs(tmp_path: Path, absent: list[str]) -> None:
    found = run_suite(tmp_path, absent=absent)
    wrong = {name: record for name, record in found.items() if record["status"] != "done"}
    assert {name for name, record in wrong.items() if not any(word in name for word in ON_GPUS_ONLY)} == set()
    assert {record["status"] for record in wrong.values()} == {"refused"}
    assert all(not record["result"].get("wrong") for name, record in found.items() if name not in wrong)
    assert any(name.startswith("multi") for name in found) == ("deepspeed" not in absent)
    engine = found["step-h-64"]["result"]["engine"]
    assert engine.startswith("plain torch") if "deepspeed" in absent else engine == "ZeRO stage 1"
    assert "**A training step.**" in report(tmp_path / "out")
