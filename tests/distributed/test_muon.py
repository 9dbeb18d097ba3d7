"""Muon over ranks: every ZeRO stage is plain torch, and a checkpoint goes on in another stage."""

import json
from pathlib import Path

import pytest

from tests.support.processes import PROGRAMS, run_ranks


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_muon_in_shards_is_muon(tmp_path: Path, world_size: int) -> None:
    """With accumulation and clipping; in bf16 it stays near."""
    run_ranks(world_size, str(PROGRAMS / "muon.py"), str(tmp_path / "results.json"), str(tmp_path / "run"))
    results = json.loads((tmp_path / "results.json").read_text())
    plain = results.pop("plain")
    assert plain[-2] < 0.95 * plain[0], "the same batch again: something must have been learnt"
    for name, losses in results.items():
        assert losses == pytest.approx(plain, rel=0.03 if name.startswith("bf16") else 1e-5), name
