"""One page to look at a run: curves, samples by step, sweep and settings, in a single HTML file without links.

    python tools/gallery.py runs/h                 # writes runs/h/gallery.html
    python tools/gallery.py runs/a runs/b --output compare.html

The runs may be still training.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import installed

from jitscale.command import Parser
from jitscale.errors import CheckpointError, ExitCode, exit_with_message
from jitscale.files import atomic_write
from jitscale.tracking import BEST_SAMPLES, HELD_OUT, SAMPLES, read_evaluations, read_held_out, read_metrics

MOST_GRIDS = 12  # of a run, evenly over its steps
CURVES = {"loss": "training loss", "grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images/s"}
MEASURED = re.compile(r"(fid|inception_score)(_\d+k?)?")  # names of measurements on few images end with their number
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } h2 { border-top: 1px solid #ddd; padding-top: 1rem; margin-top: 2rem; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { color: #666; font-size: 13px; }
img, svg { max-width: 100%; height: auto; } img.grid { image-rendering: pixelated; width: 20rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #eee; }
td:first-child, th:first-child { text-align: left; } pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>\
<style>{style}</style></head>
<body>
{body}
</body></html>
"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the page."""
    parser = Parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--output", type=Path, metavar="HTML", help="default: gallery.html in the first run's folder")
    options = parser.parse_args(arguments)
    for run in options.runs:
        if not (run / "config.yaml").exists():
            raise CheckpointError(f"{run}: no run there (no config.yaml); give a run's folder")
    output = options.output or options.runs[0] / "gallery.html"
    page = page_of(options.runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as file:
        file.write(page.encode())
    print(f"{output}: {len(page) / 1e6:.1f} MB")
    return ExitCode.DONE


def page_of(runs: Sequence[Path]) -> str:
    """The whole page."""
    title = html.escape(", ".join(map(_name, runs)))
    parts = [f"<h1>{title}</h1>", "<h2>Results</h2>", results(runs), "<h2>Curves</h2>", curves(runs)]
    for run in runs:
        name = html.escape(_name(run))
        if (run / BEST_SAMPLES).exists():
            parts += [f"<h2>Samples of the best setting: {name}</h2>", grids(run / BEST_SAMPLES, most=1)]
        parts += [f"<h2>Samples: {name}</h2>", grids(run / SAMPLES, most=MOST_GRIDS)]
        if (run / "sweep.svg").exists():
            parts += [f"<h2>Sweep: {name}</h2>", f"<figure>{_without_prolog((run / 'sweep.svg').read_text())}</figure>"]
        settings = html.escape((run / "config.yaml").read_text())
        parts.append(f"<details><summary>Settings: {name}</summary><pre>{settings}</pre></details>")
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))


def results(runs: Sequence[Path]) -> str:
    """A table of the final evaluations."""
    keys = ("fid", "fid_floor", "inception_score", "kid", "precision", "recall", "label_agreement", "num_images")
    found = {run: json.loads((run / "result.json").read_text()) for run in runs if (run / "result.json").exists()}
    if not found:
        return "<p>no result.json yet</p>"
    shown = [key for key in keys if any(key in result for result in found.values())]
    head = "".join(f"<th>{key}</th>" for key in ("run", "weights", "guidance", *shown))
    rows = []
    for run, result in found.items():
        best = result["best"]
        cells = [_name(run), best["weights"], _number(best["guidance_scale"])]
        cells += [_number(result.get(key)) for key in shown]
        rows.append("<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def curves(runs: Sequence[Path]) -> str:
    """The values of metrics.jsonl and evaluations.jsonl over images seen."""
    lines = {_name(run): read_metrics(run) for run in runs}
    measured = {_name(run): read_evaluations(run) for run in runs}
    keys = {key for own in measured.values() for line in own for key in line}
    few = {key: key.replace("_", " ") for key in sorted(filter(MEASURED.fullmatch, keys))}
    drawn = [
        _figure({run: _points(own, key) for run, own in found.items()}, name, log=key.startswith(("loss", "fid")))
        for found, names in ((lines, CURVES), (measured, few))
        for key, name in names.items()
    ]
    drawn.append(_held_out(runs))
    return "\n".join(f"<figure>{svg}</figure>" for svg in drawn if svg) or "<p>no metrics yet</p>"


def grids(folder: Path, most: int) -> str:
    """Pictures of samples, by images seen: at most `most`, the newest among them."""
    files = sorted(folder.glob("*.png"))
    if not files:
        return "<p>none; evaluation.grid_every_images asks for them</p>"
    shown = []
    for file in files[:: -math.ceil(len(files) / most)][::-1]:
        png, images = base64.b64encode(file.read_bytes()).decode(), int(file.stem.rpartition("_")[2])
        picture = f'<img class="grid" alt="samples" src="data:image/png;base64,{png}">'
        shown.append(f"<figure>{picture}<figcaption>{images:,} images</figcaption></figure>")
    return "\n".join(shown)


def _held_out(runs: Sequence[Path]) -> str | None:
    """The held-out losses of every weight set of several runs, averaged over times."""
    found: dict[str, list[tuple[int, float]]] = {}
    for run in runs:
        lines = read_held_out(run)
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(HELD_OUT)):
            name = key.removeprefix(HELD_OUT)
            if "/" not in name:  # a name with / is the loss at one of the times
                found[name if len(runs) == 1 else f"{_name(run)}: {name}"] = _points(lines, key)
    return _figure(found, "held-out loss", log=False)


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(line["images"], line[key]) for line in lines if line.get(key) is not None]


def _figure(found: dict[str, list[tuple[int, float]]], name: str, log: bool) -> str | None:
    """Curves of (images, value) by their labels; None without points. `log` holds if all values are positive."""
    from jitscale.figures import figure  # noqa: PLC0415  # matplotlib belongs to an extra

    if not any(found.values()):
        return None
    buffer = io.StringIO()
    with figure(buffer, panels=1) as (axis,):
        for label, points in found.items():
            if points:
                axis.plot(*zip(*points, strict=True), label=label, linewidth=1)
        positive = all(value > 0 for points in found.values() for _, value in points)
        axis.set(xlabel="images seen", ylabel=name, yscale="log" if positive and log else "linear")
        if len(found) > 1:
            axis.legend(fontsize=7)
    return _without_prolog(buffer.getvalue())


def _name(run: Path) -> str:
    return run.resolve().name


def _number(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _without_prolog(svg: str) -> str:
    return svg[svg.index("<svg") :]


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
