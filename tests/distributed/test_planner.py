"""The planner's memory beside the tensors that ranks hold, in every stage and precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jitscale.planner import BUCKET_ELEMENTS, WEIGHT_BYTES, Memory, state_memory
from tests.distributed.processes import PROGRAMS, run_ranks
from tests.distributed.programs.planner_memory import DECAYS, MODEL, SETTINGS

ALONE = (2, "autocast")  # measured at 1 and 3 ranks too


def measured(path: Path, ranks: int, *setting: str) -> dict[str, Any]:
    run_ranks(ranks, str(PROGRAMS / "planner_memory.py"), str(path), *setting)
    return json.loads(path.read_text())


def predicted(stage: int, precision: str, ranks: int) -> Memory:
    return state_memory(MODEL, stage=stage, precision=precision, ranks=ranks, decays=len(DECAYS))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tmp_path_factory.mktemp("memory") / "two.json", 2)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_the_state_is_what_ranks_hold(two_ranks: dict[str, Any], stage: int, precision: str) -> None:
    """Within 2%, on each of two ranks; 10% is asked for."""
    for rank in two_ranks[f"{stage} {precision}"]:
        assert rank["state"] == pytest.approx(predicted(stage, precision, 2).state, rel=0.02)


@pytest.mark.parametrize("precision", list(WEIGHT_BYTES))
def test_the_bucket_of_stage_3_is_always_held(two_ranks: dict[str, Any], precision: str) -> None:
    for rank in two_ranks[f"3 {precision}"]:
        assert rank["buckets"] == WEIGHT_BYTES[precision] * BUCKET_ELEMENTS


def test_shards_fall_as_one_over_ranks(two_ranks: dict[str, Any], tmp_path: Path) -> None:
    stage, precision = ALONE
    key = f"{stage} {precision}"
    held = {2: two_ranks[key]}
    for ranks in (1, 3):
        held[ranks] = measured(tmp_path / f"{ranks}.json", ranks, str(stage), precision)[key]
    for ranks, found in held.items():
        expected = predicted(stage, precision, ranks)
        for rank in found:
            assert rank["state"] == pytest.approx(expected.state, rel=0.02)
            # All but the weights is sharded; gradients by whole parameters, which is coarse in so small a network.
            sharded = rank["state"] - expected.weights
            assert sharded * ranks == pytest.approx(held[1][0]["state"] - expected.weights, rel=0.05)
