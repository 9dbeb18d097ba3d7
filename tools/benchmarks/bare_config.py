"""Read a configuration without OmegaConf, for machines that lack it: the project's own files and plain values only.

Every command uses `load_config` instead, which also explains mistakes, evaluates interpolations and distrusts files.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from jitscale.config import CHOICES, SETTINGS, Config
from jitscale.config.limits import shown
from jitscale.config.rules import problems_of
from jitscale.errors import ConfigError

# In YAML 1.1, 010 is 8, 0x10 is 16, and 1:30 is 90.
_MISREAD = re.compile(r"(?<![\w.+-])[-+]?(0[0-9_]+|0[bx][0-9a-f_]+|[0-9_]+:[0-9:._]+)(?![\w.])", re.IGNORECASE)


def bare_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """`path` with its `defaults:`, then the dotted `overrides`, checked against the limits of the schema.

    Raises a ConfigError at the first setting that is unknown, of the wrong type, or impossible.
    """
    values = _composed(Path(path))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} has no '='; write group.key=value")
        values[key] = text
    groups: dict[str, Any] = {group.name: group.type() for group in fields(Config)}  # type: ignore[operator]
    for key, value in values.items():
        group, _, name = key.partition(".")
        if group not in groups or name not in vars(groups[group]):
            raise ConfigError(f"{key}={shown(value)} is not a setting")
        kind = get_type_hints(type(groups[group]))[name]
        try:
            setattr(groups[group], name, _typed(key, value, kind))
        except (ValueError, yaml.YAMLError) as error:
            limit = "cannot be read" if isinstance(error, yaml.YAMLError) else str(error)
            raise ConfigError(f"{key}={shown(value)} {limit}; the default is {shown(SETTINGS[key].default)}") from error
    resolved = {f"{group}.{name}": value for group, holder in groups.items() for name, value in vars(holder).items()}
    known = {"world_size": 1, "bf16_supported": lambda device: True, "needs_shards": False}
    for key, value, limit, remedy in problems_of(resolved | known):
        raise ConfigError(f"{path}: {key}={shown(value)} {limit}; {remedy}")
    return Config(**groups)


def _composed(path: Path) -> dict[str, Any]:
    """The values of `path`, by dotted names, over those of the files of its `defaults:` list."""
    try:
        groups = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); see the folder configs/") from error
    values: dict[str, Any] = {}
    for name in groups.pop("defaults", []):
        values |= _composed((path.parent / name).with_suffix(".yaml"))
    return values | {f"{group}.{name}": value for group, own in groups.items() for name, value in own.items()}


def _typed(key: str, value: Any, kind: Any) -> Any:
    """`value`, of a file or the text of an override, as the type `kind` of the setting `key`.

    Raises a ValueError with the limit that it breaks.
    """
    optional = isinstance(kind, UnionType)
    if optional:
        kind = next(each for each in get_args(kind) if each is not type(None))
        if value is None or value == "null":
            return None
    if isinstance(value, str) and "${" in value:
        raise ValueError("has an interpolation, which needs OmegaConf")
    if kind is str:
        return _text(key, value)
    if isinstance(value, str):
        if kind != list[str] and _MISREAD.search(value):
            raise ValueError("is no plain decimal number")
        value = yaml.load(value, yaml.BaseLoader if kind == list[str] else yaml.SafeLoader)  # the former leaves texts
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError("has the wrong type (not a list)")
        (element,) = get_args(kind)
        return [_text(key, each) if element is str else _number(each, element) for each in value]
    if kind is bool:
        if not isinstance(value, int) or value not in (0, 1):
            raise ValueError("has the wrong type (neither true nor false)")
        return bool(value)
    return _number(value, kind)


def _text(key: str, value: Any) -> str:
    if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
        return "on" if value else "off"  # YAML 1.1 reads a bare off as false
    if not isinstance(value, str):
        raise ValueError("has the wrong type (not text)")
    return value


def _number(value: Any, kind: type) -> Any:
    """An integer or, if `kind` is float, any number; YAML 1.1 reads 1e-4 as text."""
    taken = (int, float, str) if kind is float else (int,)
    try:
        if isinstance(value, bool) or not isinstance(value, taken):
            raise TypeError(value)
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        what = "a number" if kind is float else "an integer"
        raise ValueError(f"has the wrong type (not {what})") from None
