"""Converts the text of an override, or a value of a file, for a setting, before OmegaConf checks the type."""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jitscale.config.limits import shown
from jitscale.config.schema import CHOICES, SETTINGS, Config
from jitscale.errors import first_line
from jitscale.files import with_home

_DECLARED: dict[str, Any] = {
    f"{group.name}.{name}": hint for group in fields(Config) for name, hint in get_type_hints(group.type).items()
}
_OPTIONAL = {key for key, kind in _DECLARED.items() if kind == kind | None}
_TYPES = {key: get_args(kind)[0] if key in _OPTIONAL else kind for key, kind in _DECLARED.items()}  # without None
TEXTS = {key for key, kind in _TYPES.items() if kind is str}
LISTS_OF_TEXTS = {key for key, kind in _TYPES.items() if kind == list[str]}
_NUMBERS = {key for key, kind in _TYPES.items() if {int, float} & {kind, *get_args(kind)}}
_MISREAD = re.compile(  # YAML 1.1 reads 010 as 8, and 1:30 as 90
    r"[-+]?(0[0-9_]+|0b[01_]+|0x[0-9a-f_]+|[0-9_]+:[0-9:._]+)", re.IGNORECASE
)
_INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{\s*([^{}:]*)(:?)")


_WANTED = {int: "not an integer", float: "not a number", bool: "neither true nor false", list: "not a list"}
_KINDS = {int: "integer", float: "number", bool: "true or false", str: "text"}
_MISSING = "???"  # OmegaConf's mark for a missing value


INTERPOLATION_REMEDY = r"write ${group.key}, ${oc.env:NAME,DEFAULT}, or \${ for the text itself"


class WrongValueError(ValueError):
    """A value that a setting must not have: the limit that the value breaks, and the remedy."""

    def __init__(self, limit: str, remedy: str) -> None:
        super().__init__(limit)
        self.limit, self.remedy = limit, remedy


def from_text(key: str, text: str) -> Any:
    """The value of the setting `key` for `text`, the part of an override after the `=`.

    For a text setting, `text` is taken literally. `null` becomes None if the setting allows it. Raises a
    WrongValueError.
    """
    if text == "null" and key in _OPTIONAL:
        return None
    if key in TEXTS:
        return text
    if not text:
        raise WrongValueError("is empty", usual(key))
    try:
        if key in LISTS_OF_TEXTS:
            return yaml.load(text, Loader=yaml.BaseLoader)  # all elements stay texts
        refuse_misread(key, yaml.compose(text, Loader=yaml.SafeLoader))
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[call-overload, index]
    except WrongValueError:
        raise
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise WrongValueError(f"cannot be read ({first_line(error)})", usual(key)) from error


def refuse_misread(key: str, node: yaml.Node | None) -> None:
    """Raise a WrongValueError if the YAML `node` has an unquoted number that YAML 1.1 reads differently than people."""
    for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        text = each.value if key in _NUMBERS and isinstance(each, yaml.ScalarNode) and each.style is None else ""
        if _MISREAD.fullmatch(text):
            base = 16 if "x" in text.lower() else 2 if "b" in text.lower() else 10
            remedy = usual(key) if ":" in text or len(text) > 99 else f"write {int(text.replace('_', ''), base)}"
            limit = "is not a decimal number" if each is node else f"has {text}, which is not a decimal number"
            raise WrongValueError(limit, remedy)


def checked(key: str, value: Any, *, interpolated: bool = False) -> Any:
    """`value`, converted to a form that the setting `key` may have: home folders are expanded.

    `interpolated`: an interpolation gave the value, so a number is allowed for a text. Raises a WrongValueError.
    """
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, list | dict) for each in value)):
        raise WrongValueError("has the wrong type (a structure)", usual(key))
    if isinstance(value, list) and None in value:
        raise WrongValueError("has the wrong type (an element is null)", usual(key))
    if (_TYPES[key] is bool and value not in (0, 1) and isinstance(value, int)) or (
        key not in TEXTS and isinstance(value, str) and "${" in value
    ):
        raise wrong_type(key, value)
    if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
        return "on" if value else "off"  # YAML 1.1 reads a bare off as false
    if value is None and (key in _OPTIONAL or key not in TEXTS):
        return None
    if key in LISTS_OF_TEXTS and isinstance(value, list):
        return [_text(key, each) for each in value]
    if key not in TEXTS:
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    text = _text(key, shown(value) if is_number and (interpolated or SETTINGS[key].number_too) else value)
    return expanded(text) if SETTINGS[key].path else text


def expanded(path: str) -> str:
    """`path` with its leading `~` or `~user` replaced by that user's home folder. Raises a WrongValueError."""
    try:
        return with_home(path)
    except ValueError as error:
        raise WrongValueError(str(error), f"a file of this name is ./{path}") from error


def escaped(value: Any) -> Any:
    """`value` with its texts escaped, so that OmegaConf finds no interpolation in it."""
    if isinstance(value, dict):
        return {name: escaped(each) for name, each in value.items()}
    if isinstance(value, list):
        return [escaped(each) for each in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def has_interpolation(value: Any) -> bool:
    """True if `value` is, or has as an element, a text with an interpolation."""
    return any(_INTERPOLATION.search(text) for text in _texts(value))


def refuse_unevaluated(value: Any) -> None:
    """Raise a WrongValueError if `value` has a resolver other than `oc.env`, or the mark of a missing value."""
    if _MISSING in _texts(value):
        raise WrongValueError(f"has the text {_MISSING}, which stands for a missing value", "choose another")
    found = (match for text in _texts(value) for match in _INTERPOLATION.finditer(text))
    for name, colon in (match.groups() for match in found):
        if colon and name != "oc.env":
            raise WrongValueError(f"has ${{{name}:...}}, which is not evaluated", INTERPOLATION_REMEDY)


def wrong_type(key: str, value: Any) -> WrongValueError:
    """The refusal of a `value` whose type does not fit the setting `key`."""
    kind = next(
        (kind for kind in _WANTED if kind in (_TYPES[key], get_origin(_TYPES[key]), *get_args(_TYPES[key]))), str
    )
    remedy = usual(key)
    if get_origin(_TYPES[key]) is list:
        kind = kind if isinstance(value, list) else list
        remedy = remedy if isinstance(value, list) else f"write [{shown(value)}]"
    elif kind is int and isinstance(value, float) and value.is_integer():
        remedy = f"write {int(value)}"
    return WrongValueError(f"has the wrong type ({_WANTED.get(kind, 'not text')})", remedy)


def kind_of(key: str) -> str:
    """The type of the setting `key` in words, such as "list of numbers" or "integer or null"."""
    kind = _TYPES[key]
    elements = get_args(kind)
    name = f"list of {_KINDS[elements[0]]}s" if elements else _KINDS[kind]
    return f"{name} or null" if key in _OPTIONAL else name


def usual(key: str) -> str:
    """The usual remedy: the default."""
    return f"the default is {shown(SETTINGS[key].default)}"


def _texts(value: Any) -> Iterable[str]:
    return (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str))


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        words = {bool: "true or false", list: "a structure", type(None): "null"}
        what = words.get(type(value), "a number")
        limit = f"has the wrong type (YAML reads {what} here, not text)"
        raise WrongValueError(limit, f"quote it, as in {key.rpartition('.')[2]}: '...'")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        raise WrongValueError("has control characters or bytes that are not UTF-8", "remove them")
    return value
