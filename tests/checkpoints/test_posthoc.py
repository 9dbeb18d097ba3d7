"""Power-function averages after the run: their mathematics, and the inputs that tools/posthoc_ema.py refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.checkpoints.format import MARKER, Progress, whole_fragments
from jitscale.checkpoints.power_averages import Array, _inner_products, gamma_of_width, power_step, solve
from jitscale.checkpoints.saving import complete_snapshots, remove_snapshots_after, snapshot_folder, write_folder
from jitscale.config import Config
from jitscale.errors import UserError
from tools.posthoc_ema import open_snapshots, parse_widths, report

STEPS = 3000
WANTED = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_papers_exponents(width: float, gamma: float) -> None:
    """Section 3.1 and equation 123 of arXiv 2312.02696."""
    found = gamma_of_width(width)
    assert found == pytest.approx(gamma, abs=0.005)
    assert (found + 1) / ((found + 2) ** 2 * (found + 3)) == pytest.approx(width**2, rel=1e-12)


@pytest.mark.parametrize("width", [0.0, -0.1, 0.29, float("nan")])
def test_widths_outside_the_range_of_power_functions_are_refused(width: float) -> None:
    with pytest.raises(ValueError, match="is outside"):
        gamma_of_width(width)


def test_inner_products_equal_numerical_integrals() -> None:
    images, gammas = np.array([500.0, 800.0, 800.0]), np.array([2.0, 7.0, 0.5])
    grid = (np.arange(800_000) + 0.5) / 1000
    profiles = np.where(
        grid <= images[:, None],
        (gammas[:, None] + 1) / images[:, None] * (grid / images[:, None]) ** gammas[:, None],
        0,
    )
    expected = profiles @ profiles.T / 1000
    np.testing.assert_allclose(_inner_products(images, gammas, images, gammas), expected, rtol=1e-5)


def track(weights: Array, width: float, ends: Array) -> Array:
    """The average of `weights` (steps, elements) after every step."""
    gamma, average, found, before = gamma_of_width(width), np.zeros(weights.shape[1]), [], 0
    for weight, end in zip(weights, ends, strict=True):
        average = average + (weight - average) * power_step(gamma, before, int(end))
        found.append(average)
        before = int(end)
    return np.array(found)


def reconstruct(weights: Array, snapshots: int) -> tuple[dict[float, float], dict[float, float]]:
    """Relative errors of the reconstructed widths, measured and expected. The snapshots have widths 0.05 and 0.10.

    The batch grows from 8 to 16 images in the middle.
    """
    ends = np.cumsum(np.where(np.arange(STEPS) < STEPS // 2, 8, 16))
    at = np.linspace(0, STEPS - 1, snapshots + 1).astype(int)[1:]
    stored = np.concatenate([track(weights, width, ends)[at] for width in (0.05, 0.1)])
    widths = np.repeat([0.05, 0.1], snapshots)
    solution = solve(np.tile(ends[at], 2).astype(float), widths, float(ends[-1]), np.array(WANTED))
    made = solution.coefficients.T @ stored
    direct = np.array([track(weights, width, ends)[-1] for width in WANTED])
    measured = np.linalg.norm(made - direct, axis=1) / np.linalg.norm(direct, axis=1)
    return dict(zip(WANTED, measured, strict=True)), dict(zip(WANTED, solution.errors, strict=True))


def test_any_width_is_reconstructed_from_snapshots_of_two_widths() -> None:
    """The weights walk at random around an offset. There are 32 snapshots."""
    steps = np.random.default_rng(0).normal(size=(STEPS, 50))
    measured, expected = reconstruct(np.cumsum(steps, axis=0) + 20.0, snapshots=32)
    assert max(measured.values()) < 1e-2
    assert max(measured[width] for width in (0.07, 0.15, 0.2)) < 5e-4
    assert max(measured[width] for width in (0.05, 0.1)) < 1e-12, "a tracked width equals its own snapshot"
    assert all(measured[width] < expected[width] + 1e-12 for width in WANTED), (
        "weights that change slowly are easier to reconstruct"
    )


def test_the_expected_error_matches_independent_weights() -> None:
    """The expected error falls as the number of snapshots grows."""
    noise = np.random.default_rng(1).normal(size=(STEPS, 400))
    few, few_expected = reconstruct(noise, snapshots=8)
    many, many_expected = reconstruct(noise, snapshots=32)
    for width in (0.03, 0.07, 0.15, 0.2, 0.25):
        assert few[width] == pytest.approx(few_expected[width], rel=0.3)
        assert many[width] == pytest.approx(many_expected[width], rel=0.4)
        assert many_expected[width] < few_expected[width] / 4


def test_the_widths_of_a_command_line() -> None:
    assert parse_widths(["0.03", "0.05:0.25:0.05"]) == [0.03, 0.05, 0.1, 0.15, 0.2, 0.25]
    assert parse_widths(["0.1", "0.1:0.1:0.05"]) == [0.1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3", "--widths 0.3: 0.3 is no width of a power function; widths lie in (0, 0.2887)"),
        ("0", "0.0 is no width"),
        ("nan", "nan is no width"),
        ("wide", "must be a number or FROM:TO:STEP"),
        ("0.1:0.2", "must be a number or FROM:TO:STEP"),
        ("0.2:0.1:0.05", "must be a number or FROM:TO:STEP"),
        ("0.05:0.25:1e-6", "200001 widths, 200 at most"),
    ],
)
def test_impossible_widths_are_refused(text: str, expected: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_widths([text])
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


def snapshot(run_dir: Path, images: int) -> None:
    flats = [torch.full((6,), float(images))]
    sets = {"power_0.050": flats, "power_0.100": flats}
    write_folder(
        snapshot_folder(run_dir, images),
        Progress(images, images, 0, None),
        Config(),
        whole_fragments({"w": (2, 3)}),
        sets,
    )


def test_runs_without_enough_snapshots_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no snapshots .*; train with ema.power_widths=\[0.05,0.1\]"):
        open_snapshots(tmp_path, None)
    snapshot(tmp_path, 100)
    with pytest.raises(UserError, match="1 snapshot up to 100 images, but a reconstruction needs 2 or more"):
        open_snapshots(tmp_path, None)
    snapshot(tmp_path, 200)
    snapshot(tmp_path, 300)
    with pytest.raises(UserError, match=r"--at-images 240: .* has no snapshot there; the nearest is 200"):
        open_snapshots(tmp_path, 240)
    assert [s.progress.images for s in open_snapshots(tmp_path, 200)] == [100, 200]
    assert [s.progress.images for s in open_snapshots(tmp_path, None)] == [100, 200, 300]


def test_a_width_that_the_snapshots_cannot_express_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    images, widths = np.array([100.0, 200.0, 100.0, 200.0]), np.array([0.05, 0.05, 0.1, 0.1])
    report([0.05], solve(images, widths, 200.0, np.array([0.05])), "runs/r")
    assert "power_0.050" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"--widths 0.002: runs/r cannot express it \(expected error \d+%, at most 50%\)"
    ):
        report([0.002], solve(images, widths, 200.0, np.array([0.002])), "runs/r")


def test_a_rollback_removes_later_snapshots(tmp_path: Path) -> None:
    """If a run rolls back to an older checkpoint, it removes all later snapshots and all leftovers of a kill."""
    for images in (100, 200, 300):
        snapshot(tmp_path, images)
    (tmp_path / "snapshots" / "images_000000000150.partial").mkdir()
    unmarked = snapshot_folder(tmp_path, 50)
    unmarked.mkdir()
    assert list(complete_snapshots(tmp_path)) == [100, 200, 300]
    remove_snapshots_after(tmp_path, 200)
    assert list(complete_snapshots(tmp_path)) == [100, 200]
    assert sorted(f.name for f in (tmp_path / "snapshots").iterdir()) == ["images_000000000100", "images_000000000200"]
    assert (snapshot_folder(tmp_path, 200) / MARKER).exists()
