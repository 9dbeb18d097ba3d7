"""The stages of a chain of jobs: train at a resolution, upgrade to another one, train there, evaluate."""

import itertools
import logging
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
UNFIT_FOR_NAMES = re.compile(r"[^\w.,=+\[\]-]+")  # in the name of a run's folder, where a / would create a subfolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One job. A job of submitit calls the object, which does the work."""

    kind: str  # train, upgrade or evaluate
    config: Path  # the YAML file of the run at this resolution
    run_dir: Path  # of the run that is trained, created or evaluated
    overrides: tuple[str, ...] = ()  # dotted settings
    source: Path | None = None  # upgrade only: the low-resolution run
    home: Path = Path()  # the checkout
    ranks: int | None = None  # processes on this machine, without Slurm; None under Slurm
    resolution: str = ""  # of a stage of a chain

    @property
    def name(self) -> str:
        """The name of the stage, for job names and tables."""
        return f"{self.kind} {self.run_dir.name}"

    @property
    def arguments(self) -> list[str]:
        """The arguments of the command that does the work."""
        config, run_dir = str(self.config), str(self.run_dir)
        if self.kind == "upgrade":
            return ["--checkpoint", str(self.source), "--to", config, "--output", run_dir, *self.overrides]
        if self.kind == "evaluate":
            return ["--run-dir", run_dir, *self.overrides]  # torchrun has its own option --run
        return ["--config", config, *self.settings]

    @property
    def settings(self) -> list[str]:
        """The overrides, and the run's folder."""
        return [*self.overrides, f"run.dir={self.run_dir}"]

    def check(self, tasks: int) -> None:
        """Find errors before the job is queued.

        Raises a UserError if the configuration is impossible, if its shards cannot be opened, or if W&B has no key.
        Warns if `evaluation.features=auto` finds no network here.
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
        """Do all the work; returns a line about it. Raises a UserError if the work fails."""
        code: int = ExitCode.DONE
        if self.kind == "upgrade":
            if not complete_checkpoints(self.run_dir):  # an earlier start may have written it
                code = self._run_python(str(self.home / "tools/upgrade_resolution.py"), *self.arguments)
        elif self.ranks is None:
            job = SlurmJob.current()
            code = Supervisor(job, work_of(self.kind, self.arguments, job.tasks)).run()
            if code == ExitCode.REQUEUE:
                time.sleep(SECONDS_UNTIL_SLURM_ENDS_US)  # returning would mark the job as finished
        else:  # restarts the ranks until the work is complete or makes no more progress
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
    """The stages of a text such as `train:256,upgrade:512,train:512,evaluate`.

    A kind without a resolution has that of the stage before it. `stage` has the config and the run folder of the first
    resolution, whose names contain the resolution. From an upgrade on, a stage takes the config of fine-tuning
    (finetune_h_512.yaml in place of jit_h_512.yaml) if there is one. `overrides` maps a resolution to settings that
    apply there only.
    Raises a UserError if a kind is unknown, if an upgrade has no other resolution before it, or if a config is missing.
    """
    stages: list[Stage] = []
    resolution, upgraded = "", set[str]()
    for word in text.split(","):
        kind, _, given = word.strip().partition(":")
        if kind not in KINDS:
            raise UserError(f"--chain {text}: {kind!r} is not a stage; choose one of {', '.join(KINDS)}")
        if given and not given.isdigit():
            raise UserError(f"--chain {text}: {given!r} is not a resolution; write for example train:256")
        previous, resolution = resolution, given or resolution
        if not resolution:
            raise UserError(f"--chain {text}: the first stage needs a resolution, such as train:256")
        if kind == "upgrade" and previous in ("", resolution):
            raise UserError(f"--chain {text}: upgrade:{resolution} needs a stage of another resolution before it")
        upgraded.update([resolution] if kind == "upgrade" else [])
        config, run_dir = _at(stage.config, resolution), _at(stage.run_dir, resolution)
        if resolution in upgraded:
            config = _after_upgrade(config, first=kind == "upgrade")
        if not config.exists():
            raise UserError(f"--chain {text}: {config}: no such config file, for {word}")
        source = _at(stage.run_dir, previous) if kind == "upgrade" else None
        settings = (*stage.overrides, *overrides.get(resolution, []))
        at = replace(stage, config=config, run_dir=run_dir, source=source, resolution=resolution)
        stages.append(replace(at, kind=kind, overrides=settings))
    return stages


def parse_settings(texts: Sequence[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, list[str]]]:
    """The --set options as variants of a sweep (suffix of the run folder -> settings), and as settings per resolution.

    `optim.lr=1e-4,2e-4` makes two variants; several such options make one variant for each combination.
    `512/optim.lr=1e-5` applies at 512 px of a chain only. Raises a UserError if a text is not key=value, if a key or a
    value occurs twice, or if two variants would have the same folder.
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
            raise UserError(f"--set {text}: {twice[0]} occurs twice; remove one")
        axes.append(axis)
    variants: dict[str, tuple[str, ...]] = {}
    for variant in itertools.product(*axes):
        varying = (setting for setting, axis in zip(variant, axes, strict=True) if len(axis) > 1)
        suffix = "".join(f"_{UNFIT_FOR_NAMES.sub('-', setting)}" for setting in varying)
        if suffix in variants:
            both = f"{' '.join(variants[suffix])} and {' '.join(variant)}"
            raise UserError(f"--set: the run folders of {both} would both end in {suffix}; submit them one by one")
        variants[suffix] = variant
    return variants, at


def _at(path: Path, resolution: str) -> Path:
    """The path with `resolution` in its name, replaced or added: jit_h_256.yaml -> jit_h_512.yaml."""
    stem, suffix = (path.stem, path.suffix) if path.suffix == ".yaml" else (path.name, "")
    name = re.sub(r"_\d+$", "", stem)
    return path.with_name(f"{name}_{resolution}{suffix}")


def _after_upgrade(config: Path, *, first: bool) -> Path:
    """The recipe of fine-tuning, if there is one: jit_h_512.yaml -> finetune_h_512.yaml. The `first` stage may warn."""
    recipe = config.with_name(re.sub(r"^jit_", "finetune_", config.name))
    if recipe.exists():
        return recipe
    if first and config.exists():
        whole = "a whole training, unless the settings of these stages say otherwise"
        logger.warning("there is no %s, so the stages from the upgrade on take %s: %s", recipe, config, whole)
    return config
