"""Write letters drawn from fonts as PNG files, a folder for each class: pictures to try the tools with, on any machine.

    python tools/make_pictures.py --output runs/letters/pictures

tools/make_glyphs.py writes the same letters as shards.
"""

from pathlib import Path

import installed

from PIL import Image
from tqdm import tqdm

from jitscale.command import Parser, refuse_existing
from jitscale.errors import ExitCode, data_error, exit_with_message
from jitscale.preparation.glyphs import GLYPH_CLASSES, Glyphs


def main() -> int:
    """Parse the command line and write."""
    parser = Parser(__doc__)
    parser.add_number("--resolution", 160, "pixels per side")
    parser.add_number("--count", 3000, "pictures; each of the ten classes has a tenth")
    parser.add_number("--seed", 0, "seed of letters, fonts, colours and places", int)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    options = parser.parse_args()
    refuse_existing(options.output)
    glyphs = Glyphs(options.count, options.resolution, options.seed)
    with data_error(f"{options.output}: cannot be written", "choose another --output"):
        for name in GLYPH_CLASSES:
            (options.output / name).mkdir(parents=True)
        for index, label in enumerate(tqdm(glyphs.labels, unit="img", desc="write", delay=1)):
            folder = options.output / GLYPH_CLASSES[label]
            Image.fromarray(glyphs[index]).save(folder / f"{index:06d}.png")
    print(f"{options.output}: {len(glyphs)} pictures in {len(GLYPH_CLASSES)} folders")
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
