"""The output of `save_to_disk` of the library `datasets`: a folder of Arrow files, or one folder a split."""

import json
from pathlib import Path
from typing import Any

from jitscale.errors import DataError, data_error
from jitscale.preparation.forms.columns import names_of_info
from jitscale.preparation.forms.kinds import kind_of
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.rows import ROW_KINDS, images_in_rows
from jitscale.preparation.forms.search import Images, Search

_STATE, _SPLITS, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"
_OLD = "dataset.arrow"  # the only file of saves before datasets 2.8


def is_saved(listing: Listing) -> bool:
    """True if `save_to_disk` has written a folder."""
    return _SPLITS in listing.files or (_STATE in listing.files and bool(listing.paths("arrow")))


def images_in_saved(search: Search, listing: Listing) -> Images:
    """The images of such a folder, of one split."""
    folder = listing.folder
    if _SPLITS in listing.files:
        yield from _in_folder(search, folder / _split(search, folder))
        return
    state_split = _read(folder / _STATE).get("_split")
    if state_split is not None and search.option("split") not in (None, state_split):
        raise DataError(f"{folder}: is the split {state_split}, not {search.options.split}; correct --split")
    yield from _in_folder(search, folder)


def _split(search: Search, folder: Path) -> str:
    splits = _read(folder / _SPLITS).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) for split in splits):
        raise DataError(f"{folder / _SPLITS}: names no splits; save the data set again")
    chosen = search.option("split") or (splits[0] if len(splits) == 1 else None)
    if chosen is None or chosen not in splits:
        given = f", not {chosen}" if chosen else ""
        first = "train" if "train" in splits else splits[0]
        raise DataError(f"{folder}: holds the splits {', '.join(splits)}{given}; pass --split {first}")
    if len(splits) > 1:
        search.note(f"{folder}: the split {chosen} of {', '.join(splits)}")
    return chosen


def _in_folder(search: Search, folder: Path) -> Images:
    state = _read(folder / _STATE)
    if state.get("_indices_data_files"):
        what = f"{folder / _STATE}: the order of the rows lies in another file (_indices_data_files), which is not read"
        raise DataError(f"{what}; load it with the version of datasets that saved it, and save its flatten_indices()")
    entries = state.get("_data_files")
    try:
        names = [str(entry["filename"]) for entry in entries or [{"filename": _OLD}]]
    except (TypeError, KeyError) as error:
        raise DataError(f"{folder / _STATE}: names no files; save the data set again") from error
    paths = [folder / Path(name).name for name in names]
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: is missing, though {_STATE} names it; copy the whole folder")
    files = [(str(path), ROW_KINDS[kind_of(path)]) for path in paths]
    yield from images_in_rows(search, files, names_of_info(folder / _INFO))


def _read(path: Path) -> dict[str, Any]:
    with data_error(f"{path}: cannot be read", "copy the whole folder again", (OSError, ValueError)):
        found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise DataError(f"{path}: is no object of JSON; copy the whole folder again")
    return found
