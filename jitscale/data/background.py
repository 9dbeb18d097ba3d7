"""The background that shows through transparent pixels.

Shapes: H rows, W columns; N pixels.
"""

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jitscale.errors import DataError

OPAQUE = 255  # alpha of a pixel that hides the background


@dataclass(frozen=True)
class Background:
    """The background that images with alpha are composited over. `str` gives the text that `parse_background` reads."""

    colour: tuple[int, int, int] | None  # red, green, blue in 0..255; None: alpha is discarded, hidden colours show

    def __str__(self) -> str:
        names = {colour: name for name, colour in _NAMED.items()}
        return names.get(self.colour) or ",".join(map(str, self.colour or ()))

    def behind(self, image: npt.NDArray[np.uint8], alpha: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """`image` (H, W, 3) composited over this background by its `alpha` (H, W), rounded to the nearest value.

        Opaque pixels do not change.
        """
        if self.colour is None:
            return image
        see_through = alpha < OPAQUE
        weight = alpha[see_through].astype(np.uint16)[:, None]  # (N, 1)
        mixed = image[see_through] * weight + np.array(self.colour, np.uint16) * (OPAQUE - weight)
        composited = image.copy()
        composited[see_through] = (mixed + OPAQUE // 2) // OPAQUE  # the sum fits into 16 bits: 255 * 255 + 127
        return composited


_NAMED: dict[str, tuple[int, int, int] | None] = {"white": (255, 255, 255), "black": (0, 0, 0), "drop": None}

WHITE = Background(_NAMED["white"])


def parse_background(text: str) -> Background:
    """The background that `text` names: white, black, drop, or R,G,B in decimal. Raises a DataError for other text."""
    if text in _NAMED:
        return Background(_NAMED[text])
    numbers = [int(part) for part in text.split(",")] if re.fullmatch(r"\d{1,3}(,\d{1,3}){2}", text, re.ASCII) else []
    if not numbers or max(numbers) > 255:
        choices = "white, black, drop (hidden colours become visible), or R,G,B in 0..255 such as 12,34,56"
        raise DataError(f"background {text!r}: is unknown; give {choices}")
    red, green, blue = numbers
    return Background((red, green, blue))
