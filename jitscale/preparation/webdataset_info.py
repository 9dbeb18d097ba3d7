"""`_info.json`, which lies beside the tars of timm's data sets: a check of their numbers of samples."""

import json
from collections.abc import Collection
from pathlib import Path

from jitscale.errors import DataError, data_error

INFO = "_info.json"

_REMEDY = f"download the tars and {INFO} again, or move it away"


def counts_of(folder: Path, names: Collection[str], *, whole: bool) -> dict[str, int]:
    """The samples of each tar of the splits that the tars `names` belong to, as `_info.json` in `folder` says.

    Empty without that file. Raises a DataError if it is damaged, or tars of these splits are missing and `whole` ones
    are meant.
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
    """Where the tar `name` differs from what `counts_of` says, and the remedy; empty if it does not."""
    if not counts or counts.get(name) == samples:
        return ""
    if name not in counts:
        return f"is not named by {INFO}; {_REMEDY}"
    return f"holds {samples} samples, {INFO} says {counts[name]}; {_REMEDY}"
