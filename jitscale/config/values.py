"""What texts of the command line and values of YAML files mean for a setting: its type is held against them."""

import math
import re
import unicodedata
from dataclasses import fields
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from jitscale.config.limits import shown
from jitscale.config.schema import CHOICES, SETTINGS, Config
from jitscale.files import with_home

_WORDS = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(("false", "no", "off", "n", "0"), False)


class Kind(NamedTuple):
    """The type of a setting."""

    element: type  # int, float, bool or str; of a list its elements'
    is_list: bool
    optional: bool


class WrongValueError(ValueError):
    """A value that a setting cannot have: the limit that it breaks, and the remedy."""

    def __init__(self, limit: str, remedy: str) -> None:
        super().__init__(limit)
        self.limit, self.remedy = limit, remedy


def _kind(hint: Any) -> Kind:
    members = [each for each in get_args(hint) if each is not type(None)] if type(None) in get_args(hint) else [hint]
    is_list = get_origin(members[0]) is list
    return Kind(get_args(members[0])[0] if is_list else members[0], is_list, members[0] is not hint)


KINDS: dict[str, Kind] = {  # the type of every setting by its dotted name
    f"{group.name}.{name}": _kind(hint) for group in fields(Config) for name, hint in get_type_hints(group.type).items()
}


def from_text(key: str, text: str) -> Any:
    """The value that the text after the `=` of an override gives the setting `key`.

    Where text is wanted, it is literal; `null` is None where a setting may have none. Raises a WrongValueError.
    """
    kind = KINDS[key]
    if kind.optional and text == "null":
        return None
    if not text and kind.element is not str:
        raise WrongValueError("is empty", _usual(key))
    if not kind.is_list:
        return from_data(key, text)
    try:
        return from_data(key, yaml.load(text, Loader=yaml.BaseLoader))  # which leaves all elements texts
    except (yaml.YAMLError, RecursionError) as error:
        raise WrongValueError("is not a list", "write one as [first,second], within quotes of the shell") from error


def from_data(key: str, value: Any) -> Any:
    """The value of the setting `key` that YAML or JSON gives as `value`. Raises a WrongValueError."""
    kind = KINDS[key]
    if value is None and kind.optional:
        return None
    if not kind.is_list:
        return _element(key, kind.element, value)
    if not isinstance(value, list):
        example = f"write [{shown(value)}]" if isinstance(value, str | int | float) else _usual(key)
        raise WrongValueError("has the wrong type (not a list)", example)
    return [_element(key, kind.element, each) for each in value]


def expanded(path: str) -> str:
    """`path` with its leading `~` or `~user` replaced by that user's home folder. Raises a WrongValueError."""
    try:
        return with_home(path)
    except ValueError as error:
        raise WrongValueError(str(error), f"a file of this name is ./{path}") from error


def readable(text: str) -> str:
    """`text`, unless no file could have it as its name. Raises a WrongValueError."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise WrongValueError("has control characters or bytes that are not UTF-8", "remove them")
    return text


def _element(key: str, wanted: type, value: Any) -> Any:
    convert = {str: _text, bool: _truth, int: _integer, float: _number}[wanted]
    return convert(key, value)


def _text(key: str, value: Any) -> str:
    setting = SETTINGS[key]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
        value = "on" if value else "off"  # YAML 1.1 reads a bare off as false
    elif is_number and setting.number_too:
        value = str(value)
    if not isinstance(value, str):
        what = "a number" if is_number else {bool: "true or false", type(None): "null"}.get(type(value), "a structure")
        name = key.rpartition(".")[2]
        raise WrongValueError(
            f"has the wrong type (YAML reads {what} here, not text)", f"quote it, as in {name}: '...'"
        )
    return expanded(readable(value)) if setting.path else readable(value)


def _truth(key: str, value: Any) -> bool:
    found = _WORDS.get(str(value).lower()) if isinstance(value, str | int) else None
    if found is None:
        raise WrongValueError("has the wrong type (neither true nor false)", _usual(key))
    return found


def _integer(key: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9][0-9_]*", value) and len(value) < 100:
        return int(value.replace("_", ""))
    remedy = _usual(key)
    try:
        number = _number(key, value)
        remedy = f"write {int(number)}" if number.is_integer() else remedy
    except WrongValueError:
        pass
    raise WrongValueError("has the wrong type (not an integer)", remedy)


def _number(key: str, value: Any) -> float:
    if isinstance(value, str):
        value = value.lower().removeprefix(".") if value.lower() in (".inf", ".nan") else value
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf
        except ValueError:
            pass
    raise WrongValueError("has the wrong type (not a number)", _usual(key))


def _usual(key: str) -> str:
    return f"the default is {shown(SETTINGS[key].default)}"
