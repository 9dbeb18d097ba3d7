"""Samples of a network for letters: before an upgrade, after it, and after fine-tuning.

The samples are stored next to this file, in five rows without labels. The runs that drew them are not stored.
"""

from pathlib import Path

from PIL import Image

from figures.canvas import DPI, LINE_HEIGHT, QUIET, canvas

STORED = Path(__file__).with_suffix(".webp")  # without loss; the first two rows are enlarged from 32 px
SAMPLE = 64  # pixels a side
ENLARGED = 2  # each pixel becomes a square of 2 x 2
ROWS = (  # a name and a detail
    ("32 px", "the old network"),
    ("32 px, averaged down", "the upgraded network"),
    ("64 px, nearest", "the upgraded network"),
    ("64 px, smooth", "the upgraded network"),
    ("64 px, fine-tuned", "32,000 images later"),
)
LEFT, APART = 1.76, 0.04  # inches: the column of labels; between rows


def draw(path: Path) -> None:
    """The stored rows with their labels."""
    with Image.open(STORED) as stored:
        strip = stored.convert("RGB")
    tall, wide = ENLARGED * SAMPLE, ENLARGED * strip.width
    row, apart = tall / DPI, round(APART * DPI) / DPI  # whole pixels
    with canvas(path, LEFT + wide / DPI, len(ROWS) * (row + apart) - apart) as drawing:
        for number, (name, detail) in enumerate(ROWS):
            top = number * (row + apart)
            samples = strip.crop((0, SAMPLE * number, strip.width, SAMPLE * (number + 1)))
            drawing.picture(LEFT, top, samples.resize((wide, tall), Image.Resampling.NEAREST))
            middle = top + row / 2
            drawing.text(0.02, middle - LINE_HEIGHT / 2, name, bold=True, align="left")
            drawing.text(0.02, middle + LINE_HEIGHT / 2, detail, colour=QUIET, align="left")
