"""Every (ranks, stage) goes on where every other (ranks, stage) has saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.processes import PROGRAMS, run_ranks

RANKS, STAGES = (1, 2, 3), (0, 1, 2, 3)
PROGRAM = str(PROGRAMS / "resume_matrix.py")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Checkpoints of all ranks and stages, and the losses of the runs that went on without a break."""
    folder = tmp_path_factory.mktemp("matrix")
    losses: dict[str, list[float]] = {}
    for ranks in RANKS:
        run_ranks(ranks, PROGRAM, str(folder), "save")
        losses |= json.loads((folder / f"save_{ranks}.json").read_text())
    return folder, losses


def check(saved: tuple[Path, dict[str, list[float]]], ranks: int, pairs: list[str]) -> None:
    folder, unbroken = saved
    run_ranks(ranks, PROGRAM, str(folder), "load", *pairs, timeout=500)
    results: dict[str, Any] = json.loads((folder / f"load_{ranks}.json").read_text())
    assert list(results) == pairs
    for pair, found in results.items():
        assert found["sets"] == ["ema_0.9", "exp_avg", "exp_avg_sq", "model"], pair
        assert found["differing"] == [], pair
        assert found["optimizer_step"] == 3, pair
        source = pair.split(">")[0]
        same_world = source.startswith(f"{ranks}-")
        assert found["losses"] == pytest.approx(unbroken[source], rel=1e-6 if same_world else 1e-5), pair


def pairs_of(ranks: int) -> list[str]:
    return [f"{source}-{stage}>{then}" for source in RANKS for stage in STAGES for then in STAGES]


@pytest.mark.parametrize("ranks", RANKS)
def test_a_third_of_the_matrix(saved: tuple[Path, dict[str, list[float]]], ranks: int) -> None:
    """Chosen so that each pair of stages and each pair of numbers of ranks is among them."""
    chosen = [pair for number, pair in enumerate(pairs_of(ranks)) if (number + number // 4 + ranks) % 3 == 0]
    check(saved, ranks, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_the_whole_matrix(saved: tuple[Path, dict[str, list[float]]], ranks: int) -> None:
    check(saved, ranks, pairs_of(ranks))


def test_the_third_covers_all_pairs() -> None:
    stages, worlds = set(), set()
    for ranks in RANKS:
        for number, pair in enumerate(pairs_of(ranks)):
            if (number + number // 4 + ranks) % 3 == 0:
                source, then = pair.split(">")
                stages.add((source.split("-")[1], then))
                worlds.add((source.split("-")[0], ranks))
    assert len(stages) == len(STAGES) ** 2
    assert len(worlds) == len(RANKS) ** 2
