"""The location of the labels of a tar: members `cls`, a field of members `json`, or none."""

import json
from dataclasses import dataclass

from jitscale.errors import DataError

_FEW = 8  # fields in a message


class LabelError(ValueError):
    """The fault of a sample's label, with the remedy."""


@dataclass(frozen=True)
class LabelKey:
    """The location of a sample's label."""

    extension: str = "cls"  # extension of the member; empty if there are no labels
    fields: tuple[str, ...] = ()  # path to a nested field of its JSON object

    @classmethod
    def parse(cls, text: str | None) -> "LabelKey":
        """The location for a user's text: cls (or None), json:FIELD, json:FIELD.FIELD, or none.

        Raises a DataError for other text.
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
        """The label in the `text` of the member `name`; None for null. Raises a `LabelError` if there is none."""
        if not self.fields:
            return text.strip()
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise LabelError(f"{name} is not JSON ({error}); write the shard again") from error
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


CLS = LabelKey()  # the convention of webdataset
NOWHERE = LabelKey("")  # labels are not read


def fields_of(value: dict[str, object]) -> str:
    """The names of the fields of a JSON object, for a message."""
    names = list(value)
    return ", ".join(map(repr, names[:_FEW])) + (", ..." if len(names) > _FEW else "") or "none"
