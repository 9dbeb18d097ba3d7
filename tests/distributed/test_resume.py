"""Each of (stages 0 to 3) x (1, 2, 3 ranks) resumes what each other one saved, as if it had never been interrupted.

What two ranks are part of is left to `make test-slow`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.programs.resume_matrix import END, SAVED_AT
from tests.distributed.programs.zero_parity import STAGES
from tests.support.processes import PROGRAMS, run_ranks

PLACES = {ranks: [f"{ranks}-{stage}" for stage in STAGES] for ranks in (1, 2, 3)}
USUAL = [*PLACES[1], *PLACES[3]]
ALL = [*USUAL, *(pytest.param(place, marks=pytest.mark.slow) for place in PLACES[2])]
OPTIMIZER_STEPS = [SAVED_AT - 1, END - 1]  # the first step is not finite


class Matrix:
    """What ranks did in one of two actions, `save` and `load`, run when it is first asked for."""

    def __init__(self, folder: Path, action: str) -> None:
        self.folder, self.action = folder, action
        self.done: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}

    def of(self, ranks: int, *sources: str) -> dict[str, Any]:
        """The results of all stages on so many ranks, loading what `sources` saved."""
        if (ranks, sources) not in self.done:
            run_ranks(ranks, str(PROGRAMS / "resume_matrix.py"), self.action, str(self.folder), *sources)
            found = json.loads((self.folder / f"{self.action}-{ranks}.json").read_text())
            self.done[ranks, sources] = found
        return self.done[ranks, sources]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def saving(folder: Path) -> Matrix:
    return Matrix(folder, "save")


@pytest.fixture(scope="module")
def loading(folder: Path) -> Matrix:
    return Matrix(folder, "load")


@pytest.mark.parametrize("place", ALL)
def test_what_is_written_is_the_state(saving: Matrix, place: str) -> None:
    run = saving.of(int(place[0]))[place]
    assert run["differing"] == []
    assert run["optimizer_steps"] == OPTIMIZER_STEPS


@pytest.mark.parametrize("place", ALL)
@pytest.mark.parametrize("source", ALL)
def test_a_resume_is_the_unbroken_run(saving: Matrix, loading: Matrix, source: str, place: str) -> None:
    """Masters, averages, both moments and step counts; bit-equal to the end in the same place."""
    unusual = "2" in (source[0], place[0])
    unbroken = {key: run for ranks in ((1, 2, 3) if unusual else (1, 3)) for key, run in saving.of(ranks).items()}
    sources = [*PLACES[1], *PLACES[2], *PLACES[3]] if unusual else USUAL
    run = loading.of(int(place[0]), *sources)[f"{source} to {place}"]
    assert run["differing"] == [], "after the load, before a step"
    assert run["optimizer_steps"] == OPTIMIZER_STEPS
    same_ranks = source[0] == place[0]
    assert run["losses"] == pytest.approx(unbroken[source]["losses"], rel=1e-6 if same_ranks else 1e-5)
    assert max(run["off_at_end"].values()) < 1e-5
    if source == place:
        assert run["losses"] == unbroken[source]["losses"]
        assert run["differing_at_end"] == []
