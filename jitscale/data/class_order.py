"""The order of classes: a class number must mean the same class in all data of a run and in its checkpoints."""

from collections.abc import Sequence

from jitscale.errors import DataError


def refuse_other_classes(
    place: str,
    names: Sequence[str] | None,
    other_place: str,
    others: Sequence[str] | None,
    remedy: str,
    *,
    whole: bool = False,
) -> None:
    """Raise a DataError if `names` and `others` have different names for the same class number.

    If `whole`, both must also name the same number of classes. If either is None (labels without names), nothing is
    compared. The message names both places and ends with `remedy`.
    """
    for number, (name, other) in enumerate(zip(names or (), others or (), strict=False)):
        if name != other:
            raise DataError(f"{place}: class {number} is {name!r} here and {other!r} in {other_place}; {remedy}")
    if whole and names and others and len(names) != len(others):
        what = f"names {len(names)} classes, and {other_place} names {len(others)}"
        raise DataError(f"{place}: {what}; {remedy}")
