"""Composes a configuration from YAML files and dotted overrides, checks it, and writes it as YAML.

Values come from these sources, and the last one wins: the schema's defaults, the files named under `defaults:` of the
YAML file (relative to it, in order, recursively), the YAML file itself, the dotted overrides of the command line.
This module does not import torch, so that errors are reported at once.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jitscale.addresses import masked
from jitscale.config.hints import meant_elsewhere, remedy_of_unknown
from jitscale.config.limits import Problem, shown
from jitscale.config.rules import problems_of
from jitscale.config.schema import SETTINGS, Config, DiffusionConfig, ModelConfig
from jitscale.config.values import (
    INTERPOLATION_REMEDY,
    WrongValueError,
    checked,
    escaped,
    expanded,
    from_text,
    has_interpolation,
    refuse_misread,
    refuse_unevaluated,
    wrong_type,
)
from jitscale.errors import ConfigError, first_line

LARGEST_FILE = 2**20  # bytes; a configuration is far smaller


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

    `world_size` ranks will share a batch. `bf16_supported` tells for a value of `run.device` whether it has bfloat16.
    `data.shards` must be set if the caller `needs_shards`. `stored`: the file belongs to a run or a checkpoint, perhaps
    of somebody else. Then it is data: it must name no other file, and nothing in it is evaluated. A `config.yaml` next
    to checkpoints or weights is always treated so. Raises a ConfigError that lists all problems, each with its value,
    its limit and the remedy.
    """
    given = _compose(Path(path), (), stored)
    problems, lines = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            known = f"{key}=VALUE" if key in SETTINGS else "group.key=value"
            lines.append(f"{shown(override)} has no '='; write {known}")
            continue
        try:
            given[key] = from_text(key, text) if key in SETTINGS else text
        except WrongValueError as error:
            given.pop(key, None)
            problems.append(Problem(key, text, error.limit, error.remedy))
    values, refused = _evaluated(given)
    typed, untyped = _typed(values, {key for key in values if has_interpolation(given[key])})
    problems += refused + untyped
    known_too = {"world_size": world_size, "bf16_supported": bf16_supported, "needs_shards": needs_shards}
    resolved = _leaves(cast(dict[str, Any], OmegaConf.to_container(typed, resolve=True)))
    problems += problems_of(resolved | known_too, {problem.key for problem in problems})
    _refuse(str(path), problems, lines)
    return cast(Config, OmegaConf.to_object(typed))


def check_model_config(model: ModelConfig, source: str, diffusion: DiffusionConfig | None = None) -> None:
    """Refuse a network that cannot be built, or impossible diffusion settings; `source` is their origin, for messages.

    Raises a ConfigError that names every impossible field.
    """
    values = {f"model.{name}": value for name, value in vars(model).items()}
    values |= {f"diffusion.{name}": value for name, value in vars(diffusion or DiffusionConfig()).items()}
    _refuse(source, problems_of(values))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back, without the secrets of addresses."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(to_dict(config))))


def explained_yaml(config: Config) -> str:
    """`to_yaml` with a comment above each setting: its meaning, its unit, and its limit or choices."""
    text = ""
    for group, values in to_dict(config).items():
        text += f"{group}:\n"
        for name, value in values.items():
            written = OmegaConf.to_yaml(OmegaConf.create({name: escaped(value)}))
            text += f"  # {SETTINGS[f'{group}.{name}'].described}\n{indent(written, '  ')}"
    return text


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries; secrets in addresses are masked, see `masked`."""
    groups: dict[str, dict[str, Any]] = asdict(config)
    return {
        group: {name: masked(value) if isinstance(value, str) else value for name, value in values.items()}
        for group, values in groups.items()
    }


def from_dict(values: dict[str, Any], source: str = "stored settings") -> Config:
    """The inverse of `to_dict`. Fields that did not exist when `values` was written get their defaults.

    The values are data: no text is evaluated. Raises a ConfigError if a setting is unknown or has the wrong type.
    """
    typed, problems = _typed(_leaves(values))
    _refuse(source, problems)
    return cast(Config, OmegaConf.to_object(typed))


def _refuse(source: str, problems: Sequence[Problem], lines: Sequence[str] = ()) -> None:
    """Raise one error that lists all problems, or return if there are none."""
    refused = [meant_elsewhere(problem) for problem in problems]
    lines = [*lines, *(f"{shown(key)}={shown(value)} {limit}; {remedy}" for key, value, limit, remedy in refused)]
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} settings refused", *lines]))


@cache
def _defaults() -> DictConfig:
    return OmegaConf.create(escaped(to_dict(Config())))


@cache
def _schema() -> DictConfig:  # OmegaConf takes 40 ms to create it, and a sixth of that to copy it
    return OmegaConf.structured(Config)


def _evaluated(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The values of `given`, by dotted names, with their interpolations evaluated, which also see the defaults."""
    context = deepcopy(_defaults())
    values, problems = {}, []
    for key, value in given.items():
        if key not in SETTINGS:
            values[key] = value
            continue
        try:
            refuse_unevaluated(value)
            OmegaConf.update(context, key, value, merge=False)
        except WrongValueError as error:
            problems.append(Problem(key, value, error.limit, error.remedy))
        except OmegaConfBaseException as error:
            problems.append(Problem(key, value, f"cannot be evaluated ({first_line(error)})", INTERPOLATION_REMEDY))
    refused = {problem.key for problem in problems}
    for key in [key for key in given if key in SETTINGS and key not in refused]:
        try:
            found = OmegaConf.select(context, key, throw_on_missing=True)
            values[key] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
        except (OmegaConfBaseException, RecursionError) as error:
            fault = f"cannot be evaluated ({first_line(error)})"
            problems.append(Problem(key, given[key], fault, INTERPOLATION_REMEDY))
    return values, problems


def _typed(values: Mapping[str, Any], interpolated: Collection[str] = ()) -> tuple[DictConfig, list[Problem]]:
    """The schema with `values` (by dotted names), and their problems. Nothing in them is evaluated."""
    typed, problems = deepcopy(_schema()), []
    for key, value in values.items():
        if key in SETTINGS:
            try:
                OmegaConf.update(typed, key, escaped(checked(key, value, interpolated=key in interpolated)))
            except WrongValueError as error:
                problems.append(Problem(key, value, error.limit, error.remedy))
            except (OmegaConfBaseException, OverflowError):
                refusal = wrong_type(key, value)
                problems.append(Problem(key, value, refusal.limit, refusal.remedy))
        elif key in typed:
            problems.append(Problem(key, value, "is a group of settings", f"write {key}.NAME=value"))
        else:
            problems.append(Problem(key, value, "is not a setting", remedy_of_unknown(key)))
    return typed, problems


def _compose(path: Path, parents: tuple[Path, ...], stored: bool) -> dict[str, Any]:
    """The raw values of `path` by dotted names; they replace those of the files in its `defaults:` list."""
    if path.resolve() in parents:
        raise ConfigError(f"{path}: its defaults lead back to this file; remove one of them")
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ConfigError(f"{path}: has more than {LARGEST_FILE} bytes; give a YAML file of settings")
        loaded = OmegaConf.load(path)
        written = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError as error:
        origin = f" (named in the defaults of {parents[-1]})" if parents else ""
        raise ConfigError(f"{path}: no such config file{origin}; see the folder configs/") from error
    except ConfigError:
        raise
    except (OSError, ValueError, RecursionError, AssertionError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold groups such as 'model:' and 'data:', found a list")
    _refuse(str(path), _misread(written))
    names = loaded.pop("defaults", ListConfig([]))
    own = cast(dict[str, Any], OmegaConf.to_container(loaded))
    if stored or _lies_in_a_run(path):
        _refuse_what_is_evaluated(path, names, _leaves(own))
    if not isinstance(names, ListConfig):
        what = f"{path}: defaults: {shown(names)} is not a list"
        raise ConfigError(f"{what}; write [size/b, recipe/imagenet] or the like")
    composed: dict[str, Any] = {}
    for name in names:
        try:
            file = path.parent / expanded(name if isinstance(name, str) else "")
        except WrongValueError as error:
            raise ConfigError(f"{path}: defaults: {shown(name)} {error.limit}; {error.remedy}") from error
        if not isinstance(name, str) or not file.name or file == path.parent:
            raise ConfigError(f"{path}: defaults: {shown(name)} is not the name of a file; write size/b or the like")
        composed |= _leaves(_compose(file.with_suffix(".yaml"), (*parents, path.resolve()), stored))
    return composed | _leaves(own)


def _misread(written: yaml.Node | None) -> list[Problem]:
    """Problems with numbers that YAML reads differently than people do."""
    problems = []
    for group, content in written.value if isinstance(written, yaml.MappingNode) else []:
        for name, node in content.value if isinstance(content, yaml.MappingNode) else []:
            key = f"{group.value}.{name.value}"
            try:
                refuse_misread(key, node)
            except WrongValueError as error:
                text = node.value if isinstance(node, yaml.ScalarNode) else "[...]"
                problems.append(Problem(key, text, error.limit, error.remedy))
    return problems


def _lies_in_a_run(path: Path) -> bool:
    """True if `path` is the config of a run or a checkpoint, by the files next to it."""
    folder = path.parent
    of_a_run = ((folder / name).exists() for name in ("checkpoints", "index.json"))
    return path.name == "config.yaml" and (any(of_a_run) or any(folder.glob("*.safetensors")))


def _refuse_what_is_evaluated(path: Path, names: Any, values: dict[str, Any]) -> None:
    why = "a run has written this file, so nothing in it is evaluated"
    if names:
        raise ConfigError(f"{path}: has defaults, {shown(names)}, but {why}; copy it out of the run's folder")
    for key, value in values.items():
        if has_interpolation(value):
            raise ConfigError(f"{path}: {shown(key)}={shown(value)} has an interpolation, but {why}; write the value")


def _leaves(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Settings by their dotted names; empty groups are left out."""
    leaves: dict[str, Any] = {}
    for group, content in values.items():
        if isinstance(content, dict):
            leaves |= {f"{group}.{name}": value for name, value in content.items()}
        else:
            leaves[str(group)] = content
    return leaves
