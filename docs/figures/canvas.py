"""What the drawings share: boxes, arrows and text on a white ground, in inches from the upper left corner."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch, PathPatch, Polygon, Rectangle
from matplotlib.path import Path as Outline
from PIL import Image

Point = tuple[float, float]

INK, QUIET, LINE = "#1b2733", "#5b6774", "#8b96a3"
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#C85A00", "#00805E", "#A05080"  # after Okabe and Ito, dark enough for text
STYLE: Any = {"font.family": "DejaVu Sans", "font.size": 9.0, "text.color": INK}
DPI = 200  # of pages that show a figure about 8 inches wide in 800 to 1600 pixels
MONO = "DejaVu Sans Mono"
ROUND, HEAD, HAIR = 0.06, 0.10, 0.006  # a corner's radius, an arrow's head, half of the gap between two bars
LINE_HEIGHT = 0.165
CAPITALS = 0.73  # their height, in sizes of the font


def tint(colour: str, share: float = 0.10) -> tuple[float, float, float]:
    """`share` of a colour on white."""
    red, green, blue = (1 - share * (1 - part) for part in to_rgb(colour))
    return red, green, blue


class Canvas:
    """A drawing of `width` x `height` inches; y grows downwards."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.pictures: list[tuple[Image.Image, tuple[int, int]]] = []  # and the pixel of the upper left corner

    def picture(self, x: float, y: float, picture: Image.Image) -> None:
        """A picture on top of everything else, pixel by pixel."""
        self.pictures.append((picture, (round(x * DPI), round(y * DPI))))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 9.0,
        colour: str = INK,
        bold: bool = False,
        mono: bool = False,
        align: Literal["left", "center", "right"] = "center",
    ) -> None:
        """One line whose capitals have their middle at the height `y`."""
        style: Any = {"family": MONO} if mono else {}
        below = CAPITALS / 2 * size / 72  # where the letters stand
        weight = "bold" if bold else "normal"
        self.axes.text(x, y + below, text, size=size, color=colour, weight=weight, ha=align, va="baseline", **style)

    def frame(
        self, x: float, y: float, width: float, height: float, colour: str = LINE, *, fill: Any = "white"
    ) -> None:
        """A rectangle with round corners."""
        style = f"round,pad=0,rounding_size={ROUND}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, style, facecolor=fill, edgecolor=colour, linewidth=1.1)
        )

    def bar(self, x: float, y: float, width: float, height: float, colour: str, share: float = 0.25) -> None:
        """A filled rectangle that leaves a hairline to its neighbours."""
        self.axes.add_patch(Rectangle((x + HAIR, y), width - 2 * HAIR, height, facecolor=tint(colour, share)))

    def box(
        self, x: float, y: float, width: float, height: float, title: str, lines: Sequence[str] = (), colour: str = BLUE
    ) -> None:
        """A title above lines of explanation, all of it centred in the box."""
        self.frame(x, y, width, height, colour, fill=tint(colour))
        middle, top = x + width / 2, y + height / 2 - LINE_HEIGHT * len(lines) / 2
        self.text(middle, top, title, size=10, bold=True, colour=colour)
        for number, line in enumerate(lines, 1):
            self.text(middle, top + 0.03 + LINE_HEIGHT * number, line, size=9)

    def arrow(self, *points: Point, colour: str = QUIET) -> None:
        """A line with round corners through `points`, horizontal and vertical, with a head at the last one."""
        (x1, y1), (x2, y2) = points[-2:]
        length = abs(x2 - x1) + abs(y2 - y1)
        along = ((x2 - x1) / length, (y2 - y1) / length)
        neck = (x2 - HEAD * along[0], y2 - HEAD * along[1])
        self.line(*points[:-1], neck, colour=colour)
        side = (0.45 * HEAD * along[1], 0.45 * HEAD * along[0])
        head = [(x2, y2), (neck[0] + side[0], neck[1] + side[1]), (neck[0] - side[0], neck[1] - side[1])]
        self.axes.add_patch(Polygon(head, closed=True, facecolor=colour, edgecolor="none"))

    def line(self, *points: Point, colour: str = QUIET, width: float = 1.3, dashed: bool = False) -> None:
        """A line through `points` whose corners are round."""
        path: list[Point] = [points[0]]
        codes = [Outline.MOVETO]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            path += [_towards(corner, before, ROUND), corner, _towards(corner, after, ROUND)]
            codes += [Outline.LINETO, Outline.CURVE3, Outline.CURVE3]
        style: Any = {"linestyle": (0, (4, 3))} if dashed else {}
        outline = Outline([*path, points[-1]], [*codes, Outline.LINETO])
        self.axes.add_patch(
            PathPatch(outline, facecolor="none", edgecolor=colour, linewidth=width, capstyle="butt", **style)
        )


def _towards(start: Point, end: Point, length: float) -> Point:
    whole = abs(end[0] - start[0]) + abs(end[1] - start[1])
    share = min(1.0, length / whole)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])


@contextmanager
def canvas(path: Path, width: float, height: float) -> Iterator[Canvas]:
    """An empty canvas, written at the end to the file `path`."""
    with mpl.rc_context(STYLE):
        drawn = plt.figure(figsize=(width, height), dpi=DPI)
        axes = drawn.add_axes((0.0, 0.0, 1.0, 1.0), xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
        drawing = Canvas(axes)
        yield drawing
        buffer = BytesIO()
        drawn.savefig(buffer, format="png", dpi=DPI, facecolor="white")
        plt.close(drawn)
    whole = Image.open(buffer).convert("RGB")
    for picture, corner in drawing.pictures:
        whole.paste(picture, corner)
    write(whole, path)


def write(picture: Image.Image, path: Path) -> None:
    """A small file: .png with 256 colours, for drawings; .webp without loss; .jpg almost without, for many samples."""
    path.parent.mkdir(parents=True, exist_ok=True)
    match path.suffix:
        case ".webp":
            picture.save(path, lossless=True, quality=100, method=6)
        case ".jpg":
            picture.save(path, quality=92, subsampling=0, optimize=True, progressive=True)  # 0: each pixel has a colour
        case _:
            few = picture.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
            few.save(path, optimize=True)
