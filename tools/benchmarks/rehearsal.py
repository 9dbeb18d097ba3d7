"""Run the whole path of an ImageNet recipe at full size with few images: photographs, shards, steps, sweep, FID.

There are fewer images and steps than in the recipe, the arithmetic on CPUs is float32, and Inception's weights are
random. So the metrics mean nothing; the time and memory of each part do. The two photographs are scikit-learn's.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from benchmarks.measuring import Table
from jitscale.errors import UserError
from jitscale.evaluation.inception import Inception
from jitscale.keyed_random import Purpose, uniform

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.5
LABELS = {
    "packing": "crops to shards",
    "start": "start: imports, checks, network, engine",
    "steps": "2 steps of {batch} images",
    "save": "the checkpoint",
    "real": "statistics of the real images",
    "sweep": "the sweep",
    "best": "the best setting, metrics and pictures",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory (bytes, sum over all ranks) of each part. Raises a UserError if a command fails."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        write_crops(scratch / "crops", options.images)
        torch.manual_seed(0)
        torch.save(Inception().state_dict(), scratch / "inception.pth")
        packing = ["--input", str(scratch / "crops"), "--output", str(scratch / "shards"), "--codec=raw"]
        parts = _watched(["tools/make_shards.py", *packing, "--resolution=256"], {"packing": lambda: False})
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
        train = ["-m", "jitscale.train", "--config", options.config, *_settings(options, scratch)]
        parts |= _watched([*(launcher if options.ranks > 1 else []), *train], _ends(scratch / "run"))
        return {"parts": parts, "result": (scratch / "run/result.json").read_text()}


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    return [
        (LABELS[name].format(**result), f"{seconds:.1f} s, {memory / 2**30:.2f} GiB")
        for name, (seconds, memory) in result["parts"].items()
    ]


def write_crops(folder: Path, count: int) -> None:
    """Write `count` square crops of the photographs, at random places and sizes; each is a class of its own."""
    from sklearn.datasets import load_sample_images  # noqa: PLC0415  # scikit-learn belongs to an extra

    photographs = load_sample_images().images
    draws = uniform(0, Purpose.PACKING_ORDER, np.arange(count)[:, None], np.arange(3))
    for number, (size, top, left) in enumerate(draws):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[:2]
        side = int(256 + size * (min(height, width) - 256))
        y, x = int(top * (height - side)), int(left * (width - side))
        (folder / f"{number:04d}").mkdir(parents=True)
        Image.fromarray(photograph[y : y + side, x : x + side]).save(folder / f"{number:04d}/crop.png")


def _settings(options: argparse.Namespace, scratch: Path) -> list[str]:
    """The settings that differ from the recipe's: counts, folders, Inception's weights, and the precision on CPUs."""
    run = [f"run.dir={scratch / 'run'}", "run.max_images=null", "run.max_steps=2"]
    data = [f"data.shards={scratch / 'shards'}", "data.classes=subset", f"data.batch_size={options.batch}"]
    tracking = ["tracking.wandb=off", "tracking.log_every_steps=1"]
    sweep = ['evaluation.sweep=["guidance=1,3"]', "evaluation.sweep_images=64", "evaluation.sweep_max_share=null"]
    final = ["evaluation.num_images=64", "evaluation.steps=4", f"evaluation.features_file={scratch / 'inception.pth'}"]
    # A CPU without bfloat16 instructions multiplies bfloat16 seventy times more slowly than float32.
    engine = [] if torch.cuda.is_available() else ["engine.precision=fp32"]
    return [*run, *data, *tracking, *sweep, *final, *engine, *options.overrides]


def _ends(run: Path) -> dict[str, Callable[[], bool]]:
    """For each part of a training, in order, a test by the files of the run whether it has ended."""
    return {
        "start": (run / "config.yaml").exists,
        "steps": lambda: any((run / "checkpoints").glob("*")),
        "save": lambda: any((run / "checkpoints").glob("*/COMPLETE")),
        "real": lambda: any(run.parent.glob("shards/real_images/*/facts.json")),
        "sweep": lambda: len(list((run / "evaluation").glob("samples_*/block_*.npz"))) >= 2,
        "best": (run / "complete_train.json").exists,
    }


def _watched(command: Sequence[str], ends: Mapping[str, Callable[[], bool]]) -> dict[str, tuple[float, int]]:
    """Seconds and peak bytes of each part of a Python command, with its child processes; a UserError if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, stdout=sys.stderr)
    found, begin, held = {}, time.monotonic(), 0
    for name, has_ended in ends.items():
        peak = held  # a part may be shorter than POLL_SECONDS
        while process.poll() is None and not has_ended():
            held = _memory_of(process.pid)
            peak = max(peak, held)
            time.sleep(POLL_SECONDS)
        end = time.monotonic()
        found[name] = (end - begin, peak)
        begin = end
    if process.wait() != 0:
        raise UserError(f"{' '.join(command)}: ended with code {process.returncode}; see above")
    return found


def _memory_of(pid: int) -> int:
    """Bytes of a process and its children; each shared page is divided among the processes that share it."""
    held = 0
    with suppress(psutil.Error):  # a process may end meanwhile
        main = psutil.Process(pid)
        for process in [main, *main.children(recursive=True)]:
            with suppress(psutil.Error):
                held += process.memory_full_info().pss
    return held
