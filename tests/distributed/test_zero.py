"""ZeRO stages 0 to 3 on one, two and three ranks against plain torch, with the same global batches.

`make test` runs the sharded stages on two ranks, two of them on one rank and one on three. `make test-slow` runs the
rest.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.programs.zero_parity import ROUNDED_STEPS, STAGES
from tests.support.processes import PROGRAMS, run_ranks
from tests.support.slow import slow_unless

STEPS, MANY_STEPS = 20, 50
# The training runs of one start, as `STAGE KIND`, by number of ranks.
USUAL = {
    1: ["1 fp32", "2 fp32"],
    2: [
        "1 fp32",
        "2 fp32",
        "3 fp32",
        "1 autocast",
        "2 bf16",
        "3 autocast",
        "3 bf16",
        "1 poisoned",
        "3 poisoned",
        "1 poisoned-bf16",
        "2 poisoned-bf16",
    ],
    3: ["3 fp32"],
}
SLOW = {
    1: ["0 fp32", "3 fp32"],
    2: ["0 fp32", "1 bf16", "2 autocast", "0 poisoned", "2 poisoned", "3 poisoned-bf16"],
    3: ["0 fp32", "1 fp32", "2 fp32"],
}

in_every_stage_on_every_world = pytest.mark.parametrize(
    ("stage", "ranks"),
    [slow_unless(f"{stage} fp32" in USUAL[ranks], stage, ranks) for ranks in USUAL for stage in STAGES],
)


class Results:
    """The results of the training runs. A start happens when a test first asks for one of its runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[int, dict[str, Any]] = {ranks: {} for ranks in USUAL}

    def of(self, ranks: int, training: str) -> dict[str, Any]:
        if training not in self.done[ranks]:
            (trainings,) = (plan[ranks] for plan in (USUAL, SLOW) if training in plan[ranks])
            path = self.folder / f"{ranks}.json"
            run_ranks(ranks, str(PROGRAMS / "zero_parity.py"), str(path), str(STEPS), *trainings)
            self.done[ranks] |= json.loads(path.read_text())
        return self.done[ranks][training]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("zero"))


@in_every_stage_on_every_world
def test_every_stage_on_every_world_equals_plain_torch(results: Results, stage: int, ranks: int) -> None:
    """Gradient accumulation and clipping are on."""
    assert_plain(results.of(ranks, f"{stage} fp32"), results.done[ranks]["plain"], STEPS)


@pytest.mark.slow
def test_every_stage_equals_plain_torch_for_many_steps(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    trainings = [f"{stage} fp32" for stage in STAGES]
    run_ranks(2, str(PROGRAMS / "zero_parity.py"), str(path), str(MANY_STEPS), *trainings)
    found = json.loads(path.read_text())
    for training in trainings:
        assert_plain(found[training], found["plain"], MANY_STEPS)


def assert_plain(run: dict[str, Any], plain: dict[str, Any], steps: int) -> None:
    assert len(run["losses"]) == steps
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-6)  # The requirement is 1e-5.
    assert run["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert min(plain["norms"]) > 1.0, "clipping must have had something to clip"
    assert run["weights_off"] < 1e-5


@in_every_stage_on_every_world
def test_averages_split_across_ranks_equal_plain_averages(results: Results, stage: int, ranks: int) -> None:
    """The reference averages the engine's own weights. Those of plain torch are rounded differently in each step."""
    run = results.of(ranks, f"{stage} fp32")
    assert run["own_ema_off"] == 0.0
    assert run["own_power_off"] < 2e-7, "the factor is computed in two ways"
    assert run["ema_off"] < 1e-5
    assert run["power_off"] < 1e-5


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        slow_unless(f"{stage} {precision}" in USUAL[2], stage, precision)
        for stage in (1, 2, 3)
        for precision in ("autocast", "bf16")
    ],
)
def test_bf16_arithmetic_stays_near_fp32(results: Results, stage: int, precision: str) -> None:
    run = results.of(2, f"{stage} {precision}")
    exact = results.done[2]["plain"]["losses"][:ROUNDED_STEPS]
    assert run["losses"] == pytest.approx(exact, rel=0.03)
    assert run["losses"] != pytest.approx(exact, rel=1e-6), "bf16 must have been used"
    assert run["own_ema_off"] == 0.0
    assert run["tables"] == ["torch.float32", "torch.float32"], "position tables stay fp32"


@in_every_stage_on_every_world
def test_each_master_element_has_one_owner(results: Results, stage: int, ranks: int) -> None:
    owned = results.of(ranks, f"{stage} fp32")["owned"]
    parameters = results.done[ranks]["parameters"]
    assert sum(owned) == parameters
    assert max(owned) - min(owned) <= 0.01 * parameters


POISONED = [f"{stage} poisoned{form}" for form in ("", "-bf16") for stage in STAGES if stage > 0 or not form]


@pytest.mark.parametrize("training", [slow_unless(training in USUAL[2], training) for training in POISONED])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight(results: Results, training: str) -> None:
    run = results.of(2, training)
    assert run["applied"] == [False, True]
    assert run["finite"]


def test_the_collectives_and_waits_of_a_step(tmp_path: Path) -> None:
    """Two ranks accumulate two micro-batches, with averages, between two log points."""
    run_ranks(2, str(PROGRAMS / "step_counts.py"), str(tmp_path / "result.json"))
    results = json.loads((tmp_path / "result.json").read_text())
    assert len(results) == 10
    for name, found in results.items():
        stage = int(name.split()[0])
        assert found["waits"] == {}, (name, "the host never waits")
        first, last = found["collectives"]
        # If a rank keeps only its share of the gradients, they must be reduced at once. Here they fit into one bucket.
        assert first == ({}, {}, {"allreduce": 1}, {"reduce_scatter_base": 1})[stage], name
        assert last.keys() >= ({"allreduce"} if stage < 3 else {"reduce_scatter_base", "allgather_base"}), name


@pytest.mark.parametrize(
    ("stage", "ways"),
    [
        (3, ("plain", "padded", "all")),
        pytest.param(3, ("plain", "compiled"), marks=pytest.mark.slow),
        pytest.param(2, ("plain", "padded", "compiled", "all"), marks=pytest.mark.slow),
    ],
    ids=["3", "3-compiled", "2"],
)
def test_execution_modes_change_no_loss(tmp_path: Path, stage: int, ways: tuple[str, ...]) -> None:
    """Two ranks. Padded, compiled and recomputed blocks give whole graphs and the same losses."""
    run_ranks(2, str(PROGRAMS / "executions.py"), str(tmp_path / "result.json"), str(stage), *ways)
    results = json.loads((tmp_path / "result.json").read_text())
    exact = results["plain"]["losses"]
    assert len(set(exact)) == len(exact) == 4
    for name, found in results.items():
        assert found["losses"] == pytest.approx(exact, rel=1e-6), name
        assert found["breaks"] == 0
        # There is one graph for each length of the sequence: a recomputed block runs the same graph again.
        assert found["graphs"] == {"plain": 0, "padded": 0, "compiled": 2, "all": 2}[name], name
