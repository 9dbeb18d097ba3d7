"""Letters drawn from the outlines of fonts: synthetic images with real detail at any resolution.

Glyph i is the same picture at every resolution, as well as the pixels can show it: letter, font, colours, angle, size
and place are functions of (seed, i). The fonts are part of matplotlib, so nothing is downloaded and every machine draws
the same.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from jitscale.data.images import UInt8Array
from jitscale.errors import UserError
from jitscale.keyed_random import Int64Array, Purpose, uniform

if TYPE_CHECKING:  # matplotlib belongs to an extra, and takes long to import
    from matplotlib.path import Path as Outline

GLYPH_CLASSES = list("ABCDEFGHIJ")
GLYPH_FONTS = [
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmb10", "cmr10", "cmss10", "cmti10", "cmtt10"),
]

LARGEST_ANGLE = 10.0  # degrees to either side
HEIGHTS = 0.55, 0.75  # smallest and largest height, as a share of the image's side
LARGEST_SHIFT = 0.05  # shift on each axis, as a share of the image's side
BRIGHTEST_GROUND, DARKEST_LETTER = 0.25, 0.5  # limits for each colour channel, in [0, 1]
FINEST = 4096  # pixels of a letter's height; so finely its curves are drawn as lines


class Glyphs:
    """`count` glyphs as a sequence of images; each is drawn when it is read.

    Raises a UserError if matplotlib is not installed.
    """

    def __init__(self, count: int, resolution: int, seed: int = 0) -> None:
        try:
            import matplotlib  # noqa: F401, PLC0415
        except ImportError as error:
            raise UserError("glyphs are drawn by matplotlib, which is missing; pip install 'jitscale[demo]'") from error
        self._resolution = resolution
        draws = uniform(seed, Purpose.GLYPH, np.arange(count)[:, None], np.arange(11)[None])  # (count, 11)
        # (count,) each: indices into `GLYPH_CLASSES`, balanced, and into `GLYPH_FONTS`.
        self.labels: Int64Array = np.arange(count, dtype=np.int64) % len(GLYPH_CLASSES)
        self.fonts: Int64Array = (draws[:, 0] * len(GLYPH_FONTS)).astype(np.int64)
        self._angles = (2 * draws[:, 1] - 1) * LARGEST_ANGLE
        self._heights = HEIGHTS[0] + (HEIGHTS[1] - HEIGHTS[0]) * draws[:, 2]
        self._shifts = (2 * draws[:, 3:5] - 1) * LARGEST_SHIFT
        self._letters = DARKEST_LETTER + (1 - DARKEST_LETTER) * draws[:, 5:8]
        self._grounds = BRIGHTEST_GROUND * draws[:, 8:11]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> UInt8Array:
        """One picture, uint8 (R, R, 3)."""
        from matplotlib.backends.backend_agg import RendererAgg  # noqa: PLC0415
        from matplotlib.transforms import Affine2D  # noqa: PLC0415

        size = self._resolution
        letter, ground = self._letters[index], self._grounds[index]
        outline = _outline(int(self.labels[index]), int(self.fonts[index]))
        place = Affine2D().rotate_deg(self._angles[index]).scale(self._heights[index] * size)
        place.translate(*(size * (0.5 + self._shifts[index])))
        renderer = RendererAgg(size, size, dpi=72)
        context = renderer.new_gc()
        context.set_linewidth(0)
        context.set_antialiased(True)
        context.set_snap(False)  # snapping to pixels would move a letter differently at each resolution
        renderer.draw_path(context, outline, place, (1.0, 1.0, 1.0))
        coverage = np.asarray(renderer.buffer_rgba())[..., 3:].astype(np.float64) / 255
        return np.round(255 * (ground + coverage * (letter - ground))).astype(np.uint8)


@cache
def _outline(label: int, font: int) -> Outline:
    """A letter of height 1 around the origin."""
    from matplotlib import get_data_path  # noqa: PLC0415
    from matplotlib.font_manager import FontProperties  # noqa: PLC0415
    from matplotlib.path import Path as Outline  # noqa: PLC0415
    from matplotlib.textpath import TextPath  # noqa: PLC0415

    properties = FontProperties(fname=f"{get_data_path()}/fonts/ttf/{GLYPH_FONTS[font]}.ttf")
    path = TextPath((0, 0), GLYPH_CLASSES[label], size=100, prop=properties)
    low, high = path.get_extents().get_points()
    scaled = (path.vertices - (low + high) / 2) * (FINEST / (high[1] - low[1]))
    # Curves become fine lines here, once: drawn as curves, they would be coarser in smaller images.
    lines = Outline(scaled, path.codes).cleaned(curves=False, simplify=False)
    return Outline(np.asarray(lines.vertices) / FINEST, lines.codes)
