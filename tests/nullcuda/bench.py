"""The parts that all checks share: folders, shards, processes under test, and the result of a check."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
HOME = Path(os.environ.get("NULLCUDA_HOME", Path.home() / ".cache/jitscale-nullcuda"))
CHECKOUT = KIT.parents[1]
CONFIG = "configs/jit_h_256.yaml"
# A small network with JiT-H's head dim, 80. There is no warm-up and no W&B.
SMALL = [
    *("model.image_size=32", "model.patch_size=4", "model.hidden_size=320", "model.depth=4", "model.num_heads=4"),
    *("model.in_context_start=1", "model.in_context_len=4", "model.bottleneck_dim=16", "model.num_classes=10"),
    *("data.batch_size=16", "data.num_workers=1", "data.streams=4", "data.window=16", "optim.warmup_images=0"),
    *("run.max_images=null", "run.max_steps=6", "tracking.wandb=off", "tracking.log_every_steps=2"),
    *("checkpoint.every_images=48", "evaluation.grid_every_images=0", "evaluation.block_size=8"),
    *("evaluation.at_end=false", "evaluation.every_images=0"),  # A recipe may measure; here only MEASURE does.
]
EAGER = ["engine.compile=false"]
HARD = ["optim.grad_clip=1.0", "engine.micro_batch_size=8", "checkpoint.asynchronous=true"]
MEASURE = [
    *("evaluation.at_end=true", "evaluation.features=digits", "evaluation.num_images=32", "evaluation.steps=4"),
    "evaluation.sweep=null",
]
# Half of the tokens skip two of the four blocks. The middle output layer sees the other half.
ROUTED = ["model.route_share=0.5", "model.route_blocks=[1,-1]", "model.middle_head=2"]
LIMIT = 1200.0  # in seconds, for one process
PATIENCE = 5.0  # in seconds; a rank lives this long after another one has failed
STEP = 4  # the recorded step; earlier steps allocate memory
# No saves and few log lines happen around the recorded step.
QUIET = ["checkpoint.every_images=1000000000", "tracking.log_every_steps=1000"]


@dataclass
class Outcome:
    """The result of a check. The figure is one line; the details are lines below it."""

    ok: bool
    figure: str
    details: list[str] = field(default_factory=list)


@dataclass
class Finished:
    """A finished process: its exit code, its output, and the record of inside.py."""

    code: int
    output: str
    report: dict[str, Any]
    seconds: float

    @property
    def step(self) -> dict[str, Any] | None:
        return self.report.get("step")

    def why(self, needed: Sequence[str] = ("probe", "train_step"), several: bool = False) -> str:
        """The most informative line about a failure. With several processes, the line comes from the first one.

        `needed` names patches of inside.py. A missing patch may be the reason of the failure.
        """
        lines = [re.sub(r"^\[\w+\]:\s*", "", line).strip() for line in self.output.replace("\r", "\n").splitlines()]
        told = [
            line
            for line in lines
            if re.match(r"(error: |srun: error|preflight: node|[\w.]*(Error|Exception|Unsupported)\b.*: )", line)
        ]
        whole = [line for line in lines if line] or ["no output"]
        # In a chain of exceptions, the last one is the cause that counts.
        text = told[0 if several else -1] if told else whole[-1]
        missing = sorted(set(needed) - set(self.report.get("patched", []))) if self.report else []
        found = (
            f" [not found in what was imported until then, to be patched: {', '.join(missing)}; see inside.py]"
            if missing
            else ""
        )
        return f"exit code {self.code}: {text[:300]}{found}"


class Bench:
    """The place where checks run: folders, shards, environments."""

    def __init__(self, scratch: Path, logs: Path) -> None:
        self.scratch, self.logs = scratch, logs
        self._shards: dict[int, Path] = {}
        self._lock = threading.Lock()
        # the times at which ranks of a group have failed, by the group's port
        self._failed_at: dict[str, list[float]] = {}
        # The checkout looks installed, because a save asks for its version.
        version = re.search(r'^version = "(.+)"', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
        described = scratch / "installed" / f"jitscale-{version[1] if version else '0'}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: jitscale\nVersion: {version[1] if version else '0'}\n"
        )
        self.environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{described.parent}", "TQDM_MININTERVAL": "5"}

    def shards(self, size: int, images: int = 256) -> Path:
        """Shards of random images, packed by the project's tool."""
        with self._lock:
            if size not in self._shards:
                import numpy as np  # noqa: PLC0415
                from PIL import Image  # noqa: PLC0415

                source = self.scratch / f"images{size}"
                for number in range(images):
                    pixels = np.random.default_rng(number).integers(256, size=(size, size, 3), dtype=np.uint8)
                    folder = source / f"class{number % 10}"
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{number:04d}.png")
                target = self.scratch / f"shards{size}"
                tool = [sys.executable, "tools/make_shards.py", "--input", str(source), "--output", str(target)]
                options = ["--resolution", str(size), "--codec", "raw", "--samples-per-shard", str(images // 4)]
                done = self.run(f"shards{size}", [*tool, *options], {})
                if done.code != 0:
                    raise RuntimeError(f"tools/make_shards.py: {done.why()}")
                self._shards[size] = target
            return self._shards[size]

    def run(self, log: str, command: Sequence[str], variables: dict[str, str], folder: Path = CHECKOUT) -> Finished:
        """Run a command to its end. At the time limit, or soon after a peer has failed, end it and its children."""
        report, path = self.scratch / f"{log}.json", self.scratch / f"{log}.log"
        environment = {**self.environment, "NULLCUDA_REPORT": str(report), "NULLCUDA_STEP": str(STEP), **variables}
        peers = self._failed_at.get(variables.get("MASTER_PORT", ""), None)
        started = time.monotonic()
        with path.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
            )
            while process.poll() is None:
                time.sleep(0.1)
                now = time.monotonic()
                if now - started > LIMIT or (peers and now - peers[0] > PATIENCE):
                    os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if code != 0 and peers is not None:
            peers.append(time.monotonic())
        shutil.copyfile(path, self.logs / path.name)  # Checks of another checkout may write here at the same time.
        recorded = json.loads(report.read_text()) if report.exists() else {}
        return Finished(code, path.read_text(errors="replace"), recorded, time.monotonic() - started)

    def module(
        self,
        log: str,
        module: str,
        arguments: Sequence[str],
        variables: dict[str, str] | None = None,
        folder: Path = CHECKOUT,
    ) -> Finished:
        """Run a module of the project with the patches of inside.py."""
        inside = [sys.executable, str(KIT / "inside.py"), "-m", module, *arguments]
        return self.run(log, inside, variables or {}, folder)

    def train(
        self,
        name: str,
        settings: Sequence[str],
        variables: dict[str, str] | None = None,
        small: bool = True,
        run: str | None = None,
        config: str = CONFIG,
    ) -> Finished:
        """Run jitscale.train on the small network, or on the config's own network."""
        size = 32 if small else 256
        own = (
            SMALL
            if small
            else [
                "tracking.wandb=off",
                "data.classes=subset",  # These images have ten classes.
                "data.streams=8",
                "data.window=32",
                "data.num_workers=2",
                "optim.warmup_images=0",
            ]
        )
        places = [f"run.dir={self.scratch / 'runs' / (run or name)}", f"data.shards={self.shards(size)}"]
        return self.module(name, "jitscale.train", ["--config", config, *own, *places, *settings], variables)

    def ranks(
        self, name: str, settings: Sequence[str], devices: str, variables: dict[str, str] | None = None
    ) -> list[Finished]:
        """Run two ranks with the environment that torchrun sets, or srun if it binds a GPU to each task."""
        self.shards(32)
        common = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "NULL_DEVICES": devices,
            **(variables or {}),
        }
        self._failed_at[common["MASTER_PORT"]] = []
        with ThreadPoolExecutor(2) as pool:
            started = [
                pool.submit(
                    self.train,
                    f"{name}_{rank}",
                    settings,
                    {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    True,
                    name,
                )
                for rank in range(2)
            ]
            return [one.result() for one in started]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Check = Callable[[Bench], Outcome]
CHECKS: dict[str, tuple[Check, bool]] = {}


def check(slow: bool = False) -> Callable[[Check], Check]:
    def add(function: Check) -> Check:
        CHECKS[function.__name__] = (function, slow)
        return function

    return add


def idle(done: Finished) -> str | None:
    """The fault of a run that ended well but may not have used the device; None: no fault."""
    if done.step is None:
        return "the run ended well, but no step was recorded: is there a method train_step? see inside.py"
    counted = done.step["counters"]
    return (
        None
        if counted["launch"] + counted["graph_launch"] > 0
        else "the run ended well, but its step launched no kernel"
    )


def unrecorded(done: Finished) -> str:
    return done.why() if done.code != 0 else idle(done) or "no step was recorded"


def to_its_end(done: Finished, extra: str = "") -> Outcome:
    if done.code != 0:
        return Outcome(False, done.why())
    if fault := idle(done):
        return Outcome(False, fault)
    kernel = re.search(r"attention ([\w-]+)", done.output)
    return Outcome(True, f"to its end in {done.seconds:.0f} s, attention {kernel[1] if kernel else 'unknown'}{extra}")


def launches(step: dict[str, Any]) -> str:
    counted = step["counters"]
    kernels = counted["launch"] + counted["driver_launch"]
    graphs = f", {counted['graph_launch']} graphs" if counted["graph_launch"] else ""
    return (
        f"{kernels} kernels ({counted['driver_launch']} compiled), {counted['product']} products, "
        f"{counted['copy_async']} copies, {counted['memset']} fills, {counted['collective']} collectives{graphs}"
    )
