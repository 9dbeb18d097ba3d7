"""Write letters drawn from fonts as shards: synthetic images with real detail at any resolution, without a download.

    python tools/make_glyphs.py --resolution 64 --output runs/glyphs_64px

Image i is the same letter, font, colours and place at every resolution, so that shards of several resolutions belong
together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jitscale.data.glyphs import GLYPH_CLASSES, Glyphs
from jitscale.data.images import CODECS
from jitscale.data.packing import write_shards_once
from jitscale.errors import ExitCode, exit_with_message


def main() -> int:
    """Parse the command line and write, or find that it was done before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=64, help="pixels a side (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10_000, metavar="N", help="images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that tells glyphs apart (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder of the shards; made if needed"
    )
    parser.add_argument("--codec", choices=list(CODECS), default="png", help="stored form (default: %(default)s)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    for name in ("resolution", "count"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    glyphs = Glyphs(options.count, options.resolution, options.seed)
    done = write_shards_once(
        glyphs,
        options.output,
        labels=glyphs.labels,
        codec=options.codec,
        samples_per_shard=options.samples_per_shard,
        class_names=GLYPH_CLASSES,
    )
    print(done)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
