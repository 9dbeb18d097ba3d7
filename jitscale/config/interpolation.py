"""`${group.key}` and `${oc.env:NAME}` in a user's own settings; nothing else is evaluated, and `\\${` is the text `${`.

Files that a run has stored are data: there an interpolation is refused.
"""

import os
import re
from typing import Any, NamedTuple

from jitscale.config.limits import Problem, shown
from jitscale.config.schema import SETTINGS
from jitscale.config.values import KINDS, WrongValueError, from_data, from_text

_PART = re.compile(r"\\\$\{|\$\{([^{}]*)(\}?)")
_VARIABLE = re.compile(r"oc\.env:([A-Za-z_][A-Za-z0-9_]*)(?:,(.*))?")


class Given(NamedTuple):
    """A value as a user gave it."""

    value: Any
    is_text: bool  # of an override or an environment variable, not of a file


def escaped(value: Any) -> Any:
    """`value` as a file must hold it, so that no text in it is an interpolation."""
    if isinstance(value, dict):
        return {name: escaped(each) for name, each in value.items()}
    if isinstance(value, list):
        return [escaped(each) for each in value]
    return value.replace("${", r"\${") if isinstance(value, str) else value


def has_interpolation(value: Any) -> bool:
    """Whether a text, or a text of a list, would be evaluated."""
    texts = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, str)]
    return any(part[1] is not None for text in texts for part in _PART.finditer(text))


class Interpolation:
    """The values of settings, where each may refer to others; what nobody gave has the schema's default."""

    def __init__(self, given: dict[str, Given]) -> None:
        self.problems: list[Problem] = []
        self._given = given
        self._values = {key: setting.default for key, setting in SETTINGS.items() if key not in given}
        self._refused: set[str] = set()
        self._open: set[str] = set()  # what is being looked up, which must not refer to itself

    def values(self) -> dict[str, Any]:
        """Every setting that is not refused; `problems` says what is wrong with the others."""
        for key in self._given:
            self._look_up(key)
        return self._values

    def _look_up(self, key: str) -> None:
        if key in self._values or key in self._refused:
            return
        self._open.add(key)
        try:
            self._values[key] = self._value(key, *self._given[key])
        except WrongValueError as error:
            self._refused.add(key)
            self.problems.append(Problem(key, self._given[key].value, error.limit, error.remedy))
        self._open.remove(key)

    def _value(self, key: str, value: Any, is_text: bool) -> Any:
        if isinstance(value, str):
            whole = _PART.fullmatch(value)
            if whole and whole[2]:
                value, is_text = self._found(whole[1].strip())
                if KINDS[key].element is str and isinstance(value, int | float):
                    value = shown(value)
            else:
                value = self._filled(value)
        elif isinstance(value, list):
            value = [self._filled(each) if isinstance(each, str) else each for each in value]
        return from_text(key, value) if is_text else from_data(key, value)

    def _filled(self, text: str) -> str:
        def part(match: re.Match[str]) -> str:
            if match[1] is None:
                return "${"
            if not match[2]:
                raise WrongValueError(
                    "has a ${ that no } ends, or one inside another", r"write \${ for the text itself"
                )
            return shown(self._found(match[1].strip()).value)

        return _PART.sub(part, text)

    def _found(self, name: str) -> Given:
        if name in SETTINGS:
            if name in self._open:
                raise WrongValueError(f"leads back to itself by ${{{name}}}", "give one of them a value")
            self._look_up(name)
            if name in self._refused:
                raise WrongValueError(f"needs {name}, which is refused", "correct that setting")
            return Given(self._values[name], is_text=False)
        if variable := _VARIABLE.fullmatch(name):
            found = os.environ.get(variable[1], variable[2])
            if found is None:
                remedy = f"set it, or write ${{oc.env:{variable[1]},DEFAULT}}"
                raise WrongValueError(f"needs the environment variable {variable[1]}, which is not set", remedy)
            return Given(found.strip(), is_text=True)
        limit = f"has ${{{name}}}, which is neither a setting nor an environment variable"
        raise WrongValueError(limit, r"write ${group.key}, ${oc.env:NAME}, or \${ for the text itself")
