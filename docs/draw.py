"""Draw the figures of the pages into docs/images.

    python docs/draw.py
    python docs/draw.py job step --output figures/

Two pictures show what trained runs draw, from the grids in their folders; they are drawn if they are named:

    python docs/draw.py own_images samples --letters runs/letters/samples/images_000000128000.png \\
        --digits runs/demo/64px/best_samples/images_000000032000.png
"""

from pathlib import Path

from figures import job, samples, step, system, upgrade_patch, upgrade_rows
from jitscale.command import Parser
from jitscale.errors import ExitCode, UserError, exit_with_message

IMAGES = Path(__file__).parent / "images"
FIGURES = {
    "system": system.draw,
    "step": step.draw,
    "upgrade": upgrade_rows.draw,
    "upgrade_patch": upgrade_patch.draw,
    "job": job.draw,
}
OF_RUNS = {"samples": ("letters", "digits"), "own_images": ("letters",)}  # figures of runs, and their options
FORMATS = {"samples": ".jpg", "own_images": ".jpg", "upgrade": ".webp"}  # they have more colours than a small PNG


def file_name(figure: str) -> str:
    """The name of a figure's file."""
    return figure + FORMATS.get(figure, ".png")


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and draw."""
    parser = Parser(__doc__)
    known, extra = ", ".join([*FIGURES, *OF_RUNS]), " and ".join(OF_RUNS)
    parser.add_argument("figures", nargs="*", metavar="NAME", help=f"{known}; default: all but {extra}")
    parser.add_argument("--output", type=Path, default=IMAGES, metavar="DIR", help="default: docs/images")
    parser.add_argument("--letters", type=Path, metavar="FILE", help="a grid of the run of docs/own-images.md")
    parser.add_argument("--digits", type=Path, metavar="FILE", help="a grid of the demo's run at 64 px")
    options = parser.parse_args(arguments)
    if unknown := set(options.figures) - {*FIGURES, *OF_RUNS}:
        raise UserError(f"{', '.join(sorted(unknown))}: no such figure; choose of {known}")
    for name in options.figures:
        if missing := [f"--{option}" for option in OF_RUNS.get(name, ()) if getattr(options, option) is None]:
            raise UserError(f"{name}: needs {' and '.join(missing)}; see --help")
    for name in options.figures or FIGURES:
        path = options.output / file_name(name)
        if name == "samples":
            samples.draw_both(path, options.letters, options.digits)
        elif name == "own_images":
            samples.draw_letters(path, options.letters)
        else:
            FIGURES[name](path)
        print(path)
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
