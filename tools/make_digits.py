"""Write scikit-learn's 1,797 handwritten digits as shards: real images for a first run, without a download.

python tools/make_digits.py --resolution 32 --output runs/digits_32px
"""

from pathlib import Path

import installed

from jitscale.command import Parser
from jitscale.data.images import CODECS
from jitscale.errors import ExitCode, exit_with_message
from jitscale.preparation.array_shards import write_shards_once
from jitscale.preparation.digits import DIGIT_CLASSES, digit_images


def main() -> int:
    """Parse the command line and write the shards, unless they are there already."""
    parser = Parser(__doc__)
    parser.add_number("--resolution", 32, "pixels per side")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--codec", choices=list(CODECS), default="png", help="stored form (default: %(default)s)")
    parser.add_number("--samples-per-shard", 256, "images in a shard")
    options = vars(parser.parse_args())
    images, labels = digit_images(options.pop("resolution"))
    print(write_shards_once(images, labels=labels, class_names=DIGIT_CLASSES, dataset="digits", **options))
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
