"""The stages of a chain of jobs: train at a resolution, upgrade to another, train there, evaluate."""

import itertools
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jitscale.checkpoints.format import complete_checkpoints
from jitscale.command import call_python
from jitscale.config import AUTO, load_config
from jitscale.data.shards import open_training_shards
from jitscale.errors import ExitCode, UserError
from jitscale.evaluation.choice import settle_for_training
from jitscale.launch.slurm import SlurmJob
from jitscale.launch.supervisor import Supervisor, work_of
from jitscale.run_folder import Attempts, forget_completion, is_complete
from jitscale.tracking import check_wandb

KINDS = ("train", "upgrade", "evaluate")
SECONDS_UNTIL_SLURM_ENDS_US = 3600.0
BETWEEN_VALUES = re.compile(r",(?![^\[]*\]|[^{]*\})")  # a comma inside brackets or braces is part of a value
UNFIT_FOR_NAMES = re.compile(r"[^\w.,=+\[\]-]+")  # in the name of a run's folder, a / would begin another folder


@dataclass(frozen=True)
class Stage:
    """One job. Called, it does the work, inside a job of submitit's."""

    kind: str  # train, upgrade or evaluate
    config: Path  # the YAML file of the run at this resolution
    run_dir: Path  # of the run that is trained, made or evaluated
    overrides: tuple[str, ...] = ()  # dotted settings
    source: Path | None = None  # for upgrade the low-resolution run
    home: Path = Path()  # the checkout
    ranks: int | None = None  # processes on this machine, where there is no Slurm
    resolution: str = ""  # in a chain

    @property
    def name(self) -> str:
        """For job names and tables."""
        return f"{self.kind} {self.run_dir.name}"

    @property
    def arguments(self) -> list[str]:
        """Of the command that does the work."""
        config, run_dir = str(self.config), str(self.run_dir)
        if self.kind == "upgrade":
            return ["--checkpoint", str(self.source), "--to", config, "--output", run_dir, *self.overrides]
        if self.kind == "evaluate":
            return ["--run-dir", run_dir, *self.overrides]  # torchrun takes --run for one of its own
        return ["--config", config, *self.settings]

    @property
    def settings(self) -> list[str]:
        """The overrides, and the run's folder."""
        return [*self.overrides, f"run.dir={self.run_dir}"]

    def check(self, tasks: int) -> None:
        """Refuse what can be known to fail before anything is queued.

        Raises a UserError if the configuration is impossible, its shards are not there, or W&B has no key. Warns if
        `evaluation.features=auto` finds no network here.
        """
        trains = self.kind == "train"
        config = load_config(self.config, self.settings, world_size=tasks, needs_shards=trains)
        if trains:
            open_training_shards(config)
            if not {"JITSCALE_SETUP", "JITSCALE_RANK_PYTHON"} & os.environ.keys():  # either may set the job's key
                check_wandb(config)
            if config.evaluation.features == AUTO:
                settle_for_training(config)

    def __call__(self) -> str:
        """Do the work to its end; returns what was done. Raises a UserError if it has failed."""
        code: int = ExitCode.DONE
        if self.kind == "upgrade":
            if not complete_checkpoints(self.run_dir):  # by an earlier start of this job
                code = self._run_python(str(self.home / "tools/upgrade_resolution.py"), *self.arguments)
        elif self.ranks is None:
            job = SlurmJob.current()
            code = Supervisor(job, work_of(self.kind, self.arguments, job.tasks)).run()
            if code == ExitCode.REQUEUE:
                time.sleep(SECONDS_UNTIL_SLURM_ENDS_US)  # returning would mark the job as finished
        else:  # start the ranks until the work is complete, as long as starts bring progress
            work = work_of(self.kind, self.arguments, self.ranks)
            forget_completion(work.run_dir, work.command)
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
            while not is_complete(work.run_dir, work.command):
                Attempts.begin(work.run_dir, work.progress_mark)
                self._run_python(*launcher, "-m", f"jitscale.{self.kind}", *self.arguments)
        if code != ExitCode.DONE:
            raise UserError(f"{self.name}: ended with code {code}; see the lines above")
        return f"{self.name} is complete"

    def _run_python(self, *arguments: str) -> int:
        return call_python(*arguments, cwd=self.home)


def parse_chain(text: str, stage: Stage, overrides: dict[str, list[str]]) -> list[Stage]:
    """`train:256,upgrade:512,train:512,evaluate` as stages; a kind without a resolution takes the one before it.

    `stage` has the first resolution's config and run folder, whose names carry the resolution. `overrides` (resolution
    -> settings) hold there only. Raises a UserError at an unknown kind, an upgrade of nothing, or an absent config.
    """
    stages: list[Stage] = []
    resolution = ""
    for word in text.split(","):
        kind, _, given = word.strip().partition(":")
        if kind not in KINDS:
            raise UserError(f"--chain {text}: {kind!r} is no stage; choose one of {', '.join(KINDS)}")
        if given and not given.isdigit():
            raise UserError(f"--chain {text}: {given!r} is no resolution; write for example train:256")
        previous, resolution = resolution, given or resolution
        if not resolution:
            raise UserError(f"--chain {text}: the first stage needs a resolution, such as train:256")
        if kind == "upgrade" and previous in ("", resolution):
            raise UserError(f"--chain {text}: upgrade:{resolution} needs a stage of another resolution before it")
        config, run_dir = _at(stage.config, resolution), _at(stage.run_dir, resolution)
        if not config.exists():
            raise UserError(f"--chain {text}: {config}: no such config file, for {word}")
        source = _at(stage.run_dir, previous) if kind == "upgrade" else None
        settings = (*stage.overrides, *overrides.get(resolution, []))
        at = replace(stage, config=config, run_dir=run_dir, source=source, resolution=resolution)
        stages.append(replace(at, kind=kind, overrides=settings))
    return stages


def parse_settings(texts: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """--set options as variants of a sweep (end of the run folder -> settings), and as settings at a resolution.

    `optim.lr=1e-4,2e-4` makes two variants, and several such options one for each combination. `512/optim.lr=1e-5` is
    for 512 px of a chain only. Raises a UserError at what is not key=value, at a key or value that stands there twice,
    and at variants of one folder.
    """
    axes: list[list[str]] = []
    at: dict[str, list[str]] = {}
    keys = set()
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: has no '='; write group.key=value")
        if key in keys:
            raise UserError(f"--set {text}: {key} is set twice; give all values in one --set, with commas between")
        keys.add(key)
        resolution, slash, rest = key.partition("/")
        if slash and resolution.isdigit():
            at.setdefault(resolution, []).append(f"{rest}={values}")
            continue
        axis = [f"{key}={value}" for value in BETWEEN_VALUES.split(values)]
        if len(axis) > 1 and f"{key}=" in axis:
            raise UserError(f"--set {text}: a value is empty; write values with one comma between")
        if twice := [setting for number, setting in enumerate(axis) if setting in axis[:number]]:
            raise UserError(f"--set {text}: {twice[0]} stands there twice; one run is enough")
        axes.append(axis)
    variants: dict[str, tuple[str, ...]] = {}
    for variant in itertools.product(*axes):
        varying = (setting for setting, axis in zip(variant, axes, strict=True) if len(axis) > 1)
        suffix = "".join(f"_{UNFIT_FOR_NAMES.sub('-', setting)}" for setting in varying)
        if suffix in variants:
            both = f"{' '.join(variants[suffix])} and {' '.join(variant)}"
            raise UserError(f"--set: the run folders of {both} would have one name, ...{suffix}; submit one by one")
        variants[suffix] = variant
    return variants, at


def _at(path: Path, resolution: str) -> Path:
    """The path with another resolution in its name: jit_h_256.yaml -> jit_h_512.yaml; added where there is none."""
    stem, suffix = (path.stem, path.suffix) if path.suffix == ".yaml" else (path.name, "")
    name = re.sub(r"_\d+$", "", stem)
    return path.with_name(f"{name}_{resolution}{suffix}")
