"""The reducer of gradients alone: parameters that are split between ranks, arrive in any order, or do not arrive."""

import json
from pathlib import Path

import pytest

from tests.support.processes import PROGRAMS, run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_gets_the_mean_of_its_part(tmp_path: Path, ranks: int) -> None:
    """Gradients are accumulated, in both stages and dtypes. The buckets hold one, a few and all parameters."""
    run_ranks(ranks, str(PROGRAMS / "reducer.py"), str(tmp_path / "result.json"))
    found = json.loads((tmp_path / "result.json").read_text())
    assert len(found) == 12
    for name, differences in found.items():
        assert differences == pytest.approx([0.0] * ranks, abs=1e-5), name
