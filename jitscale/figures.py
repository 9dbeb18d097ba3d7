"""One look for all figures: colours that colour-blind readers tell apart (Okabe and Ito 2008), and error bars."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from PIL import Image

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
STYLE: Any = {
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.formatter.min_exponent": 5,  # on logarithmic axes too: 100, not a power of ten
    "font.size": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.hashsalt": "jitscale",  # equal data give equal files
    "svg.fonttype": "path",
}
# A page shows a figure in about 800 pixels. The PNG has about twice as many, for sharp screens. If a figure is 8.4
# inches wide, text of 8 points is 10 pixels high on the page. In a much wider figure, nobody can read it.
DPI, MOST_PIXELS_WIDE = 200, 2000
PNG_COLOURS = 256
UNCONNECTED: Any = {"linestyle": "none", "linewidth": 1.5, "markersize": 6}  # for points without a line


@contextmanager
def figure(
    target: Path | StringIO, panels: int | str, width: float = 4.2, height: float = 3.4, rows: int = 1
) -> Iterator[Sequence[Axes]]:
    """Panels in `rows` rows, saved at the end of the block to a .svg or .png file, or as SVG into a buffer.

    `panels` is the number in each row, or the places of all panels, such as "AB;CC": two, and a wide one below them.
    """
    with mpl.rc_context(STYLE):
        places: list[Any] = (
            [list(row) for row in panels.split(";")]
            if isinstance(panels, str)
            else [[row * panels + number for number in range(panels)] for row in range(rows)]
        )
        size = (width * len(places[0]), height * len(places))
        drawn = plt.figure(figsize=size, layout="constrained")
        axes: dict[Any, Axes] = drawn.subplot_mosaic(places)
        yield list(axes.values())
        if isinstance(target, Path):
            target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(target, StringIO) or target.suffix == ".svg":
            drawn.savefig(target, format="svg", metadata={"Date": None})
        else:
            pixels = BytesIO()
            drawn.savefig(pixels, format="png", dpi=min(DPI, MOST_PIXELS_WIDE / size[0]))
            with_palette(Image.open(pixels).convert("RGB"), PNG_COLOURS).save(target, format="png", optimize=True)
        plt.close(drawn)


def with_palette(picture: Image.Image, colours: int) -> Image.Image:
    """An RGB `picture` in so few colours of its own, for a small file; pixels that are alike stay alike."""
    return picture.quantize(colours, dither=Image.Dither.NONE)


def curve(
    axis: Axes, x: Sequence[float], by_seed: Sequence[Sequence[float]], label: str, number: int = 0, **style: Any
) -> None:
    """The mean over seeds (S, N) at x (N,), with the standard deviation as error bars; `number` selects the look."""
    values = np.asarray(by_seed, float)
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else None
    look = {"color": COLOURS[number], "marker": MARKERS[number], "capsize": 2, "linewidth": 1.2, "markersize": 4}
    axis.errorbar(x, values.mean(axis=0), yerr=deviation, label=label, **{**look, **style})


def curve_over(axis: Axes, by_x: Mapping[Any, Sequence[float]], label: str, number: int = 0, **style: Any) -> None:
    """`curve`, from the values of all seeds at each x."""
    curve(axis, list(by_x), list(zip(*by_x.values(), strict=True)), label, number, **style)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation over seeds; the deviation of a single seed is 0."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def plus_minus(values: Sequence[float], width: int = 0, digits: int = 2) -> str:
    """The mean, `width` characters wide, and the deviation of `values` as text."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:{width}.{digits}f} ±{deviation:.{digits}f}"


def show_png(axis: Axes, pictures: Sequence[str], labels: Sequence[str]) -> None:
    """Pictures (PNG in base64) below each other, each with a label on its left."""
    drawn = [plt.imread(BytesIO(base64.b64decode(picture)), format="png") for picture in pictures]
    heights = [picture.shape[0] for picture in drawn]
    axis.imshow(np.concatenate(drawn), interpolation="nearest")
    axis.set_yticks(np.cumsum(heights) - np.array(heights) / 2, labels)
    axis.set_xticks([])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.grid(visible=False)
