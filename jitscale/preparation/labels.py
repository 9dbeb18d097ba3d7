"""Labels as users write them (class numbers, class names or none), and the classes that follow from all of them."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from jitscale.data.tar_index import NO_LABEL, class_number
from jitscale.keyed_random import Int64Array

REFUSED = int(np.iinfo(np.int32).min)  # the code of a text that is no label; the caller reports it

_FIRST_NAME = NO_LABEL - 1
_NAMES_SHOWN = 3  # number of names at each end
_LIKE_A_NUMBER = re.compile(r"[+-]?\d+([.,]\d*)?([eE][+-]?\d+)?")


class Kind(IntEnum):
    """The kinds of labels. If two kinds have equally many labels, the first one here wins."""

    NUMBER = 0
    NAME = 1
    NONE = 2
    REFUSED = 3


_EXPECTED = {Kind.NUMBER: "a number", Kind.NAME: "a class name", Kind.NONE: "none"}


def parse_label(text: str | None) -> int | str | None:
    """The class number or class name in `text`; None if it is empty, or a number that no class can have."""
    number = class_number(text or "", {})
    if number is None and text and not _LIKE_A_NUMBER.fullmatch(text):
        return text
    return number


def label_code(label: int | str | None, names: dict[str, int]) -> int:
    """One integer for a label: a number itself, `NO_LABEL`, or -2 - k for name k of `names`, which grows."""
    if isinstance(label, str):
        return _FIRST_NAME - names.setdefault(label, len(names))
    return NO_LABEL if label is None else label


@dataclass(frozen=True)
class Classes:
    """The classes that a set of labels has."""

    kind: Kind  # the kind that all labels should have
    names: list[str] | None  # in the order of their numbers
    number: int


@dataclass(frozen=True)
class CodedLabels:
    """Many labels."""

    codes: npt.NDArray[np.int32]  # (labels,), from `label_code`, or REFUSED
    names: list[str]  # name k has the code -2 - k

    def kinds(self) -> npt.NDArray[np.int64]:
        """The `Kind` of each label."""
        conditions = [self.codes >= 0, self.codes == NO_LABEL, self.codes == REFUSED]
        return np.select(conditions, [Kind.NUMBER, Kind.NONE, Kind.REFUSED], Kind.NAME)

    def numbers(self, classes: Classes) -> Int64Array:
        """The class number of each label, `NO_LABEL` or `REFUSED`."""
        known = {name: number for number, name in enumerate(classes.names or [])}
        table = np.array([known.get(name, REFUSED) for name in self.names], np.int64)
        numbers = self.codes.astype(np.int64)
        named = self.kinds() == Kind.NAME
        numbers[named] = table[_FIRST_NAME - numbers[named]]
        return numbers

    def wrong(self, classes: Classes) -> Iterator[tuple[int, str, str]]:
        """Labels of another kind, then labels of no class: of each the row, the fault and the remedy."""
        kinds, numbers = self.kinds(), self.numbers(classes)
        for row in np.flatnonzero((kinds != classes.kind) & (kinds != Kind.REFUSED)).tolist():
            what = f"has {self._text(row)} where {_EXPECTED[classes.kind]} is expected"
            yield row, what, "make all labels of one kind"
        if classes.kind != Kind.NONE:
            unknown = (kinds == classes.kind) & ((numbers < 0) | (numbers >= classes.number))
            for row in np.flatnonzero(unknown).tolist():
                yield row, f"has {self._text(row)}, none of the {classes.number} classes", "correct it or their file"

    def _text(self, row: int) -> str:
        code = int(self.codes[row])
        if code == NO_LABEL:
            return "no label"
        return f"label {code}" if code >= 0 else f"label {self.names[_FIRST_NAME - code]!r}"


def find_classes(parts: Sequence[CodedLabels], class_names: list[str] | None) -> Classes:
    """The classes of the labels of all `parts`: labels are all numbers, or all class names, or there are none.

    Names are numbered in the order of `class_names`. If that is None, they are sorted; if all names are numbers, as
    names of folders may be, they are sorted by value (2 before 10).
    """
    counts = sum((np.bincount(part.kinds(), minlength=len(Kind)) for part in parts), np.zeros(len(Kind), np.int64))
    # If the user names the classes, there are labels: samples without one are then mistakes, however many there are.
    kind = Kind(int(np.argmax(counts[: Kind.REFUSED if class_names is None else Kind.NONE])))
    if kind == Kind.NONE:
        return Classes(kind, None, 0)
    if kind == Kind.NAME and class_names is None:
        class_names = _in_order({name for part in parts for name in part.names})
    if class_names is not None:
        return Classes(kind, class_names, len(class_names))
    return Classes(kind, None, 1 + max((int(part.codes.max(initial=NO_LABEL)) for part in parts), default=NO_LABEL))


def _in_order(names: set[str]) -> list[str]:
    numeric = all(name.isascii() and name.isdigit() for name in names)
    return sorted(names, key=lambda name: (int(name) if numeric else 0, name))


def described_names(names: list[str]) -> str:
    """The first and the last classes, each with its number."""
    numbered = [f"{number} {name}" for number, name in enumerate(names)]
    few = numbered if len(names) <= 2 * _NAMES_SHOWN else [*numbered[:_NAMES_SHOWN], "...", *numbered[-_NAMES_SHOWN:]]
    return ", ".join(few)
