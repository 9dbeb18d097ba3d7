"""The attributes of a setting besides its type, and the check of a value against them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import ge, gt, le, lt
from typing import Any, NamedTuple, TypeVar, cast

T = TypeVar("T")
Faults = Iterator[tuple[str, str]]  # pairs of a limit and a remedy


class Problem(NamedTuple):
    """A refused setting: its name, its value, the limit that the value breaks, and the remedy."""

    key: str
    value: Any
    limit: str
    remedy: str


@dataclass(frozen=True)
class Setting:
    """A setting without its type. Limits and choices of a list apply to its elements; None is always allowed."""

    default: Any  # used if neither a file nor an override gives a value
    meaning: str  # a phrase, for `--list-settings` and `--print-config`
    unit: str = ""  # unit of a number, if the name does not state it
    above: float | None = None  # the smallest value, itself excluded
    at_least: float | None = None  # the smallest value
    below: float | None = None  # the largest value, itself excluded
    at_most: float | None = None  # the largest value
    reason: str = ""  # reason for the limit, if the meaning does not explain it
    choices: tuple[Any, ...] = ()  # all allowed values
    path: bool = False  # a text in which a leading ~ is a home folder
    number_too: bool = False  # a text that may be a number in a YAML file
    check: Callable[[Any], Faults] = lambda value: iter(())  # yields the faults of the value as a whole

    @property
    def limit(self) -> str:
        """The choices or the limits of a number, as a phrase after "must be"; empty if there are none."""
        if self.choices:
            return f"one of {', '.join(map(str, self.choices))}"
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if high is None:
            least = "greater than" if self.at_least is None else "at least"
            return "" if low is None else f"{least} {_number(low)}"
        left, right = "(" if self.at_least is None else "[", ")" if self.at_most is None else "]"
        return f"in {left}{_number(-math.inf if low is None else low)}, {_number(high)}{right}"

    @property
    def described(self) -> str:
        """The meaning, the unit, and the limit or the choices."""
        details = ", ".join(part for part in (self.unit, self.limit) if part)
        return f"{self.meaning} ({details})" if details else self.meaning

    def problems(self, key: str, value: Any) -> Iterator[Problem]:
        """All problems of the setting `key` with this `value`, without regard to other settings."""
        if value is None:
            return
        elements = value if isinstance(value, list) else [value]
        refused = [Problem(key, each, *fault) for each in elements for fault in self._faults(each)]
        yield from refused or [Problem(key, value, *fault) for fault in self.check(value)]

    def _faults(self, value: Any) -> Faults:
        usual = f"the default is {shown(self.default)}"
        if self.default is None or self.default == []:
            usual = f"give such a value, or {shown(self.default)} for none"
        bounds = ((gt, self.above), (ge, self.at_least), (lt, self.below), (le, self.at_most))
        if isinstance(value, float) and not math.isfinite(value):
            yield "must be finite", usual
        elif value == "" and self.default != "" and not self.choices:
            yield "is empty", usual
        elif not all(bound is None or holds(value, bound) for holds, bound in bounds) or (
            self.choices and value not in self.choices
        ):
            notes = "; ".join(note for note in (self.unit, self.reason) if note)
            yield f"must be {self.limit} ({notes})" if notes else f"must be {self.limit}", usual
        elif isinstance(value, int) and value.bit_length() > 63:
            yield "has too many digits (must be below 2^63)", usual


def setting(default: T, meaning: str, **details: Any) -> T:
    """A field of the schema; `details` are the other attributes of `Setting`."""
    metadata = {"setting": Setting(default, meaning, **details)}
    if isinstance(default, list):
        return cast(T, field(default_factory=lambda: list(default), metadata=metadata))
    return field(default=default, metadata=metadata)


def shown(value: Any) -> str:
    """A value in the notation of YAML, in one line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, list | dict) for each in value)):
        return "{...}" if isinstance(value, dict) else "[[...]]"  # aliases of YAML can expand without end
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)  # Python refuses to write so many decimal digits
    text = "null" if value is None else "''" if value == "" else str(value)
    return text if all(line == text for line in text.splitlines()) else repr(text)


def distinct(values: list[Any]) -> Faults:
    """The check of a list whose values must all differ."""
    for value in sorted({value for value in values if values.count(value) > 1}):
        yield f"names {value} twice", "remove one"


def _number(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
