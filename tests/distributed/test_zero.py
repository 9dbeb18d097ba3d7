"""ZeRO stages 0 to 3 on one, two and three ranks against plain torch, on the same global batches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.processes import PROGRAMS, run_ranks


@pytest.fixture(scope="module", params=[1, 2, 3])
def fp32(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """50 steps in fp32, with gradient accumulation and clipping."""
    path = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks(request.param, str(PROGRAMS / "zero_parity.py"), str(path))
    return {**json.loads(path.read_text()), "ranks": request.param}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks in other precisions, and with gradients that are not finite."""
    path = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks(2, str(PROGRAMS / "zero_parity.py"), str(path), "bf16")
    return json.loads(path.read_text())


def test_every_stage_is_plain_torch(fp32: dict[str, Any]) -> None:
    plain = fp32["plain"]
    assert len(plain["losses"]) == 50
    assert max(plain["norms"]) > 1.0, "clipping must have had something to clip"
    for stage in range(4):
        run = fp32[f"{stage} fp32"]
        assert run["losses"] == pytest.approx(plain["losses"], rel=1e-5), stage
        assert run["norms"] == pytest.approx(plain["norms"], rel=1e-3), stage
        assert run["weights_off"] < 1e-3, stage


def test_averages_in_shards_are_plain_averages(fp32: dict[str, Any]) -> None:
    """Of the weights that the same engine had."""
    for stage in range(4):
        assert fp32[f"{stage} fp32"]["ema_off"] < 1e-6, stage
        assert fp32[f"{stage} fp32"]["power_off"] < 1e-6, stage


def test_each_master_element_has_one_owner(fp32: dict[str, Any]) -> None:
    for stage in range(4):
        owned = fp32[f"{stage} fp32"]["owned"]
        assert len(owned) == fp32["ranks"]
        assert sum(owned) == fp32["parameters"]
        assert max(owned) - min(owned) <= 0.01 * fp32["parameters"]


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_arithmetic_stays_near_fp32(others: dict[str, Any], stage: int, precision: str) -> None:
    run = others[f"{stage} {precision}"]
    assert run["losses"] == pytest.approx(others["plain"]["losses"], rel=0.03)
    assert run["losses"] != pytest.approx(others["plain"]["losses"], rel=1e-6), "bf16 must have been used"
    assert run["tables"] == ["torch.float32", "torch.float32"], "position tables stay fp32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight(others: dict[str, Any], stage: int) -> None:
    assert others[f"{stage} poisoned"] == {"applied": [False, True], "finite": True}
