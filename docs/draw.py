"""Draw the figures of the pages into docs/images.

    python docs/draw.py
    python docs/draw.py job step --output figures/

The picture `samples` needs two trained runs, and is drawn if it is named:

    python docs/draw.py samples --letters runs/letters/drawn --digits runs/demo/drawn

Both folders are written by tools/sample.py with --per-class 4 --guidance 2.
"""

from pathlib import Path

from figures import job, samples, step, system, upgrade_patch
from jitscale.command import Parser
from jitscale.errors import ExitCode, UserError, exit_with_message

IMAGES = Path(__file__).parent / "images"
FIGURES = {"system": system.draw, "step": step.draw, "upgrade_patch": upgrade_patch.draw, "job": job.draw}
SAMPLES = "samples"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw."""
    parser = Parser(__doc__)
    known = ", ".join([*FIGURES, SAMPLES])
    parser.add_argument("figures", nargs="*", metavar="NAME", help=f"{known}; default: all but {SAMPLES}")
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    parser.add_argument("--letters", type=Path, metavar="DIR", help=f"of {SAMPLES}: letters of 128 px")
    parser.add_argument("--digits", type=Path, metavar="DIR", help=f"of {SAMPLES}: digits of 64 px")
    options = parser.parse_args(arguments)
    if unknown := set(options.figures) - {*FIGURES, SAMPLES}:
        raise UserError(f"{', '.join(sorted(unknown))}: no such figure; choose of {known}")
    if SAMPLES in options.figures and None in (options.letters, options.digits):
        raise UserError(f"{SAMPLES}: needs --letters DIR and --digits DIR, which tools/sample.py writes")
    for name in options.figures or FIGURES:
        path = options.output / f"{name}.png"
        if name == SAMPLES:
            samples.draw(path, options.letters, options.digits)
        else:
            FIGURES[name](path)
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
