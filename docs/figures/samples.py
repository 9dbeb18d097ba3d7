"""Samples of small runs, pixel by pixel and none chosen: letters of 128 px, digits of 64 px."""

from pathlib import Path

from PIL import Image

from figures.canvas import write_png
from jitscale.errors import UserError

CLASSES = 10
LETTER, DIGIT = 128, 64  # pixels a side
EACH = 4  # samples of a class: a column of letters, a square of 2 x 2 digits
GAP, APART = 4, 16  # pixels between samples, and between letters and digits


def draw_runs(path: Path, letters: Path, digits: Path) -> None:
    """The first samples of each class in two folders of tools/sample.py: a column for each class, digits below.

    Raises a UserError if one is missing or has another size.
    """
    below = EACH * (LETTER + GAP) - GAP + APART
    wide = CLASSES * (LETTER + GAP) - GAP
    sheet = Image.new("RGB", (wide, below + 2 * (DIGIT + GAP) - GAP), "white")
    half = (LETTER + GAP) // 2
    for label in range(CLASSES):
        left = label * (LETTER + GAP)
        for number, sample in enumerate(_samples(letters, label, LETTER)):
            sheet.paste(sample, (left, number * (LETTER + GAP)))
        for number, sample in enumerate(_samples(digits, label, DIGIT)):
            row, column = divmod(number, 2)
            sheet.paste(sample, (left + column * half, below + row * half))
    write_png(sheet, path, many_colours=True)


def draw_grid(path: Path, grid: Path) -> None:
    """The first samples of each class in a grid that a run drew while it trained: A and F share a row, B and G, ...

    Raises a UserError if the file is not such a grid of letters.
    """
    rim = LETTER // 32
    cell, rows = LETTER + 2 * rim, CLASSES // 2
    try:
        whole = Image.open(grid).convert("RGB")
    except OSError as error:
        raise UserError(f"{grid}: no picture; name the newest file of RUN/samples") from error
    if whole.height != CLASSES * cell or whole.width < EACH * cell:
        raise UserError(f"{grid}: not {CLASSES} rows of letters of {LETTER} pixels; name the grid of such a run")
    sheet = Image.new("RGB", (2 * EACH * (LETTER + GAP) - GAP, rows * (LETTER + GAP) - GAP), "white")
    for label in range(CLASSES):
        block, row = divmod(label, rows)
        for number in range(EACH):
            left, top = cell * number + rim, cell * label + rim
            place = ((EACH * block + number) * (LETTER + GAP), row * (LETTER + GAP))
            sheet.paste(whole.crop((left, top, left + LETTER, top + LETTER)), place)
    write_png(sheet, path, many_colours=True)


def _samples(folder: Path, label: int, size: int) -> list[Image.Image]:
    paths = [folder / f"class_{label:04d}_id_{label + CLASSES * number:08d}.png" for number in range(EACH)]
    try:
        pictures = [Image.open(path).convert("RGB") for path in paths]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: not there; draw it with tools/sample.py --per-class {EACH}") from error
    if wrong := [path for path, picture in zip(paths, pictures, strict=True) if picture.size != (size, size)]:
        raise UserError(f"{wrong[0]}: not {size} x {size} pixels; name another run's samples")
    return pictures
