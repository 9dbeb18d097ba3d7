"""The order of classes: a class number must mean one thing, in all data that a run uses and in its checkpoints."""

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
    """Raise a DataError if a number that both `names` and `others` give to a class is that of different classes.

    If `whole`, one must not name more classes than the other. Nothing is compared where either is None: labels without
    names. `remedy` ends the message, which names the places.
    """
    for number, (name, other) in enumerate(zip(names or (), others or (), strict=False)):
        if name != other:
            raise DataError(f"{place}: its class {number} is {name!r}, that of {other_place} is {other!r}; {remedy}")
    if whole and names and others and len(names) != len(others):
        what = f"it names {len(names)} classes, and {other_place} names {len(others)}"
        raise DataError(f"{place}: {what}; {remedy}")
