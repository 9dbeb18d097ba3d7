"""Muon on several ranks: every ZeRO stage equals plain torch, and a checkpoint resumes in another stage."""

import json
from pathlib import Path

import pytest

from tests.support.processes import PROGRAMS, run_ranks


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_muon_equals_muon(tmp_path: Path, world_size: int) -> None:
    """Accumulation and clipping are on. In bf16 the result stays close."""
    run_ranks(world_size, str(PROGRAMS / "muon.py"), str(tmp_path / "results.json"), str(tmp_path / "run"))
    results = json.loads((tmp_path / "results.json").read_text())
    plain = results.pop("plain")
    assert plain[-2] < 0.95 * plain[0], "the loss must be lower when the same batch comes again"
    for name, losses in results.items():
        assert losses == pytest.approx(plain, rel=0.03 if name.startswith("bf16") else 1e-5), name
