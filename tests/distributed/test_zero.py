"""ZeRO stages 1, 2, 3 and 0 against plain torch: the same global batches, two processes, 20 steps."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.processes import PROGRAMS, run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks(2, str(PROGRAMS / "zero_parity.py"), str(path))
    return json.loads(path.read_text())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_is_plain_torch(results: dict[str, Any], stage: int) -> None:
    """With gradient accumulation and clipping; averages in shards are plain averages."""
    run, plain = results[f"{stage} fp32"], results["plain"]
    assert run["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert run["norms"] == pytest.approx(plain["norms"], rel=1e-5)
    assert max(plain["norms"]) > 1.0, "clipping must have had something to clip"
    assert run["weights_off"] < 1e-5
    assert run["ema_off"] < 1e-5
    assert run["power_off"] < 1e-5


@pytest.mark.parametrize("precision", ["autocast", "bf16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_arithmetic_stays_near_fp32(results: dict[str, Any], stage: int, precision: str) -> None:
    run = results[f"{stage} {precision}"]
    assert run["losses"] == pytest.approx(results["plain"]["losses"], rel=0.03)
    assert run["losses"] != pytest.approx(results["plain"]["losses"], rel=1e-6), "bf16 must have been used"
    assert run["tables"] == ["torch.float32", "torch.float32"], "position tables stay fp32"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_master_element_has_one_owner(results: dict[str, Any], stage: int) -> None:
    owned = results[f"{stage} fp32"]["owned"]
    assert sum(owned) == results["parameters"]
    assert max(owned) - min(owned) <= 0.01 * results["parameters"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_weight(results: dict[str, Any], stage: int) -> None:
    assert results[f"{stage} poisoned"] == {"applied": [False, True], "finite": True}
