"""Composing a configuration from YAML files and dotted overrides, refusing what is wrong, and writing it again.

A value is looked up in this order, the last one wins: the schema's default, the files named under `defaults:` of the
YAML file (relative to it, in order, recursively), the YAML file itself, the dotted overrides of the command line.
Importing this file does not import torch, so that a mistake is reported at once.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import Any, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jitscale.config.limits import Problem, shown
from jitscale.config.rules import problems_of
from jitscale.config.schema import CHOICES, SETTINGS, Config, DiffusionConfig, ModelConfig
from jitscale.errors import ConfigError, first_line


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    bf16_supported: Callable[[str], bool] = lambda device: True,
    needs_shards: bool = False,
) -> Config:
    """Compose `path` and the dotted `overrides` (`optim.lr=1e-4`) into a checked `Config`.

    `world_size` ranks will share a batch. `bf16_supported` says of `run.device` whether it has bfloat16. `data.shards`
    must be set if the caller `needs_shards`. Raises a ConfigError that says everything that is wrong, each with its
    value, its limit and the remedy.
    """
    unread: dict[str, str] = {}  # override -> why
    user = _compose(Path(path), ())
    for override in overrides:
        if "=" not in override:
            unread[override] = "has no '='"
            continue
        try:
            user.merge_with_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            unread[override] = f"is not key=value ({first_line(error)})"
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(user, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error

    typed = OmegaConf.structured(Config)
    problems = [problem for key, value in _leaves(values, "") for problem in _assign(typed, key, value)]
    known = dict(_leaves(cast(dict[str, Any], OmegaConf.to_container(typed)), ""))
    known |= {"world_size": world_size, "bf16_supported": bf16_supported, "needs_shards": needs_shards}
    problems += problems_of(known, {problem.key for problem in problems})
    _refuse(str(path), problems, [f"{override} {why}; write group.key=value" for override, why in unread.items()])
    return cast(Config, OmegaConf.to_object(typed))


def check_model_config(model: ModelConfig, source: str, diffusion: DiffusionConfig | None = None) -> None:
    """Refuse a network that cannot be built, or impossible settings of its diffusion; `source` describes them.

    Raises a ConfigError that names every impossible field.
    """
    values = {f"model.{name}": value for name, value in vars(model).items()}
    values |= {f"diffusion.{name}": value for name, value in vars(diffusion or DiffusionConfig()).items()}
    _refuse(source, problems_of(values))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def explained_yaml(config: Config) -> str:
    """`to_yaml` with a comment above each setting: its meaning, its unit, and its limit or choices."""
    text = ""
    for group, values in to_dict(config).items():
        text += f"{group}:\n"
        for name, value in values.items():
            written = OmegaConf.to_yaml(OmegaConf.create({name: value}))
            text += f"  # {SETTINGS[f'{group}.{name}'].described}\n{indent(written, '  ')}"
    return text


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return asdict(config)


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; fields that did not exist when `values` was written take their defaults."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values)))


def _refuse(source: str, problems: Sequence[Problem], lines: Sequence[str] = ()) -> None:
    """Raise one error with everything that is wrong, or return."""
    lines = [*lines, *(f"{key}={shown(value)} {limit}; {remedy}" for key, value, limit, remedy in problems)]
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}")
    if lines:
        raise ConfigError("\n  ".join([f"{source}: {len(lines)} settings refused", *lines]))


def _compose(path: Path, parents: tuple[Path, ...]) -> DictConfig:
    """`path` merged over the files of its `defaults:` list."""
    if path.resolve() in parents:
        raise ConfigError(f"{path}: its defaults lead back to itself; remove one of them")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        origin = f" (named in the defaults of {parents[-1]})" if parents else ""
        raise ConfigError(f"{path}: no such config file{origin}; see the folder configs/") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold groups such as 'model:' and 'data:', found a list")
    names = loaded.pop("defaults", ListConfig([]))
    if not isinstance(names, ListConfig):
        raise ConfigError(f"{path}: defaults: {names} is not a list; write [size/b, recipe/imagenet] or the like")
    files = [(path.parent / str(name)).with_suffix(".yaml") for name in names]
    return cast(DictConfig, OmegaConf.merge(*(_compose(file, (*parents, path.resolve())) for file in files), loaded))


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _assign(typed: DictConfig, key: str, value: Any) -> Iterator[Problem]:
    """Put one value into the typed configuration, or say why not."""
    if key in SETTINGS:
        if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
            value = "on" if value else "off"  # YAML 1.1 reads a bare off as false
        try:
            OmegaConf.update(typed, key, value)
        except OmegaConfBaseException as error:
            usual = f"the default is {shown(SETTINGS[key].default)}"
            yield Problem(key, value, f"has the wrong type ({first_line(error)})", usual)
    elif key in typed:
        yield Problem(key, value, "is a group of settings", f"write {key}.NAME=value")
    else:
        close = difflib.get_close_matches(key, SETTINGS, n=1)
        remedy = f"did you mean {close[0]}?" if close else "see jitscale/config/schema.py for all settings"
        yield Problem(key, value, "is not a setting", remedy)
