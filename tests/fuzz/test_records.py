"""Files of a run besides its checkpoints, and statistics from other programs."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import Config, EvaluationConfig, to_yaml
from jitscale.evaluation.blocks import compute_blocks
from jitscale.evaluation.networks import network_files
from jitscale.evaluation.reference import read_statistics
from jitscale.parallel import World
from jitscale.run_folder import Attempts, is_complete_under
from jitscale.tracking import Tracker
from tests.support.fuzzing import Command, Fuzzer, Mutator, done, tool
from tests.support.tiny import MODEL

pytestmark = pytest.mark.slow

WORLD = World(0, 1, 0, torch.device("cpu"))
LINE = {"step": 3, "images": 12, "loss": 0.5, "lr": 1e-3, "grad_norm": 1.0, "images_per_second": 9.0, "bad_samples": 0}
MEASURED = {"step": 3, "images": 12, "weights": "model", "fid": 9.0, "inception_score": 2.0, "fid_5k": 8.0}
BEST = {"weights": "model", "guidance_scale": 1.0, "guidance_interval": [0.1, 1.0]}
ROW = {**BEST, "fid": 2.0, "inception_score": 3.0, "num_images": 70}
RESULT = {"best": BEST, "fid": 2.0, "fid_floor": 0.5, "inception_score": 3.0, "num_images": 70, "table": [ROW, ROW]}
JOB = {
    "job": "local_1",
    "stage": "train x[bold] [/y]",
    "kind": "train",
    "run_dir": "x",
    "after": None,
    "log": "x",
    "submitted": "2026",
}


def lines(mutator: Mutator, line: dict[str, object]) -> bytes:
    """Four JSON lines, some of them changed."""
    found = [mutator.json(line) if mutator.often(0.5) else json.dumps(line).encode() for _ in range(4)]
    return b"\n".join(found) + (b"" if mutator.often(0.3) else b"\n")


def arrays(mutator: Mutator, content: dict[str, np.ndarray]) -> bytes:
    """An .npz of `content`, with changed, missing and renamed arrays, or with changed bytes."""
    random, changed, stream = mutator.random, dict(content), io.BytesIO()
    for _ in range(random.randint(1, 2) if mutator.active else 0):
        name, size = random.choice(list(content)), random.choice([0, 1, 3, 9])
        array = content[name].copy()
        if array.size and array.dtype.kind == "f":
            array.flat[random.randrange(array.size)] = random.choice([np.nan, np.inf, -1e300, 1e300, -5.0])
        others = [
            array,
            array,
            array.T,
            -array if array.dtype.kind == "f" else array,
            array.reshape(-1)[:1],
            np.zeros((size, size)),
        ]
        others += [np.array("text"), np.array(mutator.json({"floors": {"features": 1.0}}).decode(errors="replace"))]
        changed[name] = random.choice(
            [*others, array.astype("O"), array.astype("c16") if array.dtype.kind == "f" else array]
        )
        if mutator.often(0.2):
            changed.pop(name)
    np.savez(stream, **changed)
    return mutator.changed_bytes(stream.getvalue(), most=2) if mutator.often(0.3) else stream.getvalue()


def test_records_of_a_run(fuzz: Fuzzer) -> None:
    run = fuzz.inputs / "run"
    run.mkdir()
    config = Config(model=MODEL)
    config.run.dir = str(run)

    def written(mutator: Mutator, run: Path) -> Path:
        run.mkdir(exist_ok=True)
        config.run.dir = str(run)
        (run / "config.yaml").write_text(to_yaml(config))
        (run / "metrics.jsonl").write_bytes(lines(mutator, LINE))
        (run / "evaluations.jsonl").write_bytes(lines(mutator, MEASURED))
        (run / "result.json").write_bytes(mutator.json(RESULT) if mutator.often(0.6) else json.dumps(RESULT).encode())
        (run / "attempts.json").write_bytes(mutator.json({**vars(Attempts(2, 3)), "excluded": ["n1"]}))
        (run / "complete_train.json").write_bytes(mutator.json({"time": "x", "config": "x"}))
        return run

    def drawn(mutator: Mutator) -> Command:
        samples = written(mutator, run) / "samples"
        samples.mkdir(exist_ok=True)
        for path in samples.glob("*"):
            path.unlink()
        (
            samples / (f"{mutator.text()[:99].replace('/', '')}.png" if mutator.often(0.1) else "images_12.png")
        ).write_bytes(b"x")
        return tool("gallery", [str(run), "--output", str(fuzz.output / "page.html")])

    def resumed(mutator: Mutator) -> Command:
        folder = written(mutator, fuzz.output)
        return done(lambda: Tracker(config, folder, True, mutator.random.choice([0, 2, 9])).close())

    def started(mutator: Mutator) -> Command:
        folder = written(mutator, fuzz.output)
        return done(lambda: (is_complete_under(config), Attempts.begin(folder, mutator.random.choice([3, 9]))))

    def status(mutator: Mutator) -> Command:
        written(mutator, run)
        (jobs := fuzz.inputs / "jobs").mkdir(exist_ok=True)
        said = mutator.random.choice(
            ["", "error: a=[/x]: [red]", "error: \x1b[1m[/]", "a.bError: [link=x]y[", "error: \\"]
        )
        (run / "log_log.out").write_bytes(mutator.changed_bytes(said.encode(), most=2))
        (run / "log_result.pkl").write_bytes(mutator.changed_bytes(pickle.dumps(("error", said)), most=2))
        job = {**JOB, "run_dir": str(run), "log": str(run / "log_log.out")}
        (jobs / "local_1.json").write_bytes(mutator.json(job) if mutator.often(0.5) else json.dumps(job).encode())
        return tool("submit", ["status", "--folder", str(fuzz.inputs)])

    fuzz.run("metrics, evaluations, result: gallery", 100, drawn)
    fuzz.run("metrics, evaluations: a resume", 400, resumed)
    fuzz.run("attempts, completion: a start", 300, started)
    fuzz.run("records of jobs: submit status", 150, status)
    fuzz.finish()


def test_statistics_and_blocks(fuzz: Fuzzer) -> None:
    files = network_files(EvaluationConfig(features="digits"), WORLD)
    (size,) = files[0].sizes.values()
    statistics = {
        "mu": np.ones(size),
        "sigma": np.eye(size),
        "facts": np.array(json.dumps({"source": "x", "floors": {}})),
    }
    block = {"features": np.ones((4, 3), np.float32), "logits": np.ones((4, 2), np.float32), "labels": np.arange(4)}

    def reference(mutator: Mutator) -> Command:
        (path := fuzz.inputs / "x.npz").write_bytes(arrays(mutator, statistics))
        return done(lambda: read_statistics(str(path), files))

    def blocks(mutator: Mutator) -> Command:
        fuzz.output.mkdir()
        for number in range(3):
            data = arrays(mutator, block) if number == 1 else arrays(Mutator("", 0), block)
            (fuzz.output / f"block_{number:06d}.npz").write_bytes(data)

        def compute() -> None:
            (found,) = compute_blocks([fuzz.output], 3, 4, lambda missing: (block for _ in missing), WORLD, keep=True)
            assert {name: array.shape for name, array in found.items()} == {
                "features": (12, 3),
                "logits": (12, 2),
                "labels": (12,),
            }

        return done(compute)

    fuzz.run("statistics of a reference", 400, reference)
    fuzz.run("blocks of an evaluation", 300, blocks)
    fuzz.finish()
