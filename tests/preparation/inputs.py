"""Helpers of the tests of what is found in an input."""

from pathlib import Path

import pytest

from jitscale.errors import DataError
from jitscale.preparation.finding import find_sources
from jitscale.preparation.forms.search import FindOptions

CONTENT = b"not looked at"


def tree(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
    return folder


def refused(message: str, *sources: Path | str, names: list[str] | None = None) -> None:
    with pytest.raises(DataError, match=message) as caught:
        find_sources([str(source) for source in sources], FindOptions(names))
    assert "\n" not in str(caught.value)
