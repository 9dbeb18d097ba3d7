"""Each of (stages 0 to 3) x (1, 2, 3 ranks) resumes what each other one saved, as if it had never been interrupted.

`make test` runs 32 of the 144 resumes, on one and on three ranks: there every stage resumes what every stage saved, in
turn on as many ranks and on others. `make test-slow` runs the rest.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.programs.resume_matrix import END, SAVED_AT
from tests.distributed.programs.zero_parity import STAGES
from tests.support.processes import PROGRAMS, run_ranks
from tests.support.slow import slow_unless

PLACES = {ranks: [f"{ranks}-{stage}" for stage in STAGES] for ranks in (1, 2, 3)}
USUAL = [*PLACES[1], *PLACES[3]]
EVERY = [*USUAL, *PLACES[2]]
OPTIMIZER_STEPS = [SAVED_AT - 1, END - 1]  # The first step is not finite.


def usual(source: str, place: str) -> bool:
    """Whether `make test` runs this resume. Each place also resumes its own checkpoint."""
    (saved_by, saved_in), (ranks, stage) = source.split("-"), place.split("-")
    return "2" not in (saved_by, ranks) and (saved_by == ranks) == ((int(saved_in) + int(stage)) % 2 == 0)


class Matrix:
    """The results of one of the two actions, `save` and `load`. The action runs when a test first asks for a result."""

    def __init__(self, folder: Path, action: str) -> None:
        self.folder, self.action = folder, action
        self.done: dict[tuple[int, tuple[str, ...]], dict[str, Any]] = {}

    def of(self, ranks: int, *resumes: str) -> dict[str, Any]:
        """The results of all stages on this many ranks, or of `resumes`, each written as `SOURCE to PLACE`."""
        if (ranks, resumes) not in self.done:
            run_ranks(ranks, str(PROGRAMS / "resume_matrix.py"), self.action, str(self.folder), *resumes)
            found = json.loads((self.folder / f"{self.action}-{ranks}.json").read_text())
            self.done[ranks, resumes] = found
        return self.done[ranks, resumes]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def saving(folder: Path) -> Matrix:
    return Matrix(folder, "save")


@pytest.fixture(scope="module")
def loading(folder: Path) -> Matrix:
    return Matrix(folder, "load")


@pytest.mark.parametrize("place", [slow_unless(place in USUAL, place) for place in EVERY])
def test_the_checkpoint_equals_the_state(saving: Matrix, place: str) -> None:
    run = saving.of(int(place[0]))[place]
    assert run["differing"] == []
    assert run["optimizer_steps"] == OPTIMIZER_STEPS


@pytest.mark.parametrize(
    ("source", "place"),
    [slow_unless(usual(source, place), source, place) for source in EVERY for place in EVERY],
)
def test_a_resume_equals_the_unbroken_run(saving: Matrix, loading: Matrix, source: str, place: str) -> None:
    """Masters, averages, both moments and step counts are compared. In the same place they are bit-equal at the end."""
    ranks = int(place[0])
    others = [(one, other) for other in PLACES[ranks] for one in EVERY if usual(one, other) == usual(source, place)]
    unbroken = {key: run for world in {int(one[0]) for one, _ in others} for key, run in saving.of(world).items()}
    run = loading.of(ranks, *(f"{one} to {other}" for one, other in others))[f"{source} to {place}"]
    assert run["differing"] == [], "the state differs after the load, before a step"
    assert run["optimizer_steps"] == OPTIMIZER_STEPS
    same_ranks = source[0] == place[0]
    assert run["losses"] == pytest.approx(unbroken[source]["losses"], rel=1e-6 if same_ranks else 1e-5)
    assert max(run["off_at_end"].values()) < 1e-5
    if source == place:
        assert run["losses"] == unbroken[source]["losses"]
        assert run["differing_at_end"] == []
