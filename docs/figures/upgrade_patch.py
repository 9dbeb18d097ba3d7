"""The effect of an upgrade on patches: U makes them larger, and D reverses that."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import Rectangle

from figures.canvas import LINE_HEIGHT, QUIET, Canvas, canvas
from jitscale.checkpoints.upgrade import AREA_MEANS, operators
from jitscale.preparation.glyphs import Glyphs

SMALL, LARGE = 8, 16  # pixels of a patch's side, before and after
GLYPH, RESOLUTION = 24, 32  # a slanted E
SHOWN = 2, 1  # row and column of the patch that has a coloured frame

SIDE, LEFT, GAP, TOP = 1.86, 0.12, 1.05, 0.42  # inches of a picture, and the space around it


@dataclass(frozen=True)
class Upgraded:
    """A picture through one kernel: (H, W, 3) float64, values in [0, 1] but for what `smooth` overshoots."""

    large: torch.Tensor  # U x, patch by patch
    back: torch.Tensor  # D U x


def letter() -> torch.Tensor:
    """The picture x at the low resolution, (H, W, 3) float64 in [0, 1]."""
    return torch.from_numpy(Glyphs(GLYPH + 1, RESOLUTION)[GLYPH]).double() / 255


def upgraded(picture: torch.Tensor, kernel: str) -> Upgraded:
    """The picture (H, W, 3) through the U and the D of a kernel of `jitscale.checkpoints.upgrade`."""
    pool, enlarge = operators(SMALL, LARGE, kernel)  # (p, q) and (q, p)
    large = _patchwise(picture, enlarge)
    return Upgraded(large, _patchwise(large, pool))


def _patchwise(picture: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """Each patch of a picture (H, W, C) multiplied by `axis` (new, old) on both axes."""
    old = axis.shape[1]
    patches = picture.unflatten(1, (-1, old)).unflatten(0, (-1, old))  # (G, P, G, P, C)
    resized = torch.einsum("gihjc,qi,rj->gqhrc", patches, axis, axis)
    return resized.flatten(2, 3).flatten(0, 1)


def draw(path: Path) -> None:
    """Left x; in the middle U x, for both kernels that pool by areas; right D U x."""
    picture = letter()
    columns = [LEFT + (SIDE + GAP) * number for number in range(3)]
    rows = [TOP, TOP + SIDE + 0.64]
    middle = (rows[0] + rows[1] + SIDE) / 2
    with canvas(path, columns[-1] + SIDE + LEFT, rows[1] + SIDE + 0.34) as drawing:
        _show(drawing, columns[0], middle - SIDE / 2, picture, SMALL, f"x: {RESOLUTION} px, patches of {SMALL}")
        for y, kernel in zip(rows, reversed(AREA_MEANS), strict=True):
            result = upgraded(picture, kernel)
            size = RESOLUTION * LARGE // SMALL
            _show(drawing, columns[1], y, result.large, LARGE, f"U x, {kernel}: {size} px, patches of {LARGE}")
            difference = float((result.back - picture).abs().max())
            _show(drawing, columns[2], y, result.back, SMALL, f"D U x: {RESOLUTION} px, patches of {SMALL}")
            power = math.floor(math.log10(max(difference, 1e-15))) + 1  # rounding differs from machine to machine
            says = f"equals x up to 1e{power}"
            drawing.text(columns[2] + SIDE / 2, y + SIDE + 0.14, says, size=8.5, colour=QUIET)
            turn, level = columns[0] + SIDE + GAP * 0.42, y + SIDE / 2
            drawing.arrow((columns[0] + SIDE + 0.08, middle), (turn, middle), (turn, level), (columns[1] - 0.08, level))
            drawing.text(columns[1] - 0.3, level - 0.14, "U", bold=True)
            drawing.arrow((columns[1] + SIDE + 0.08, level), (columns[2] - 0.08, level))
            drawing.text(columns[2] - GAP / 2, level - 0.14, "D", bold=True)
            drawing.text(columns[2] - GAP / 2, level + 0.14, "mean of", size=8.5, colour=QUIET)
            drawing.text(columns[2] - GAP / 2, level + 0.14 + LINE_HEIGHT, "2 x 2 pixels", size=8.5, colour=QUIET)


def _show(drawing: Canvas, x: float, y: float, picture: torch.Tensor, patch: int, title: str) -> None:
    """A picture with the grid of its patches, one of which has a frame."""
    drawing.text(x + SIDE / 2, y - 0.14, title)
    shown = np.clip(picture.numpy(), 0, 1)
    drawing.axes.imshow(shown, extent=(x, x + SIDE, y + SIDE, y), interpolation="nearest", zorder=1)
    count = len(picture) // patch
    side = SIDE / count
    for row in range(count):
        for column in range(count):
            corner = (x + side * column, y + side * row)
            drawing.axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="white", linewidth=0.6))
    corner = (x + side * SHOWN[1], y + side * SHOWN[0])
    drawing.axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor="#F0C000", linewidth=2, zorder=3))
