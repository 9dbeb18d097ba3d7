"""The pictures of the pages: drawn by their scripts, small, true, and each shown by a page."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import draw
from figures import samples, step, upgrade_patch
from jitscale.checkpoints.upgrade import AREA_MEANS
from jitscale.errors import UserError
from tests.support import ROOT

LARGEST = 300_000  # bytes of a picture: a page has several
PICTURES = [
    path
    for folder in ("images", "experiments")
    for path in (ROOT / "docs" / folder).iterdir()
    if path.suffix != ".json"
]


def test_all_figures_are_drawn_and_small(tmp_path: Path) -> None:
    assert draw.main(["--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in draw.FIGURES}
    for path in tmp_path.iterdir():
        drawn, kept = Image.open(path), Image.open(ROOT / "docs/images" / path.name)
        assert drawn.size == kept.size, f"{path.name} is not what docs/draw.py draws; run make docs"
        assert path.stat().st_size < LARGEST
        assert len(drawn.convert("RGB").getcolors(256) or []) > 10, f"{path.name} is empty"


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


def test_the_samples_stand_in_the_order_of_their_ids(tmp_path: Path) -> None:
    for folder, size, first in (("letters", samples.LETTER, 0), ("digits", samples.DIGIT, 100)):
        (tmp_path / folder).mkdir()
        for number in range(40):
            grey = Image.new("L", (size, size), first + number)
            grey.save(tmp_path / folder / f"class_{number % 10:04d}_id_{number:08d}.png")
    command = ["samples", "--letters", str(tmp_path / "letters"), "--output", str(tmp_path)]
    with pytest.raises(UserError, match="samples: needs --digits; see"):
        draw.main(command)
    command += ["--digits", str(tmp_path / "digits")]
    assert draw.main(command) == 0
    sheet = np.asarray(Image.open(tmp_path / "samples.png").convert("L"))
    assert sheet[64::132, 64::132][:4].tolist() == np.arange(40).reshape(4, 10).tolist()
    digits = sheet[-132:][32::66, 32::66]  # each class is a square of 2 x 2
    assert (
        digits.reshape(2, 10, 2).swapaxes(1, 2).reshape(4, 10).tolist() == np.arange(100, 140).reshape(4, 10).tolist()
    )
    (tmp_path / "digits/class_0003_id_00000013.png").unlink()
    with pytest.raises(UserError, match=r"id_00000013.png: not there"):
        draw.main(command)


def test_the_grid_of_a_run_becomes_two_blocks_of_classes(tmp_path: Path) -> None:
    cell = samples.LETTER + 8
    grid = np.full((10 * cell, 8 * cell), 128, np.uint8)
    for label, number in np.ndindex(10, 8):
        grid[label * cell + 4 : (label + 1) * cell - 4, number * cell + 4 : (number + 1) * cell - 4] = (
            8 * label + number
        )
    Image.fromarray(grid).save(tmp_path / "grid.png")
    command = ["own_images", "--grid", str(tmp_path / "grid.png"), "--output", str(tmp_path)]
    assert draw.main(command) == 0
    sheet = np.asarray(Image.open(tmp_path / "own_images.png").convert("L"))
    assert set(np.unique(sheet)) - {255} == {8 * label + number for label in range(10) for number in range(4)}
    first = np.arange(5)[:, None] * 8 + np.arange(4)
    assert sheet[64::132, 64::132].tolist() == np.concatenate([first, first + 40], axis=1).tolist()
    Image.fromarray(grid[:-1]).save(tmp_path / "grid.png")
    with pytest.raises(UserError, match="not 10 rows of letters of 128 pixels"):
        draw.main(command)


def test_a_figure_that_is_not_known_is_refused() -> None:
    with pytest.raises(UserError, match="nothing: no such figure; choose of system, "):
        draw.main(["nothing"])


def test_the_step_has_the_numbers_of_its_page() -> None:
    page = (ROOT / "docs/performance.md").read_text()
    table = page.partition("Where a step of H goes")[2].partition("\n\n|")[2].partition("\n\n")[0]
    assert [int(time) for time in re.findall(r"^\|[^|]*\| (\d+) ms \|", table, re.MULTILINE)] == [
        time for time, *_ in step.KINDS.values()
    ]
    assert f"| {step.STEP}." in page


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_every_picture_is_small_and_shown_by_a_page(picture: Path) -> None:
    assert picture.stat().st_size < LARGEST
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    shown = f"{picture.parent.name}/{picture.name})"
    assert any(shown in page.read_text() for page in pages), f"no page shows {picture.name}: show it, or remove it"
