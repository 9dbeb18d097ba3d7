"""Helpers of the tests that look for images in an input."""

from pathlib import Path
from typing import Any

import pytest

from jitscale.data.images import decode
from jitscale.errors import DataError
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.reading import SourceReader
from jitscale.preparation.sources import SourceTable
from tests.support.pictures import number_of, numbered_png

CONTENT = b"not looked at"


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
    return folder


def pictures(folder: Path, *names: str) -> Path:
    """Like `tree`, but the pixels of each image state its place among `names`."""
    tree(folder, *names)
    for number, name in enumerate(names):
        (folder / name).write_bytes(numbered_png(4, number))
    return folder


def refused(message: str, *sources: Path | str, names: list[str] | None = None, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_sources([str(source) for source in sources], FindOptions(names, **options))
    assert "\n" not in str(caught.value)


def inputs_of(source: Path | str, **options: Any) -> SourceTable:
    return find_sources([str(source)], FindOptions(**options))


def read(source: Path | str, **options: Any) -> dict[int, int]:
    """The label of each of the `pictures` of an input, by the number in its pixels."""
    inputs, reader = inputs_of(source, **options), SourceReader("/")
    found = {}
    for row in range(len(inputs)):
        data, extension = reader.read(inputs[row])
        found[number_of(decode(data, extension))] = inputs[row].label
    assert len(found) == len(inputs)
    return found
