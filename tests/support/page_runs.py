"""Checks the runs that a command names: that they exist, that their networks fit each other, and their averages."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from jitscale.checkpoints.upgrade import plan_upgrade
from jitscale.config import Config, load_config
from jitscale.config.schema import weight_set_names
from jitscale.errors import UserError
from jitscale.evaluation.sweep import sweep_points
from tests.support import ROOT
from tests.support.page_context import Context, Run, WrongCommandError

# Weights that no shipped configuration and no command of the page writes, and why a page may name them.
FOREIGN = {"checkpoint-last.pth": "a file of the authors' code"}
ON_THE_HUB = "hf://"
# The letter of the network's size in the name of a configuration or of a run: jit_h_256, h_512.
SIZE = re.compile(r"(?:jit_|finetune_|progressive_)?([bglh])_")


@cache
def shipped_runs() -> dict[str, Run]:
    """The folders of the runs of configs/, from the root of the checkout."""
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    return {load_config(path).run.dir: Run(path.relative_to(ROOT)) for path in paths}


def run_of(path: Path | str, context: Context) -> Run | None:
    """The run that `path` is, or is in; None if its network is unknown. Raises a WrongCommandError if there is none."""
    text = str(path)
    if text in FOREIGN or text.startswith(ON_THE_HUB):
        return None
    for folder in map(str, (Path(text), *Path(text).parents)):
        for runs in (context.runs, shipped_runs()):
            if folder in runs:
                return runs[folder]
    raise WrongCommandError(f"{text}: no earlier command of the page and no file of configs/ writes this run")


def check_runs_of_python(code: str, context: Context) -> None:
    """Check the runs that Python code names. Raises a WrongCommandError."""
    for path in re.findall(r'"(runs/[^"]+)"', code):
        run_of(path, context)


def check_sizes(*paths: object) -> None:
    """Compare the sizes of the network that names of configurations and of runs say. Raises a WrongCommandError."""
    said = {}
    for path in paths:
        for part in Path(str(path)).parts:
            if found := SIZE.match(part):
                said[found[1]] = path
    if len(said) > 1:
        described = ", ".join(f"{path} a network of size {letter.upper()}" for letter, path in said.items())
        raise WrongCommandError(f"the sizes differ: {described}")


def check_weights(config: Config, names: Iterable[str | None]) -> None:
    """Check weight sets, and the sweep of `config`, by the averages of the run. Raises a WrongCommandError."""
    known = weight_set_names(config)
    for name in names:
        if name is not None and name not in known:
            raise WrongCommandError(f"no weight set {name}; the run has {', '.join(known)}")
    try:
        sweep_points(config, known)
    except UserError as error:
        raise WrongCommandError(str(error)) from error


def check_upgrade(run: Run | None, target: Config | None, kernel: str, mode: str | None) -> None:
    """Plan the upgrade of a run. Raises a WrongCommandError if the networks do not fit."""
    if run is None or target is None:
        return
    try:
        plan_upgrade(run.configured(), target, kernel, mode)
    except UserError as error:
        raise WrongCommandError(str(error)) from error
