"""Composing a configuration from YAML files and dotted overrides, refusing what is wrong, and writing it again.

A value is looked up in this order, the last one wins: the schema's default, the files named under `defaults:` of the
YAML file (relative to it, in order, recursively), the YAML file itself, the dotted overrides of the command line.
Importing this file does not import torch, so that a mistake is reported at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from textwrap import indent
from typing import Any

from jitscale.config.hints import meant_elsewhere, remedy_of_unknown
from jitscale.config.interpolation import Given, Interpolation, escaped, has_interpolation
from jitscale.config.limits import Problem, shown
from jitscale.config.rules import problems_of
from jitscale.config.schema import SETTINGS, Config, ModelConfig
from jitscale.config.values import WrongValueError, expanded, from_data, readable
from jitscale.config.yaml_text import from_yaml, yaml_of
from jitscale.errors import ConfigError

GROUPS: dict[str, Any] = {group.name: group.type for group in fields(Config)}


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    bf16_supported: Callable[[str], bool] = lambda device: True,
    needs_shards: bool = False,
    stored: bool = False,
) -> Config:
    """Compose `path` and the dotted `overrides` (`optim.lr=1e-4`) into a checked `Config`.

    `world_size` ranks will share a batch. `bf16_supported` says of `run.device` whether it has bfloat16. `data.shards`
    must be set if the caller `needs_shards`. `stored`: the file may come from elsewhere with a run or a checkpoint, and
    is data: it names no other file and nothing in it is evaluated. A `config.yaml` that lies next to checkpoints or
    weights always is. Raises a ConfigError that says everything that is wrong, each with its value, its limit and the
    remedy.
    """
    given = {key: Given(value, is_text=False) for key, value in _compose(Path(path), (), stored).items()}
    lines = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals:
            given[key] = Given(text, is_text=True)
        else:
            known = f"{key}=VALUE" if key in SETTINGS else "group.key=value"
            lines.append(f"{shown(override)} has no '='; write {known}")
    interpolation = Interpolation({key: value for key, value in given.items() if key in SETTINGS})
    values = interpolation.values()
    problems = [_unknown(key, given[key].value) for key in given if key not in SETTINGS] + interpolation.problems
    known_too = {"world_size": world_size, "bf16_supported": bf16_supported, "needs_shards": needs_shards}
    problems += problems_of(values | known_too, {problem.key for problem in problems})
    _refuse(str(path), problems, lines)
    return _config(values)


def check_model_config(model: ModelConfig, source: str) -> None:
    """Refuse a network that cannot be built; `source` names where it was described.

    Raises a ConfigError that names every impossible field.
    """
    _refuse(source, problems_of({f"model.{name}": value for name, value in vars(model).items()}))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back, as a stored file or a user's own."""
    return yaml_of(escaped(to_dict(config)))


def explained_yaml(config: Config) -> str:
    """`to_yaml` with a comment above each setting: its meaning, its unit, and its limit or choices."""
    text = ""
    for group, values in to_dict(config).items():
        text += f"{group}:\n"
        for name, value in values.items():
            written = yaml_of({name: escaped(value)})
            text += f"  # {SETTINGS[f'{group}.{name}'].described}\n{indent(written, '  ')}"
    return text


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; fields that did not exist when `values` was written take their defaults.

    The values are data: no text is evaluated. Raises a ConfigError if one is unknown, or has the wrong type.
    """
    taken, problems = {key: setting.default for key, setting in SETTINGS.items()}, []
    for key, value in _leaves(values).items():
        try:
            if key in SETTINGS:
                taken[key] = from_data(key, value)
            else:
                problems.append(_unknown(key, value))
        except WrongValueError as error:
            problems.append(Problem(key, value, error.limit, error.remedy))
    _refuse("stored settings", problems)
    return _config(taken)


def _refuse(source: str, problems: Sequence[Problem], lines: Sequence[str] = ()) -> None:
    """Raise one error with everything that is wrong, or return."""
    refused = [meant_elsewhere(problem) for problem in problems]
    lines = [*lines, *(f"{shown(key)}={shown(value)} {limit}; {remedy}" for key, value, limit, remedy in refused)]
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} settings refused", *lines]))


def _compose(path: Path, parents: tuple[Path, ...], stored: bool) -> dict[str, Any]:
    """The values of `path`, by dotted names, over those of the files of its `defaults:` list."""
    if path.resolve() in parents:
        raise ConfigError(f"{path}: its defaults lead back to itself; remove one of them")
    try:
        loaded = from_yaml(path)
    except FileNotFoundError as error:
        origin = f" (named in the defaults of {parents[-1]})" if parents else ""
        raise ConfigError(f"{path}: no such config file{origin}; see the folder configs/") from error
    names = loaded.pop("defaults", [])
    own = _leaves(loaded)
    if stored or _lies_in_a_run(path):
        _refuse_what_is_evaluated(path, names, own)
    if not isinstance(names, list):
        raise ConfigError(
            f"{path}: defaults: {shown(names)} is not a list; write [size/b, recipe/imagenet] or the like"
        )
    values: dict[str, Any] = {}
    for name in names:
        try:
            file = expanded(readable(name)) if isinstance(name, str) else ""
        except WrongValueError as error:
            raise ConfigError(f"{path}: defaults: {shown(name)} {error.limit}; {error.remedy}") from error
        if not Path(file).name:
            raise ConfigError(f"{path}: defaults: {shown(name)} is no name of a file; write size/b or the like")
        values |= _compose((path.parent / file).with_suffix(".yaml"), (*parents, path.resolve()), stored)
    return values | own


def _lies_in_a_run(path: Path) -> bool:
    """Whether `path` is the settings of a run or a checkpoint, as the files next to it show."""
    folder = path.parent
    beside = ((folder / name).exists() for name in ("checkpoints", "index.json"))
    return path.name == "config.yaml" and (any(beside) or any(folder.glob("*.safetensors")))


def _refuse_what_is_evaluated(path: Path, names: Any, values: dict[str, Any]) -> None:
    why = "a run has stored this file, so it is data, and only a file of your own may have that"
    if names:
        raise ConfigError(f"{path}: has defaults, {shown(names)}; {why}: copy it from the run's folder")
    for key, value in values.items():
        if has_interpolation(value):
            raise ConfigError(f"{path}: {shown(key)}={shown(value)} has an interpolation; {why}: write the value")


def _leaves(values: dict[Any, Any]) -> dict[str, Any]:
    """Settings by their dotted names."""
    leaves: dict[str, Any] = {}
    for group, content in values.items():
        inner = content.items() if isinstance(content, dict) else ()
        leaves |= {f"{group}.{name}": value for name, value in inner} or (
            {} if content == {} else {str(group): content}
        )
    return leaves


def _config(values: dict[str, Any]) -> Config:
    """The configuration of all settings by their dotted names."""
    groups: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for key, value in values.items():
        group, _, name = key.partition(".")
        groups[group][name] = list(value) if isinstance(value, list) else value
    return Config(**{group: GROUPS[group](**settings) for group, settings in groups.items()})


def _unknown(key: str, value: Any) -> Problem:
    if key in GROUPS:
        return Problem(key, value, "is a group of settings", f"write {key}.NAME=value")
    return Problem(key, value, "is not a setting", remedy_of_unknown(key))
