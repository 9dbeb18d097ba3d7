"""Checkpoints of a run, safetensors files, files of the authors, and Hugging Face folders."""

import json
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import jitscale
from jitscale.checkpoints.format import Checkpoint, Progress, step_folder
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.weights import description
from jitscale.config import Config, EmaConfig, RunConfig, to_yaml
from jitscale.files import sha256_of
from jitscale.model.jit import JiT
from tests.support import FILES
from tests.support.fuzzing import Command, Fuzzer, Mutator, done, tool
from tests.support.tiny import MODEL

pytestmark = pytest.mark.slow

Reader = Callable[[Mutator, Path], Command]


def read(mutator: Mutator, path: Path) -> Command:
    """Load the network with each weight set, as a user of Python does."""
    return done(lambda: [jitscale.load_model(path, name) for name in (None, "model")])


def converted(fuzz: Fuzzer, mutator: Mutator, path: Path) -> Command:
    """Convert to another form, including all tensors."""
    form = mutator.random.choice(["safetensors", "run", "authors", "huggingface", "diffusers"])
    more = ["--config", str(fuzz.folder / "inputs/config.yaml")] if form == "run" else []
    averages = ["--ema1=ema_0.9", "--ema2=ema_0.99"] if form == "authors" else []
    more += ["--samples", "0"] if form in ("huggingface", "diffusers") else []
    output = fuzz.output / "x.pth" if form == "authors" else fuzz.output
    words = ["--checkpoint", str(path), "--to", form, "--output", str(output), *more, *averages]
    convert = tool("convert_checkpoint", words)

    def call() -> int:
        code = convert()
        assert open_weights(output, fuzz.inputs / "config.yaml").weight_sets, "the output can be read"
        return code

    return call


def write_run(run: Path) -> Path:
    """A run of the tiny network with a checkpoint at step 7; returns the step's folder."""
    torch.manual_seed(0)
    config = Config(model=MODEL, ema=EmaConfig(decays=[0.9, 0.99]), run=RunConfig(max_steps=9))
    config.evaluation.weights, config.run.dir, config.data.shards = "ema_0.9", str(run), "nowhere"
    tensors = {name: parameter.detach() for name, parameter in JiT(config.model).named_parameters()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    progress = Progress(7, 28, 7, {"seed": 0, "streams": 1, "window": 16, "manifest": "x", "origin": 0})
    sets = ["model", "ema_0.9", "ema_0.99", "exp_avg", "exp_avg_sq"]
    folder = write_streamed(step_folder(run, 7), progress, config, shapes, sets, lambda _, name: tensors[name])
    (run / "config.yaml").write_text(to_yaml(config))
    return folder


def safetensors_bytes(mutator: Mutator, data: bytes) -> bytes:
    """A safetensors file with a changed header (as text or as JSON), or with changed bytes."""
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    if mutator.often(0.4):
        return mutator.changed_bytes(data, most=2)
    changed = mutator.json(header)
    length = mutator.random.choice([0, 1, 2**63, 2**40, len(changed) - 1]) if mutator.often(0.1) else len(changed)
    return struct.pack("<Q", length) + changed + body


def test_a_runs_checkpoint(fuzz: Fuzzer) -> None:
    sound = fuzz.inputs / "sound"
    (rank_file,) = (folder := write_run(sound)).glob("*.safetensors")
    shutil.copy(sound / "config.yaml", fuzz.inputs / "config.yaml")
    index, marker = (json.loads((folder / name).read_text()) for name in ("index.json", "COMPLETE"))

    def damaged(mutator: Mutator) -> Path:
        run = fuzz.inputs / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(sound, run)
        if not mutator.active:
            return run
        step = run / folder.relative_to(sound)
        for name in mutator.random.sample(
            ["index.json", "index.json", "COMPLETE", "config.yaml", rank_file.name, "run"], 2
        ):
            if name == "run":
                (run / "config.yaml").write_bytes(mutator.changed_bytes((run / "config.yaml").read_bytes(), most=1))
                continue
            if not (step / name).is_file():  # The first change removed the file.
                continue
            data = (folder / name).read_bytes()
            if name == "index.json":
                data = mutator.json(index)
            elif name == "COMPLETE":
                data = mutator.json(marker)
            elif name == "config.yaml":
                data = yaml.safe_dump(mutator.tree(yaml.safe_load(data))).encode(errors="surrogatepass")
            else:
                data = safetensors_bytes(mutator, data)
            if mutator.often(0.05):
                (step / name).unlink()
                mutator.random.choice([(step / name).mkdir, partial((step / name).symlink_to, "/dev/zero"), list])()
                continue
            (step / name).write_bytes(data)
            # The marker then agrees with the change.
            if name != "COMPLETE" and (step / "COMPLETE").is_file() and mutator.often(0.8):
                again = {other: sha256_of(step / other) for other in marker if (step / other).is_file()}
                (step / "COMPLETE").write_text(json.dumps({**marker, **again}))
        return run

    def opened(mutator: Mutator) -> Command:
        step = damaged(mutator) / folder.relative_to(sound)
        return done(lambda: Checkpoint(step).verify())

    fuzz.run("checkpoint: opened and verified", 400, opened)
    fuzz.run("checkpoint: load_model", 150, lambda mutator: read(mutator, damaged(mutator)))
    fuzz.run("checkpoint: convert_checkpoint", 100, lambda mutator: converted(fuzz, mutator, damaged(mutator)))
    fuzz.finish()


def test_files_of_weights(fuzz: Fuzzer) -> None:
    torch.manual_seed(0)
    config = Config(model=MODEL, run=RunConfig(max_steps=9))
    (fuzz.inputs / "config.yaml").write_text(to_yaml(config))
    tensors = {name: parameter.detach() for name, parameter in JiT(config.model).named_parameters()}
    save_file(tensors, plain := fuzz.inputs / "plain.safetensors", description("model", config))
    save_file(
        {f"module.{name}": tensor for name, tensor in tensors.items()}, other := fuzz.inputs / "other.safetensors"
    )
    authors = (FILES / "jit_tiny_heun.checkpoint-last.pth").read_bytes()
    described = {key: vars(value) for key, value in (("model", config.model), ("diffusion", config.diffusion))}

    def written(mutator: Mutator) -> Path:
        chosen = mutator.random.choice([plain, plain, plain, other]) if mutator.active else plain
        (path := fuzz.inputs / "x.safetensors").write_bytes(safetensors_bytes(mutator, chosen.read_bytes()))
        return path

    def hub(mutator: Mutator) -> Path:
        (folder := fuzz.inputs / "hub").mkdir(exist_ok=True)
        shutil.copy(plain, folder / "model.safetensors")
        (folder / "config.json").write_bytes(mutator.json({**described, "weights": "model"}))
        return folder

    def pth(mutator: Mutator) -> Command:
        (path := fuzz.inputs / "x.pth").write_bytes(mutator.changed_bytes(authors, most=2))
        # The first bytes hold the pickle.
        if mutator.often(0.5):
            path.write_bytes(mutator.changed_bytes(authors[:8000], most=2) + authors[8000:])
        sizes = {**vars(MODEL), "depth": 3}
        return done(lambda: jitscale.load_model(path, config=sizes))

    fuzz.run("safetensors: load_model", 250, lambda mutator: read(mutator, written(mutator)))
    fuzz.run(
        "safetensors: convert_checkpoint",
        100,
        lambda mutator: (
            converted(fuzz, mutator, written(mutator)) if mutator.active else read(mutator, written(mutator))
        ),
    )
    fuzz.run("Hugging Face's config.json", 150, lambda mutator: read(mutator, hub(mutator)))
    fuzz.run("authors' file", 200, pth)
    fuzz.finish()
