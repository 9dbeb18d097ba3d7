"""A configuration without OmegaConf, for machines that lack it: the project's own files, and plain values.

`load_config` is what every command uses; it also explains mistakes, evaluates interpolations and distrusts files.
"""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from jitscale.config import Config
from jitscale.config.limits import shown
from jitscale.config.rules import problems_of
from jitscale.errors import ConfigError


def bare_config(path: str | Path, overrides: Sequence[str]) -> Config:
    """`path` with its `defaults:` and the dotted `overrides` over it, checked by the limits of the schema.

    Raises a ConfigError at the first setting that is unknown or impossible.
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
        setattr(groups[group], name, _typed(key, value, get_type_hints(type(groups[group]))[name]))
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
    """`value`, of a file or the text of an override, as the type `kind` of the setting `key`."""
    optional = isinstance(kind, UnionType)
    if value is None or (optional and value == "null"):
        return None
    if optional:
        kind = next(each for each in get_args(kind) if each is not type(None))
    if kind is str:
        return "off" if value is False else str(value)  # YAML 1.1 reads a bare off as false
    try:
        value = yaml.safe_load(value) if isinstance(value, str) else value
        if get_origin(kind) is list:
            (element,) = get_args(kind)
            return [element(each) for each in value]
        return kind(value) if kind is float or isinstance(value, kind) else kind(str(value))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{key}={shown(value)} has the wrong type; it must be {kind}") from error
