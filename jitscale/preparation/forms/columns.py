"""Finds the columns of images and of labels in a file of rows, and the names of the classes."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from jitscale.data.images import EXTENSIONS, ImageError, content_extension
from jitscale.errors import DataError, data_error, first_line
from jitscale.preparation.forms.search import Search, extension_of
from jitscale.preparation.row_files import Column, RowFile

Names = dict[str, list[str]]  # class names, by column

_LABELS = ("label", "labels", "cls", "fine_label")  # columns that are labels by their name
_INDEX = re.compile(r"__index_level_\d+__")  # pandas' numbers of rows
_FEW = 12  # columns in a message


@dataclass(frozen=True)
class Columns:
    """The columns of a data set that are used."""

    image: str
    label: str | None  # None: there are no labels, or they are not wanted
    names: list[str] | None  # class names, by the numbers in `label`


def columns_of(search: Search, file: RowFile, described: Names) -> Columns:
    """The columns of `file`. `described` are class names from elsewhere; those in the file win.

    Raises a DataError if the columns are not clear.
    """
    image = image_column(file, search.option("image_column"))
    names = {**described, **_class_names(file.features())}
    label = _label_column(search, file, names, image)
    return Columns(image, label, None if label is None else names.get(label))


def image_column(file: RowFile, chosen: str | None) -> str:
    """The column of images; `chosen` decides if there are several. Raises a DataError if it is not clear."""
    found = _image_columns(file)
    if chosen in found:
        return chosen
    if len(found) == 1 and chosen is None:
        return found[0]
    if not found:
        what = f"no column holds images: {_listed(file)}"
        remedy = "give files with the bytes of JPEG, PNG or WebP images in a column, or a .csv with their paths"
        raise DataError(f"{file.path}: {what}; {remedy}")
    what = f"images are in the columns {', '.join(found)}" + (f", not in {chosen}" if chosen else "")
    raise DataError(f"{file.path}: {what}; pass --image-column {found[0]}")


def _image_columns(file: RowFile) -> list[str]:
    """The columns that the file notes as images; if there are none, those whose first bytes are an image."""
    features = file.features()
    binary = [name for name, kind in file.columns().items() if kind in (Column.STRUCT, Column.BINARY)]
    noted = [name for name in binary if _type(features.get(name)) == "Image"]
    return noted or [name for name in binary if name not in features and _begins_with_image(file, name)]


def _begins_with_image(file: RowFile, column: str) -> bool:
    """True if the first entry of the column is an image, by its bytes or, without bytes, by its path."""
    path_of = file.path_of(column)
    for batch in islice(file.batches([file.bytes_of(column), *([path_of] if path_of else [])], rows=1), 1):
        data, path = batch.images(column)[0].as_py(), batch.paths(column)[0]
        try:
            return extension_of(path or "") in EXTENSIONS if data is None else bool(content_extension(data))
        except ImageError:
            return False
    return False


def _label_column(search: Search, file: RowFile, names: Names, image: str) -> str | None:
    if search.without_labels():
        return None
    columns = [n for n, kind in file.columns().items() if kind == Column.VALUES and not _INDEX.fullmatch(n)]
    chosen = search.option("label_column")
    if chosen is not None:
        if chosen not in columns:
            what = f"no column {chosen!r} of numbers or names: {_listed(file)}"
            raise DataError(f"{file.path}: {what}; correct --label-column")
        return chosen
    others = [name for name in _LABELS if file.columns().get(name) == Column.OTHER]
    if others and not any(name in names for name in columns):
        what = f"the column {others[0]} holds neither numbers nor names, such as lists or true and false"
        remedy = "write one class per row as an integer or a text, or pass --label-column or --labels none"
        raise DataError(f"{file.path}: {what}; {remedy}")
    noted = [name for name in columns if name in names]
    if len(noted) > 1:
        what = f"classes are in the columns {', '.join(noted)}"
        raise DataError(f"{file.path}: {what}; pass --label-column {noted[0]}")
    found = noted or [name for name in _LABELS if name in columns]
    if not found and columns:
        what = f"the file does not say which column holds labels: {', '.join(columns[:_FEW])}"
        raise DataError(f"{file.path}: {what}; pass --label-column with one of these, or --labels none for no labels")
    return found[0] if found else None


def _listed(file: RowFile) -> str:
    columns = list(file.columns())
    return ", ".join(columns[:_FEW]) + (f" and {len(columns) - _FEW} more" if len(columns) > _FEW else "")


# Names of classes


def _type(feature: object) -> object:
    return feature.get("_type") if isinstance(feature, dict) else None


def _class_names(features: Mapping[str, Any]) -> Names:
    """The class names that `datasets` notes for columns."""
    classes = {name: feature for name, feature in features.items() if _type(feature) == "ClassLabel"}
    return {name: list(map(str, feature["names"])) for name, feature in classes.items() if feature.get("names")}


def names_of_info(path: Path) -> Names:
    """The class names in `dataset_info.json`, which `datasets` writes next to its Arrow files; empty without it."""
    if not path.exists():
        return {}
    with data_error(f"{path}: cannot be read", "copy it again, or remove it", (OSError, ValueError)):
        info = json.loads(path.read_bytes())
    features = info.get("features") if isinstance(info, dict) else None
    return _class_names(features) if isinstance(features, dict) else {}


def names_of_card(text: str, place: str, configuration: str) -> Names:
    """The class names in the README.md `place` of a data set on the Hugging Face hub.

    If there are several configurations, the one called `configuration` counts, else the default one. Raises a DataError
    if the head of the file is no YAML.
    """
    found = re.match(r"---\s*\n(.*?\n)---", text, re.DOTALL)
    if found is None:
        return {}
    try:
        head = yaml.safe_load(found[1])
    except yaml.YAMLError as error:
        raise DataError(f"{place}: its head is no YAML ({first_line(error)}); correct it, or remove it") from error
    infos = head.get("dataset_info") if isinstance(head, dict) else None
    infos = [info for info in (infos if isinstance(infos, list) else [infos]) if isinstance(info, dict)]
    wanted = [info for name in (configuration, "default") for info in infos if info.get("config_name") == name]
    info = next(iter(wanted), infos[0] if len(infos) == 1 else {})
    return dict(filter(None, map(_names_of_feature, info.get("features") or ())))


def _names_of_feature(feature: Any) -> tuple[str, list[str]] | None:
    """Column and class names of a feature in a README.md; None if it has no class names."""
    try:
        names = {int(number): str(name) for number, name in feature["dtype"]["class_label"]["names"].items()}
        column = str(feature["name"])
    except (KeyError, TypeError, AttributeError, ValueError):  # another kind of feature
        return None
    return (column, [names[number] for number in range(len(names))]) if sorted(names) == [*range(len(names))] else None
