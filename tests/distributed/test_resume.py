"""Each of (stages 0 to 3) x (1, 2, 3 ranks) resumes what each other one saved, as if it had never been interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import PROGRAMS, run_ranks
from tests.distributed.programs.resume_matrix import END, SAVED_AT
from tests.distributed.programs.zero_parity import STAGES

WORLDS = (1, 2, 3)
PLACES = [f"{ranks}-{stage}" for ranks in WORLDS for stage in STAGES]
OPTIMIZER_STEPS = [SAVED_AT - 1, END - 1]  # the first step is not finite


def results(folder: Path, action: str, *sources: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ranks in WORLDS:
        run_ranks(ranks, str(PROGRAMS / "resume_matrix.py"), action, str(folder), *sources)
        found |= json.loads((folder / f"{action}-{ranks}.json").read_text())
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> dict[str, Any]:
    return results(folder, "save")


@pytest.fixture(scope="module")
def resumed(folder: Path, unbroken: dict[str, Any]) -> dict[str, Any]:
    return results(folder, "load", *PLACES)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_written_is_the_state(unbroken: dict[str, Any], place: str) -> None:
    assert unbroken[place]["differing"] == []
    assert unbroken[place]["optimizer_steps"] == OPTIMIZER_STEPS


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("source", PLACES)
def test_a_resume_is_the_unbroken_run(
    unbroken: dict[str, Any], resumed: dict[str, Any], source: str, place: str
) -> None:
    """Masters, averages, both moments and step counts; bit-equal to the end in the same place."""
    run = resumed[f"{source} to {place}"]
    assert run["differing"] == [], "after the load, before a step"
    assert run["optimizer_steps"] == OPTIMIZER_STEPS
    same_ranks = source[0] == place[0]
    assert run["losses"] == pytest.approx(unbroken[source]["losses"], rel=1e-6 if same_ranks else 1e-5)
    assert max(run["off_at_end"].values()) < 1e-5
    if source == place:
        assert run["losses"] == unbroken[source]["losses"]
        assert run["differing_at_end"] == []
