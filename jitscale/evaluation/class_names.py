"""Classes as users specify them: by number, or by a name in the manifest of the training shards."""

import difflib
import re
from collections.abc import Sequence

from jitscale.config import Config
from jitscale.data.class_order import refuse_other_classes
from jitscale.data.find import find_shards
from jitscale.data.remote import is_remote
from jitscale.errors import DataError, UserError

MOST_SUGGESTED = 3


def class_names_of(config: Config) -> list[str] | None:
    """The class names in the manifest at `data.shards`; None if there are none, or the shards are elsewhere."""
    pattern = config.data.shards.replace("{resolution}", str(config.model.image_size))
    if not pattern or is_remote(pattern):
        return None
    try:
        _, manifests = find_shards(pattern, "data.shards")
    except DataError:  # drawing images does not need the shards
        return None
    return next((manifest.class_names for manifest in manifests.values()), None)


def check_order(config: Config, trained: Sequence[str] | None, reference: Sequence[str] | None) -> None:
    """Raise a DataError if the data of an evaluation number the classes differently from the training data.

    `trained` are the class names stored with the weights, `reference` those of the real images; None: unknown.
    """
    if config.model.num_classes == 0:
        return
    here = class_names_of(config)
    remedy = "a label must mean one thing; give the shards of the training, or pack these with its --class-names"
    refuse_other_classes("data.shards", here, "the weights", trained, remedy)
    known, place = (here, "data.shards") if trained is None else (trained, "the weights")
    setting = "evaluation.reference" if config.evaluation.reference else "data.shards"
    refuse_other_classes(setting, reference, place, known, remedy)


def class_numbers(
    texts: Sequence[str], num_classes: int, config: Config, trained: Sequence[str] | None = None
) -> list[int]:
    """The class numbers, below `num_classes`, of `texts`: numbers, or names (upper and lower case are the same).

    Names are those stored with the weights, `trained`, or else those at `data.shards`. A text of digits is always a
    number. Raises a UserError at a number that the network does not have, and at a name that is unknown or that several
    classes have.
    """
    names = None if all(map(_is_number, texts)) else trained or class_names_of(config)
    return [_number(text, num_classes) if _is_number(text) else _named(text, names, num_classes) for text in texts]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None


def _number(text: str, num_classes: int) -> int:
    if len(text) > len(str(num_classes)) + 10 or not 0 <= int(text) < num_classes:
        raise UserError(f"--classes {text}: the network has classes 0 to {num_classes - 1}")
    return int(text)


def _named(text: str, names: Sequence[str] | None, num_classes: int) -> int:
    numbers = f"give numbers from 0 to {num_classes - 1}"
    if names is None:
        raise UserError(f"--classes {text}: no manifest with class names at the run's data.shards; {numbers}")
    for wanted, known in ((text, names), (text.casefold(), [name.casefold() for name in names])):
        found = [number for number, name in enumerate(known) if name == wanted]
        if len(found) > 1:
            several = ", ".join(f"{number} ({names[number]})" for number in found)
            raise UserError(f"--classes {text}: is the name of several classes; give the number: {several}")
        if found:
            return _number(str(found[0]), num_classes)
    lowered = {name.casefold(): name for name in names}
    close = [lowered[name] for name in difflib.get_close_matches(text.casefold(), lowered, MOST_SUGGESTED)]
    close = close or [name for name in names if text.casefold() in name.casefold()][:MOST_SUGGESTED]
    remedy = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are {', '.join(names[:10])}"
    raise UserError(f"--classes {text}: no class has this name; {remedy}")
