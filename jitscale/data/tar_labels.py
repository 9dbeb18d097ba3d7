"""Where the samples of a tar have their labels: in members `cls`, in a field of their json, or nowhere."""

import json
from dataclasses import dataclass

from jitscale.errors import DataError

_FEW = 8  # fields that a message names


class LabelError(ValueError):
    """What is wrong with the label of a sample, with the remedy."""


@dataclass(frozen=True)
class LabelKey:
    """What holds the label of a sample."""

    extension: str = "cls"  # of the member; empty: there are no labels
    fields: tuple[str, ...] = ()  # of its JSON object, each in that of the one before

    @classmethod
    def parse(cls, text: str | None) -> "LabelKey":
        """What a user writes: cls (as None), json:FIELD, json:FIELD.FIELD, or none.

        Raises a DataError if it is something else.
        """
        if text in (None, "cls"):
            return cls()
        if text == "none":
            return cls("")
        extension, _, path = str(text).partition(":")
        if extension != "json" or not all(fields := tuple(path.split("."))):
            raise DataError(f"--label-key {text}: is neither cls, json:FIELD nor none; write for example json:label")
        return cls("json", fields)

    def __str__(self) -> str:
        return f"json:{'.'.join(self.fields)}" if self.fields else self.extension or "none"

    def label(self, name: str, text: str) -> str | None:
        """The label in the `text` of the member `name`; None for null. Raises a `LabelError` without one."""
        if not self.fields:
            return text.strip()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LabelError(f"{name} is no JSON ({error}); write the shard again") from error
        for depth, key in enumerate(self.fields):
            if not isinstance(value, dict) or key not in value:
                where = ".".join(self.fields[:depth])
                there = f"has the fields {fields_of(value)}" if isinstance(value, dict) else f"is {str(value)[:40]!r}"
                what = f"{name}{f': {where}' if where else ''} {there}, not {key!r}"
                raise LabelError(f"{what}; correct --label-key {self}, or the shard")
            value = value[key]
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            what = f"{name} holds {str(value)[:40]} as {'.'.join(self.fields)}, neither an integer nor a name"
            raise LabelError(f"{what}; correct --label-key {self}, or the shard")
        return str(value)


CLS = LabelKey()  # as webdataset has it
NOWHERE = LabelKey("")  # labels are not read


def fields_of(value: dict[str, object]) -> str:
    """The names of the fields of a JSON object, for a message."""
    names = list(value)
    return ", ".join(map(repr, names[:_FEW])) + (", ..." if len(names) > _FEW else "") or "none"
