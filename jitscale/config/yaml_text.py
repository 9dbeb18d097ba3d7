"""YAML files as plain values, and back."""

from pathlib import Path
from typing import Any

import yaml

from jitscale.errors import ConfigError, first_line

_LARGEST = 2**20  # bytes; no configuration comes near it
_DATES = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without dates, which stay texts. A key that stands twice is refused."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML declares it as an attribute of instances
        first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATES]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode) and name.value != "<<"]
        for name in written:
            if written.count(name) > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"found the key {name} twice", problem_mark=node.start_mark
                )
        return super().construct_mapping(node, deep)


def from_yaml(path: Path) -> dict[Any, Any]:
    """The groups in a YAML file. Raises a FileNotFoundError, or a ConfigError if it is not YAML or has no groups."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        loaded = yaml.load(content, Loader=_Loader) if len(content) <= _LARGEST else content
    except FileNotFoundError:
        raise
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else first_line(error)
        raise ConfigError(f"{path}: cannot be read as YAML: {reason}") from error
    if isinstance(loaded, bytes):
        raise ConfigError(f"{path}: has more than {_LARGEST} bytes; give a YAML file of settings")
    if loaded is not None and not isinstance(loaded, dict):
        found = "a list" if isinstance(loaded, list) else "no groups"
        raise ConfigError(f"{path}: must hold groups such as 'model:' and 'data:', found {found}")
    return loaded or {}


def yaml_of(values: dict[str, Any]) -> str:
    """Plain values as YAML text."""
    return yaml.safe_dump(values, default_flow_style=False, allow_unicode=True, sort_keys=False)
