"""The pictures of the pages: drawn by their scripts, small, true, and each shown by a page."""

import math
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from PIL import Image

import draw
from figures import step, upgrade_patch, upgrade_rows
from jitscale.checkpoints.upgrade import AREA_MEANS
from jitscale.config import load_config
from jitscale.errors import UserError
from jitscale.evaluation.generate import tile
from jitscale.planner import host
from jitscale.planner.buckets import reduce_bucket_elements
from jitscale.planner.memory import parameter_shapes
from tests.support import ROOT

LARGEST = 300_000  # bytes of a picture: a page has several
# Matplotlib brings its own fonts, so pictures have the same pixels everywhere, except for antialiasing. Releases before
# 3.11 (constraints.txt has 3.10 for Python 3.10) set text differently: with them, only the sizes are compared.
LIKE_KEPT = mpl.__version_info__ >= (3, 11)
CLEARLY = 64  # levels between 0 and 255
MOST_DIFFERENT = 2e-5  # share of the pixels: one digit is more
PICTURES = [
    path
    for folder in ("images", "experiments")
    for path in (ROOT / "docs" / folder).iterdir()
    if path.suffix != ".json"
]


def different(one: Image.Image, other: Image.Image) -> float:
    """Return the share of pixels that differ clearly."""
    first, second = (np.asarray(picture.convert("RGB")).astype(int) for picture in (one, other))
    return float((np.abs(first - second).max(axis=2) > CLEARLY).mean())


def test_all_figures_are_drawn_and_small(tmp_path: Path) -> None:
    assert draw.main(["--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {draw.file_name(name) for name in draw.FIGURES}
    for path in tmp_path.iterdir():
        drawn, kept = Image.open(path), Image.open(ROOT / "docs/images" / path.name)
        stale = f"{path.name} is not the picture that docs/draw.py draws; run make docs"
        np.testing.assert_allclose(drawn.size, kept.size, atol=0 if LIKE_KEPT else 1, err_msg=stale)
        assert not LIKE_KEPT or different(drawn, kept) <= MOST_DIFFERENT, stale
        assert path.stat().st_size < LARGEST
        assert len(drawn.convert("RGB").getcolors(drawn.width * drawn.height) or []) > 10, f"{path.name} is empty"


@pytest.mark.parametrize("kernel", AREA_MEANS)
def test_pooling_undoes_the_upgrade_of_the_letter(kernel: str) -> None:
    """The statement of the figure: D U x = x, by area means, while U x is another picture for each kernel."""
    letter = upgrade_patch.letter()
    result = upgrade_patch.upgraded(letter, kernel)
    assert result.large.shape == (64, 64, 3)
    np.testing.assert_allclose(result.back, letter, atol=1e-12)
    means = result.large.reshape(32, 2, 32, 2, 3).mean(dim=(1, 3))
    np.testing.assert_allclose(means, letter, atol=1e-12)
    repeated = letter.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert bool((result.large - repeated).abs().max() < 1e-12) == (kernel == "nearest")


def test_the_rows_of_the_upgrade_are_shown_pixel_by_pixel(tmp_path: Path) -> None:
    """Enlarged, between their labels; a sample of the upgraded network, averaged down, is the old sample."""
    upgrade_rows.draw(tmp_path / "upgrade.webp")
    shown, stored = (
        np.asarray(Image.open(path).convert("RGB")) for path in (tmp_path / "upgrade.webp", upgrade_rows.STORED)
    )
    rows = np.split(stored, 5)
    for number, row in enumerate(rows):
        enlarged = shown[136 * number : 136 * number + 128, -1024:]
        np.testing.assert_array_equal(enlarged, row.repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(rows[0], rows[1])


def _grid(path: Path, size: int, first: int) -> None:
    """Ten rows of eight grey samples with a rim, as a run draws them, numbered row by row."""
    numbers = torch.arange(first, first + 80, dtype=torch.uint8)
    Image.fromarray(tile(numbers[:, None, None, None].expand(80, 3, size, size), 8)).save(path)


def test_samples_stand_in_the_order_of_classes_and_ids(tmp_path: Path) -> None:
    _grid(tmp_path / "letters.png", 128, 0)
    _grid(tmp_path / "digits.png", 64, 100)
    shown = np.arange(80).reshape(10, 8)[:, :4]
    command = ["samples", "own_images", "--letters", str(tmp_path / "letters.png"), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="samples: needs --digits; see"):
        draw.main(command)
    command += ["--digits", str(tmp_path / "digits.png")]
    assert draw.main(command) == 0

    both = np.asarray(Image.open(tmp_path / "samples.jpg").convert("L"))
    np.testing.assert_array_equal(both[64:528:132, 64::132], shown.T)
    squares = both[-128:][32::66, 32::66].reshape(2, 10, 2)  # two rows of a class
    np.testing.assert_array_equal(squares.swapaxes(0, 1).reshape(10, 4), shown + 100)
    letters = np.asarray(Image.open(tmp_path / "own_images.jpg").convert("L"))
    np.testing.assert_array_equal(letters[64::132, 64::132], np.hstack([shown[:5], shown[5:]]))

    _grid(tmp_path / "digits.png", 32, 100)
    with pytest.raises(UserError, match=r"digits.png: not 10 rows of samples of 64 pixels"):
        draw.main(command)
    (tmp_path / "letters.png").unlink()
    with pytest.raises(UserError, match=r"letters.png: no picture"):
        draw.main(command)


def test_a_figure_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="nothing: no such figure; choose of system, "):
        draw.main(["nothing"])


def test_another_digit_is_another_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step.draw(tmp_path / "true.png")
    monkeypatch.setattr(step, "LAUNCHES", step.LAUNCHES - 1)
    step.draw(tmp_path / "stale.png")
    assert different(Image.open(tmp_path / "true.png"), Image.open(tmp_path / "stale.png")) > MOST_DIFFERENT


def test_the_step_has_the_numbers_of_its_page() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    table = page[page.index("\n| matrix products") + 1 :].partition("\n\n")[0]
    assert [int(time) for time in re.findall(r"^\|[^|]*\| (\d+) ms \|", table, re.MULTILINE)] == [
        time for time, *_ in step.KINDS.values()
    ]
    assert f"| {step.STEP}." in page
    prose = " ".join(page.split())
    assert f"and {step.LAUNCHES} in a step of H" in prose
    assert f"{step.HOST} ms with the {step.LAUNCHES} launches of one rank" in prose


def test_the_step_has_the_numbers_of_the_planner() -> None:
    config = load_config(ROOT / "configs/jit_h_256.yaml")
    between = config.model.depth * host.way_of(config.engine).seconds
    assert round(1e3 * (host.LAUNCH_SECONDS * step.LAUNCHES + between)) == step.HOST
    sizes = [math.prod(shape) for shape in parameter_shapes(config.model).values()]
    assert round(sum(sizes) / reduce_bucket_elements(sum(sizes), max(sizes), 8)) == step.BUCKETS


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_every_picture_is_small_and_shown_by_a_page(picture: Path) -> None:
    assert picture.stat().st_size < LARGEST
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = f"{picture.parent.name}/{picture.name})"
    assert any(shown in page.read_text() for page in pages), f"no page shows {picture.name}: show it, or remove it"
