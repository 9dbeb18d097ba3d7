"""Saving and loading the whole state of a run, and how long training stalls for it."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import Stopwatch, Table, measured_config
from jitscale import parallel
from jitscale.checkpoints.format import Checkpoint, Flats, Progress, load_fragments, step_folder
from jitscale.checkpoints.saving import Save
from jitscale.config import Config
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine

IMPORTS = ("import torch", "import jitscale.config", "import jitscale.training.trainer")
LABELS = {
    "stall_sync": "training stalls, synchronous save",
    "stall_async": "training stalls, asynchronous save: the state is copied",
    "written_async": "until an asynchronous checkpoint is complete, nothing else running",
    "verify": "verify: sha256 of all files",
    "load": "load into the engine",
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of saving, stalling, verifying, loading and importing."""
    config, device = measured_config(options, ["tracking.wandb=off"], on_gpu=False)
    watch, imports = Stopwatch(device), Stopwatch(device)
    with parallel.joined(device) as world, tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        size = _time_saves(watch, config, world, Path(scratch), options.repeats)
    for line in 2 * IMPORTS:
        with imports.part(line):  # a fresh interpreter that does nothing else
            subprocess.run([sys.executable, "-c", line], check=True, stderr=subprocess.DEVNULL)
    return {
        "bytes": size,
        "seconds": watch.medians(),
        "range": {name: [min(measured), max(measured)] for name, measured in watch.times.items()},
        "imports": {line: min(measured) for line, measured in imports.times.items()},  # the first may fill caches
    }


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    lines = [("size", f"{result['bytes'] / 1e9:.2f} GB")]
    for name, label in LABELS.items():
        low, high = result["range"][name]
        lines.append((label, f"{result['seconds'][name]:.2f} s ({low:.2f} to {high:.2f})"))
    return [*lines, *((f"python -c '{line}'", f"{seconds:.2f} s") for line, seconds in result["imports"].items())]


def _time_saves(watch: Stopwatch, config: Config, world: parallel.World, folder: Path, repeats: int) -> int:
    """Save synchronously and asynchronously, and load; returns the bytes of a checkpoint."""
    engine = ZeroEngine(JiT(config.model, config.diffusion).train(), config, world)
    ema = ShardedEma(config.ema, engine.masters())
    engine.prepare_to_load(1)  # creates the moments, as a first step would
    engine.finish_loading()

    def begin(step: int) -> Save:
        sets: dict[str, Flats] = {"model": engine.masters(), **ema.sets, **engine.moments()}
        return Save(step_folder(folder, step), Progress(step, step, 1, None), config, engine.fragments, sets)

    for repeat in range(repeats):
        with watch.part("stall_sync"):
            begin(2 * repeat).finish()
        with watch.part("written_async"):
            with watch.part("stall_async"):
                save = begin(2 * repeat + 1)
            path = save.finish()
        checkpoint = Checkpoint(path)
        with watch.part("verify"):
            checkpoint.verify()
        with watch.part("load"):
            load_fragments(checkpoint, engine.fragments, {**engine.prepare_to_load(1), **ema.sets})
            engine.finish_loading()
    engine.destroy()
    return sum(file.stat().st_size for file in path.iterdir())
