"""Samples of small runs, at their own size and none chosen: letters of 128 px, digits of 64 px.

They come from the grids that a run draws of itself: a row for each class, the ids of a row in order. A .jpg file
(quality 92, colours not subsampled) takes about a third of the bytes of a file without loss. Its pixels differ from
the samples by 1 of 255 levels on average, and by 20 at most.
"""

from pathlib import Path

from PIL import Image

from figures.canvas import write
from jitscale.errors import UserError

CLASSES = 10
LETTER, DIGIT = 128, 64  # pixels a side
EACH = 4  # samples of a class that are shown: the first ones
GAP, APART = 4, 16  # pixels between samples, and between letters and digits
WITH_GAP = LETTER + GAP


def draw_both(path: Path, letters: Path, digits: Path) -> None:
    """A column for each class: four letters, and below them a square of four digits.

    Raises a UserError if a file is not such a grid.
    """
    below, half = EACH * WITH_GAP - GAP + APART, WITH_GAP // 2
    sheet = Image.new("RGB", (CLASSES * WITH_GAP - GAP, below + WITH_GAP - GAP), "white")
    for label, row in enumerate(_rows(letters, LETTER)):
        for number, sample in enumerate(row):
            sheet.paste(sample, (label * WITH_GAP, number * WITH_GAP))
    for label, row in enumerate(_rows(digits, DIGIT)):
        for number, sample in enumerate(row):
            down, across = divmod(number, 2)
            sheet.paste(sample, (label * WITH_GAP + across * half, below + down * half))
    write(sheet, path)


def draw_letters(path: Path, letters: Path) -> None:
    """Four letters of each class: A and F share a row, B and G the next one.

    Raises a UserError if the file is not such a grid.
    """
    height = CLASSES // 2
    sheet = Image.new("RGB", (2 * EACH * WITH_GAP - GAP, height * WITH_GAP - GAP), "white")
    for label, row in enumerate(_rows(letters, LETTER)):
        across, down = divmod(label, height)
        for number, sample in enumerate(row):
            sheet.paste(sample, ((across * EACH + number) * WITH_GAP, down * WITH_GAP))
    write(sheet, path)


def _rows(grid: Path, size: int) -> list[list[Image.Image]]:
    """The first samples of each class in a grid that `jitscale.evaluation.generate.tile` made."""
    rim = size // 32
    cell = size + 2 * rim
    try:
        whole = Image.open(grid).convert("RGB")
    except OSError as error:
        raise UserError(f"{grid}: no picture; name a file of RUN/samples or RUN/best_samples") from error
    if whole.height != CLASSES * cell or whole.width < EACH * cell:
        raise UserError(f"{grid}: not {CLASSES} rows of samples of {size} pixels; name the grid of another run")
    corners = [[(cell * number + rim, cell * label + rim) for number in range(EACH)] for label in range(CLASSES)]
    return [[whole.crop((left, top, left + size, top + size)) for left, top in row] for row in corners]
