"""Finds metrics and files of a run that jitscale/recorded.py, and therefore docs/reference.md, does not list."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from jitscale.config.schema import NETWORKS
from jitscale.evaluation.sweep import TRIED
from jitscale.progressive import LOWER_STAGES
from jitscale.recorded import EVALUATION_METRICS, FILES, HELD_OUT_METRICS, STEP_METRICS, Metric
from jitscale.tracking import read_evaluations, read_held_out, read_metrics

_NETWORK = f"(?:{'|'.join(NETWORKS)})"
_DISTANCE = rf"(?:fid|sfid|kid|fd_{_NETWORK}|kd_{_NETWORK})"
_WORDS = {  # regular expressions of PLACEHOLDERS
    "K": r"\d",
    "SET": r"(?:model|ema_0\.\d+|power_0\.\d+)",
    "TIME": r"0\.\d+",
    "NETWORK": _NETWORK,
    "DISTANCE": _DISTANCE,
    "COUNT": r"\d+k?",
    "SETTING": f"(?:{'|'.join(TRIED)})",
}


def expression(name: str) -> str:
    """The regular expression of a metric's name."""
    return re.sub("[A-Z]+", lambda word: _WORDS[word[0]], name)


_PLAIN = "|".join(expression(one.name) for one in EVALUATION_METRICS if "NAME" not in one.name)
_WORDS["NAME"] = rf"(?:{_PLAIN})(?:_\d+k?)?"


def unknown(keys: Iterable[str], metrics: Sequence[Metric]) -> set[str]:
    """The keys that match none of `metrics`."""
    known = re.compile("|".join(expression(one.name) for one in metrics))
    return {key for key in keys if not known.fullmatch(key)}


def never_logged(keys: Iterable[str], metrics: Sequence[Metric]) -> set[str]:
    """The names of `metrics` that match none of the keys."""
    found = set(keys)
    return {one.name for one in metrics if not any(re.fullmatch(expression(one.name), key) for key in found)}


def files_of(run: Path) -> list[str]:
    """The paths of all files in a run's folder, relative to it."""
    return sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if not path.is_dir())


def matching(pattern: str, files: Iterable[str]) -> list[str]:
    """The files that match a glob of FILES, where ** matches any number of folders."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*"}
    known = re.compile(re.sub(r"\*\*/|\*\*?|[^*]+", lambda part: wild.get(part[0]) or re.escape(part[0]), pattern))
    return [file for file in files if known.fullmatch(file)]


def check_recorded(run: Path) -> None:
    """Fail if the run in the folder has logged a number or left a file without an entry."""
    remedy = "is in no list of jitscale/recorded.py: add it and run make docs"
    for lines, metrics in (
        (read_metrics(run), STEP_METRICS),
        (read_held_out(run), HELD_OUT_METRICS),
        (read_evaluations(run), EVALUATION_METRICS),
    ):
        assert not (keys := unknown({key for line in lines for key in line}, metrics)), f"{run}: {keys} {remedy}"
    files = files_of(run)
    known = {file for one in FILES for file in matching(one.path, files)}
    assert not (others := set(files) - known), f"{run}: {others} {remedy}"
    for stage in run.glob(LOWER_STAGES):
        check_recorded(stage)
