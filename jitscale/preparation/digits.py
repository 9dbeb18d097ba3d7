"""Real images that come with a Python package: the handwritten digits of scikit-learn (Alpaydin and Kaynak 1998)."""

import numpy as np
import numpy.typing as npt
from PIL import Image

from jitscale.errors import UserError

DIGIT_CLASSES = [str(digit) for digit in range(10)]


MOST_PIXELS = 512  # per side; all digits together are in memory


def digit_images(resolution: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """All 1,797 digits, resized from 8 x 8 by bicubic interpolation: images (1797, R, R, 3), labels (1797,).

    Raises a UserError if scikit-learn is not installed, or the images would fill the memory.
    """
    if resolution > MOST_PIXELS:
        raise UserError(f"resolution {resolution}: must be at most {MOST_PIXELS} pixels per side for digits of 8 x 8")
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415
    except ImportError as error:
        raise UserError("the digits come with scikit-learn, which is missing; pip install 'jitscale[demo]'") from error
    data, labels = load_digits(return_X_y=True)
    grey = np.round(data.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    size = (resolution, resolution)
    resized = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)) for image in grey])
    return np.repeat(resized[..., None], 3, axis=-1), labels.astype(np.int64)
