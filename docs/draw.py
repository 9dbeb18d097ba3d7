"""Draw the figures of the pages into docs/images.

python docs/draw.py
python docs/draw.py job step --output /tmp/figures
"""

from pathlib import Path

from figures import job, step, system, upgrade_patch

from jitscale.command import Parser
from jitscale.errors import ExitCode, exit_with_message

IMAGES = Path(__file__).parent / "images"
FIGURES = {"system": system.draw, "step": step.draw, "upgrade_patch": upgrade_patch.draw, "job": job.draw}


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw."""
    parser = Parser(__doc__)
    parser.add_argument("figures", nargs="*", metavar="NAME", help=f"of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    options = parser.parse_args(arguments)
    for name in options.figures or FIGURES:
        path = options.output / f"{name}.png"
        FIGURES[name](path)
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
