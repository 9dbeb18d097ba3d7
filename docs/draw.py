"""Draw the figures of the pages into docs/images.

    python docs/draw.py
    python docs/draw.py job step --output figures/

Two pictures show what trained runs draw; each is drawn if it is named:

    python docs/draw.py samples --letters runs/letters/shown --digits runs/demo/64px/shown
    python docs/draw.py own_images --grid runs/letters/samples/images_000000128000.png

`samples` reads two folders that tools/sample.py has written with --per-class 4 --guidance 2.
"""

from pathlib import Path

from figures import job, samples, step, system, upgrade_patch
from jitscale.command import Parser
from jitscale.errors import ExitCode, UserError, exit_with_message

IMAGES = Path(__file__).parent / "images"
FIGURES = {"system": system.draw, "step": step.draw, "upgrade_patch": upgrade_patch.draw, "job": job.draw}
OF_RUNS = {"samples": ("letters", "digits"), "own_images": ("grid",)}  # and the options that they need


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw."""
    parser = Parser(__doc__)
    known, extra = ", ".join([*FIGURES, *OF_RUNS]), " and ".join(OF_RUNS)
    parser.add_argument("figures", nargs="*", metavar="NAME", help=f"{known}; default: all but {extra}")
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    parser.add_argument("--letters", type=Path, metavar="DIR", help="of samples: letters of 128 px")
    parser.add_argument("--digits", type=Path, metavar="DIR", help="of samples: digits of 64 px")
    parser.add_argument("--grid", type=Path, metavar="FILE", help="of own_images: a picture of RUN/samples")
    options = parser.parse_args(arguments)
    if unknown := set(options.figures) - {*FIGURES, *OF_RUNS}:
        raise UserError(f"{', '.join(sorted(unknown))}: no such figure; choose of {known}")
    for name in options.figures:
        if missing := [f"--{option}" for option in OF_RUNS.get(name, ()) if getattr(options, option) is None]:
            raise UserError(f"{name}: needs {' and '.join(missing)}; see --help")
    for name in options.figures or FIGURES:
        path = options.output / f"{name}.png"
        if name == "samples":
            samples.draw_runs(path, options.letters, options.digits)
        elif name == "own_images":
            samples.draw_grid(path, options.grid)
        else:
            FIGURES[name](path)
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
