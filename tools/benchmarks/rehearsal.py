"""The whole path of an ImageNet recipe at its real sizes, with small counts: photographs, shards, steps, sweep, FID.

Only counts of images and steps differ from the recipe, on CPUs the arithmetic (float32), and Inception's weights, which
are random: the metrics mean nothing, the time and memory of each part do. scikit-learn brings the two photographs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from jitscale.errors import UserError
from jitscale.evaluation.inception import Inception
from jitscale.keyed_random import Purpose, uniform

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.5


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory (bytes, of all ranks together) of each part.

    Raises:
        UserError: a command of the path fails.
    """
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        scratch = Path(name)
        write_crops(scratch / "crops", options.images)
        torch.manual_seed(0)
        torch.save(Inception().state_dict(), scratch / "inception.pth")
        packing = ["--input", str(scratch / "crops"), "--output", str(scratch / "shards"), "--codec=raw"]
        pack = _Watched(["tools/make_shards.py", *packing, "--resolution=256"], ranks=1)
        pack.wait()
        run = scratch / "run"
        train = _Watched(
            ["-m", "jitscale.train", "--config", options.config, *_settings(options, scratch)], options.ranks
        )
        parts = _parts(train, run)
        train.wait()
        result = (run / "result.json").read_text()
    return {
        "config": options.config,
        "ranks": options.ranks,
        "batch": options.batch,
        "parts": {"packing": (pack.seconds, pack.peak()), **parts},
        "result": result,
    }


def describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the table of `measure`."""
    labels = {
        "packing": "crops to shards",
        "start": "start: imports, checks, network, engine",
        "steps": f"2 steps of {result['batch']} images",
        "save": "the checkpoint",
        "real": "statistics of the real images",
        "sweep": "the sweep",
        "best": "the best setting, metrics and pictures",
    }
    return [
        (labels[name], f"{seconds:.1f} s, {memory / 2**30:.2f} GiB")
        for name, (seconds, memory) in result["parts"].items()
    ]


def write_crops(folder: Path, count: int) -> None:
    """`count` square crops of the photographs, of random sizes and places, one a class."""
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
    """Counts, places and Inception's weights; all else is the recipe's, on CPUs but for the arithmetic."""
    # A CPU without instructions for bfloat16 multiplies it seventy times slower than float32.
    arithmetic = [] if torch.cuda.is_available() else ["engine.precision=fp32"]
    return [
        *arithmetic,
        *(f"run.dir={scratch / 'run'}", f"data.shards={scratch / 'shards'}", "tracking.wandb=off"),
        *("run.max_images=null", "run.max_steps=2", f"data.batch_size={options.batch}", "tracking.log_every_steps=1"),
        *(
            "evaluation.num_images=64",
            "evaluation.sweep_images=64",
            "evaluation.steps=4",
            "evaluation.sweep_max_share=null",
        ),
        *('evaluation.sweep=["guidance=1,3"]', f"evaluation.features_file={scratch / 'inception.pth'}"),
        *options.overrides,
    ]


class _Watched:
    """A command on some ranks, with the memory of all of them over time."""

    def __init__(self, command: Sequence[str], ranks: int) -> None:
        self.started = time.time()
        self._samples: list[tuple[float, int]] = []
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        self._process = subprocess.Popen(
            [sys.executable, *launcher, *command], cwd=ROOT, env=environment, stdout=sys.stderr
        )
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self.seconds = 0.0

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Until its end.

        Raises:
            UserError: it failed.
        """
        code = self._process.wait()
        self._thread.join()
        self.seconds = time.time() - self.started
        if code != 0:
            raise UserError(f"{' '.join(map(str, self._process.args))}: ended with code {code}; see above")  # type: ignore[arg-type]

    def peak(self, begin: float = 0.0, end: float = float("inf")) -> int:
        """Bytes that all ranks held together at most between two times."""
        before = [held for at, held in self._samples if at < begin][-1:]  # a part may be shorter than a look
        return max([*before, *(held for at, held in self._samples if begin <= at <= end)], default=0)

    def _watch(self) -> None:
        main = psutil.Process(self._process.pid)
        while self.runs:
            held = 0
            for process in (main, *_children(main)):
                try:
                    held += process.memory_full_info().pss  # pages that processes share are divided among them
                except psutil.Error:
                    continue  # ended meanwhile
            self._samples.append((time.time(), held))
            time.sleep(POLL_SECONDS)


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _parts(train: _Watched, run: Path) -> dict[str, tuple[float, int]]:
    """Where the time goes, by when the files of a run appear."""
    marks = {
        "start": (run / "config.yaml").exists,
        "steps": lambda: any((run / "checkpoints").glob("*")),
        "save": lambda: any((run / "checkpoints").glob("*/COMPLETE")),
        "real": lambda: any(run.parent.glob("shards/real_images/*/facts.json")),
        "sweep": lambda: len(list((run / "evaluation").glob("samples_*/block_*.npz"))) >= 2,
        "best": (run / "complete_train.json").exists,
    }
    found, begin = {}, train.started
    for name, is_there in marks.items():
        while train.runs and not is_there():
            time.sleep(POLL_SECONDS)
        end = time.time()
        found[name] = (end - begin, train.peak(begin, end))
        begin = end
    return found
