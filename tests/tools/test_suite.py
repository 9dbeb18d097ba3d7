"""The suite of benchmarks resumes after every stop, records failures, and runs without our packages."""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import benchmark
import pytest

from benchmarks import suite, trace
from benchmarks.bare_config import bare_config
from benchmarks.report import report
from benchmarks.suite_items import PARTS, Item, items, names
from jitscale.config import Config, TrackingConfig, load_config
from jitscale.errors import ConfigError, UserError
from jitscale.tracking import check_wandb
from tests.support import ROOT

# Packages that the project needs or supports, but that a machine with torch and CUDA may lack.
ABSENT = ["deepspeed", "omegaconf", "wandb", "simplejpeg", "webdataset", "braceexpand", "submitit", "torchao"]
ABSENT += ["flash_attn", "hjson", "pydantic", "moto", "s3fs"]
# This replaces tools/benchmark.py. The first word of an item's settings selects how the item ends.
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
    """The items that the stand-in runs. Tests change this list."""
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


def test_failures_are_recorded_and_no_item_is_measured_twice(tmp_path: Path, cases: list[str]) -> None:
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


def test_an_item_without_enough_time_is_left_for_the_next_call(tmp_path: Path, cases: list[str]) -> None:
    cases += ["sound", "other"]
    seconds = suite.SPARE_SECONDS + 10.0
    short = options(tmp_path / "out", minutes=seconds / 60)
    suite.chosen = lambda parts: [  # type: ignore[assignment]  # The fixture's monkeypatch restores it.
        Item("first", "step", "sound", (), seconds=2),
        Item("long", "step", "sound", (), seconds=100),
    ]
    assert suite.measure(short)["items"] == {"first": "done", "long": "later"}
    # The next call starts with it, although its estimate is longer than the call.
    assert suite.measure(short)["items"] == {"first": "done", "long": "done"}


def test_a_stop_ends_the_item_and_loses_no_result(tmp_path: Path) -> None:
    """SIGTERM arrives in the middle of the second item."""
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
    said = '{"command": "stand-in", "images_per_second": %d}'
    (tmp_path / "stand_in.py").write_text(f"import carried\nprint({said!r} % carried.images)\n")
    cases.append("sound")
    suite.measure(options(tmp_path / "out", wheels=wheels))
    assert suite.read_results(tmp_path / "out")["item-sound"]["result"]["images_per_second"] == 7
    assert importlib.util.find_spec("carried") is None, "the path of this process is unchanged"


def test_invalid_wheels_are_refused(tmp_path: Path, cases: list[str]) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with pytest.raises(UserError, match=r"no \*\.whl there"):
        suite.measure(options(tmp_path / "out", wheels=wheels))
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no archive")
    with pytest.raises(UserError, match="pip cannot install them"):
        suite.measure(options(tmp_path / "out", wheels=wheels))
    with pytest.raises(UserError, match=r"broken-1.0-py3-none-any.whl: is no wheel"):
        suite.measure(options(tmp_path / "out", wheels=wheels, list=True))


def test_a_list_writes_and_installs_nothing(tmp_path: Path, cases: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    listed = [Item(name, "step", "step", (), packages=(name,)) for name in ("carried", "absent_one")]
    monkeypatch.setattr(suite, "chosen", lambda parts: listed)
    monkeypatch.setattr(suite.subprocess, "run", lambda *_, **__: pytest.fail("something was installed"))
    found = suite.measure(options(tmp_path / "out", wheels=wheels, list=True))["items"]
    assert found == {"carried": "later", "absent_one": "skipped: this machine lacks absent_one"}
    assert not (tmp_path / "out").exists()


def test_tiny_and_real_results_never_mix(tmp_path: Path, cases: list[str]) -> None:
    cases.append("sound")
    for smoke, refusal in ((False, "holds results of real sizes; choose another"), (True, "holds results of --smoke")):
        out = tmp_path / str(smoke)
        suite.measure(options(out, smoke=smoke))
        before = (out / "results.json").read_bytes()
        with pytest.raises(UserError, match=refusal):
            suite.measure(options(out, smoke=not smoke))
        assert (out / "results.json").read_bytes() == before


RECORD = {"status": "done", "smoke": False, "source": "0", "result": {"command": "step"}}


@pytest.mark.parametrize(
    ("held", "fault"),
    [
        ("{", "Expecting property name"),
        ("7", "it has no items"),
        ({"items": []}, "it has no items"),
        ({"items": {"x": 7}}, "x is no record"),
        ({"items": {"x": {**RECORD, "smoke": None}}}, "x has an impossible smoke"),
        ({"items": {"x": {k: v for k, v in RECORD.items() if k != "smoke"}}}, "x has no smoke"),
        ({"items": {"x": {k: v for k, v in RECORD.items() if k != "result"}}}, "x has no result"),
        ({"items": {"x": {**RECORD, "status": "failed"}}}, "x has no reason"),
        ({"items": {"x": {**RECORD, "result": {}}}}, "the result of x has no command"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, held: Any, fault: str) -> None:
    (tmp_path / "results.json").write_text(held if isinstance(held, str) else json.dumps(held))
    refusal = rf"results.json: is no file of results \({fault}.*\); move it away"
    for read in (lambda: report(tmp_path), lambda: suite.measure(options(tmp_path))):
        with pytest.raises(UserError, match=refusal):
            read()


def test_results_of_another_version_are_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"items": {"step-h-64": RECORD}}))
    with pytest.raises(
        UserError, match=r"results.json: a result there lacks what the tables need \(KeyError: 'engine'"
    ):
        report(tmp_path)


def refusal_of(*arguments: str) -> str:
    command = [sys.executable, "tools/benchmark.py", "suite", *arguments]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2, finished.stderr
    (line,) = finished.stderr.splitlines()
    return line


def test_an_output_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refusal_of("--out", str(tmp_path / "file"))
    assert said.startswith(f"error: --out {tmp_path}/file: cannot be made a folder (")


@pytest.mark.parametrize("minutes", ["0", "-3", "0.1", "nan", "inf", "x"])
def test_too_few_minutes_are_refused(minutes: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{minutes}' is no number of minutes from 0.5 on"):
        benchmark._minutes(minutes)
    assert benchmark._minutes("0.5") == 0.5


def test_an_unknown_part_is_refused_in_one_line() -> None:
    with pytest.raises(argparse.ArgumentTypeError) as refused:
        benchmark._part("foo")
    assert "'foo' is neither a part nor an item; the parts are correct, step, " in str(refused.value)
    assert "--list" in str(refused.value)
    assert len(str(refused.value)) < 200
    assert benchmark._part("step") == "step"
    assert benchmark._part("step-h-64") == "step-h-64"


def test_items_have_unique_names_and_a_part() -> None:
    listed = items()
    assert len({item.name for item in listed}) == len(listed)
    assert {item.part for item in listed} == set(PARTS)
    assert set(names()) == {*PARTS, *(item.name for item in listed)}
    unknown = Item("x", "step", "step", (), ("engine.nothing=1",))
    assert unknown.obstacle(1, smoke=False) == "this checkout has no setting engine.nothing"
    other = Item("x", "step", "step", (), ("engine.attention=nothing",))
    assert other.obstacle(1, smoke=False) == "this checkout has no engine.attention=nothing"
    absent = Item("x", "step", "step", (), packages=("absent_one",))
    assert absent.obstacle(1, smoke=False) == "this machine lacks absent_one"
    assert absent.obstacle(1, smoke=False, carried={"absent_one"}) is None
    assert Item("x", "multi", "multi", (), gpus=2).obstacle(1, smoke=False) == (
        "this machine has 1 GPU, and 2 are needed"
    )


def test_each_item_measures_something_of_its_own() -> None:
    """A changed setting is no default on a GPU, and the item that it is compared with is measured too."""
    listed = {item.name: item for item in items()}
    defaults = {"engine.cuda_graphs=true", "engine.compile=true", "engine.align=true", "engine.fused_kernels=triton"}
    for item in listed.values():
        assert not defaults & set(item.settings), item.name
        if item.changes and item.command == "step":
            assert not listed["-".join(item.name.split("-")[:3])].changes
    measured = {(item.command, item.options, item.settings) for item in listed.values()}
    assert len(measured) == len(listed)
    for name in ("step-b-64", "step-h-16", "step-h-64"):
        assert listed[f"{name}-graphs-off"].settings == ("engine.cuda_graphs=false",)
    assert listed["profile-h-64"].settings == ("engine.cuda_graphs=false",), (
        "with graphs, the sizes of kernels would be unknown"
    )
    assert listed["step-h-64-plain"].changes == ("--engine plain",)
    assert "simplejpeg" in listed["step-h-64-stage-2"].packages, "without it, plain torch would be measured as stage 2"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("jit_*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_is_the_same_without_omegaconf(path: Path) -> None:
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


@pytest.mark.parametrize(
    "override",
    [
        *("engine.cuda_graphs=maybe", "engine.align=2", "engine.align=1.0", "engine.compile=", "engine.compile=["),
        *("data.batch_size=true", "data.batch_size=1.5", "data.batch_size=null", "data.batch_size=010"),
        *("optim.lr=true", "optim.lr=1:30", "ema.decays=0.9", "ema.decays=[0.9,true]", "evaluation.more_features=x"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_without_omegaconf_too(override: str) -> None:
    path = ROOT / "configs/jit_b_256.yaml"
    for read in (bare_config, load_config):
        with pytest.raises(ConfigError, match=rf"{override.partition('=')[0]}=.* (has the wrong type|is|cannot)"):
            read(path, [override, "run.max_steps=3"])


def test_values_are_read_the_same_way_without_omegaconf() -> None:
    path = ROOT / "configs/jit_b_256.yaml"
    sound = ["engine.align=1", "engine.compile=off", "data.batch_size=1_000", "optim.lr=1e-04", "data.held_out=0.1"]
    sound += ["evaluation.sweep=[guidance=2:3:0.2]", "engine.cuda_graphs=null", "run.max_steps=3"]
    assert bare_config(path, sound) == load_config(path, sound)
    with pytest.raises(ConfigError, match=r"run.dir=.* has an interpolation, which needs OmegaConf"):
        bare_config(path, ["run.dir=${oc.env:HOME}"])


def test_only_runs_that_record_in_wandb_need_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    check_wandb(Config(tracking=TrackingConfig(wandb="off")))
    for mode in ("online", "offline"):
        with pytest.raises(ConfigError, match=f"tracking.wandb={mode}: the package wandb is not installed"):
            check_wandb(Config(tracking=TrackingConfig(wandb=mode)))
    # Import the trainer and all its modules, in a process that has imported nothing yet.
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
    assert list(kinds)[:2] == ["matrix products", "fused by Inductor, or Triton"], "the longest kind comes first"
    assert set(kinds) == {"matrix products", "fused by Inductor, or Triton", "NCCL", "attention"}
    assert kinds["matrix products"]["gflop"] == pytest.approx(96 / 1e9)
    assert trace.by_name(kernels)[0]["name"] == "nvjet_hsh"


def run_suite(folder: Path, *parts: str, absent: list[str]) -> dict[str, Any]:
    """The records of `suite` at tiny sizes, in an environment where the modules `absent` cannot be imported."""
    (folder / "site").mkdir()
    (folder / "site/sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n")
    path = os.pathsep.join([str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "tools/benchmark.py", "suite", "--out", str(folder / "out"), "--smoke"]
    command += ["--minutes", "60", *(["--parts", *parts] if parts else [])]
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads((folder / "out/results.json").read_text())["items"]


def test_the_suite_runs_without_our_packages(tmp_path: Path) -> None:
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
    assert re.search(r"\| correct-norms \| \d+ comparisons, all right \|", said)
    assert "| step-h-64-attention-flash-attn | refused | engine.attention=flash-attn does not work here" in said


ON_GPUS_ONLY = {"graphs", "bf16", "flash", "cudnn"}  # Items with these words in their names are refused on a CPU.


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
