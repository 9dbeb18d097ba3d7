"""Write letters drawn from fonts as shards: synthetic images with real detail at any resolution, without a download.

    python tools/make_glyphs.py --resolution 64 --output runs/glyphs_64px

Image i has the same letter, font, colours and place at every resolution. So shards of several resolutions hold the same
pictures.
"""

from pathlib import Path

import installed

from jitscale.command import Parser
from jitscale.data.images import CODECS
from jitscale.errors import ExitCode, exit_with_message
from jitscale.preparation.array_shards import write_shards_once
from jitscale.preparation.glyphs import GLYPH_CLASSES, Glyphs


def main() -> int:
    """Parse the command line and write the shards, unless they are there already."""
    parser = Parser(__doc__)
    parser.add_number("--resolution", 64, "pixels per side")
    parser.add_number("--count", 10_000, "images")
    parser.add_number("--seed", 0, "seed of letters, fonts, colours and places", int)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    parser.add_argument("--codec", choices=list(CODECS), default="png", help="stored form (default: %(default)s)")
    parser.add_number("--samples-per-shard", 1000, "images in a shard")
    options = vars(parser.parse_args())
    glyphs = Glyphs(options.pop("count"), options.pop("resolution"), options.pop("seed"))
    options |= {"class_names": GLYPH_CLASSES, "dataset": "glyphs"}
    print(write_shards_once(glyphs, labels=glyphs.labels, **options))
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
