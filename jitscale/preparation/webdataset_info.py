"""`_info.json`, a file next to the tars of timm's data sets: it tells their numbers of samples, which are compared."""

import json
from collections.abc import Collection
from pathlib import Path

from jitscale.errors import DataError, data_error

INFO = "_info.json"

_REMEDY = f"download the tars and {INFO} again, or move it away"


def counts_of(folder: Path, names: Collection[str], *, whole: bool) -> dict[str, int]:
    """The number of samples of each tar, by `_info.json` in `folder`, for the splits of the tars `names`.

    Empty without that file. Raises a DataError if it is damaged, or if `whole` splits are meant and tars are missing.
    """
    path = folder / INFO
    if not path.is_file():
        return {}
    damage = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    counts: dict[str, int] = {}
    with data_error(f"{path}: is not as timm writes it", _REMEDY, damage):
        for split in json.loads(path.read_bytes())["splits"].values():
            of_split = dict(zip(split["filenames"], map(int, split["shard_lengths"]), strict=True))
            if of_split.keys() & set(names):
                counts |= of_split
    missing = sorted(counts.keys() - set(names)) if whole else []
    if missing:
        what = f"{len(missing)} of the {len(counts)} tars that {INFO} names are missing ({missing[0]}, ...)"
        raise DataError(f"{folder}: {what}; {_REMEDY}")
    return counts


def wrong_count(counts: dict[str, int], name: str, samples: int) -> str:
    """The difference of the tar `name` from `counts`, and the remedy; empty if there is none. See `counts_of`."""
    if not counts or counts.get(name) == samples:
        return ""
    if name not in counts:
        return f"is not named by {INFO}; {_REMEDY}"
    return f"holds {samples} samples, {INFO} says {counts[name]}; {_REMEDY}"
