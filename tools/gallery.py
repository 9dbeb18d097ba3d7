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
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import installed

import yaml

from jitscale.command import Parser
from jitscale.errors import CheckpointError, ExitCode, UserError, exit_with_message
from jitscale.files import atomic_write
from jitscale.tracking import BEST_SAMPLES, HELD_OUT, SAMPLES, read_evaluations, read_held_out, read_metrics

MOST_GRIDS = 12  # of a run, evenly over its steps
CURVES = {"loss": "training loss", "grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images/s"}
PICTURE = re.compile(r"images_(\d+)\.png")  # as training names pictures of samples
LARGEST = 1e300  # larger numbers are no measurements, and cannot be drawn
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
    try:
        page = page_of(options.runs)
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page.encode())
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror}; see to its permissions and room") from error
    print(f"{output}: {len(page) / 1e6:.1f} MB")
    return ExitCode.DONE


def page_of(runs: Sequence[Path]) -> str:
    """The whole page. What the files of a run say is shown as text, and what is no number as missing."""
    named = _named(runs)
    title = html.escape(", ".join(named))
    parts = [f"<h1>{title}</h1>", "<h2>Results</h2>", results(named), "<h2>Curves</h2>", curves(named)]
    for text, run in named.items():
        name = html.escape(text)
        if (run / BEST_SAMPLES).exists():
            parts += [f"<h2>Samples of the best setting: {name}</h2>", grids(run / BEST_SAMPLES, most=1)]
        parts += [f"<h2>Samples: {name}</h2>", grids(run / SAMPLES, most=MOST_GRIDS)]
        if (run / "sweep.svg").exists():  # as an image: a script in it does not run
            parts += [
                f"<h2>Sweep: {name}</h2>",
                f"<figure>{_image(run / 'sweep.svg', 'svg+xml', 'the sweep')}</figure>",
            ]
        settings = html.escape((run / "config.yaml").read_text(errors="replace"))
        parts.append(f"<details><summary>Settings: {name}</summary><pre>{settings}</pre></details>")
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))


def results(named: Mapping[str, Path]) -> str:
    """A table of the final evaluations: by which features, which weights and how many images, then the metrics."""
    keys = ("fid", "fid_floor", "inception_score", "kid", "precision", "recall", "label_agreement")
    found = {name: _json(run / "result.json") for name, run in named.items() if (run / "result.json").exists()}
    if not found:
        return "<p>no result.json yet</p>"
    shown = [key for key in keys if any(key in result for result in found.values())]
    head = "".join(f"<th>{key}</th>" for key in ("run", "features", "weights", "guidance", "num_images", *shown))
    rows = []
    for name, result in found.items():
        best, protocol = _part(result, "best"), _part(result, "protocol")
        cells = [name, _text(protocol.get("features")), _text(best.get("weights")), _number(best.get("guidance_scale"))]
        cells += [_number(result.get(key)) for key in ("num_images", *shown)]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    unread = [name for name, result in found.items() if not result]
    note = f"<p>result.json cannot be read: {html.escape(', '.join(unread))}</p>" if unread else ""
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>{note}"


def curves(named: Mapping[str, Path]) -> str:
    """The values of metrics.jsonl and evaluations.jsonl over images seen."""
    lines = {name: read_metrics(run) for name, run in named.items()}
    drawn = [_figure(_points_of(lines, key), name, log=key == "loss") for key, name in CURVES.items()]
    measured = _measured(named)
    for key in sorted({key for own in measured.values() for line in own for key in line if MEASURED.fullmatch(key)}):
        points = {label: points for label, points in _points_of(measured, key).items() if points}
        drawn.append(_figure(points, key.replace("_", " "), log=key.startswith("fid"), always_labelled=True))
    drawn.append(_held_out(named))
    return "\n".join(f"<figure>{svg}</figure>" for svg in drawn if svg) or "<p>no metrics yet</p>"


def _measured(named: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The lines of evaluations.jsonl that belong to one curve, by what makes their numbers comparable."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in named.items():
        features = _features(run)
        for line in read_evaluations(run):
            said = [features, _text(line.get("weights")), f"{_number(line.get('num_images')) or '?'} images"]
            label = ", ".join(filter(None, said))
            found.setdefault(label if len(named) == 1 else f"{name}: {label}", []).append(line)
    return found


def grids(folder: Path, most: int) -> str:
    """Pictures of samples, by images seen: at most `most`, the newest among them."""
    files = sorted(file for file in folder.glob("*.png") if PICTURE.fullmatch(file.name))
    if not files:
        return "<p>none; evaluation.grid_every_images asks for them</p>"
    shown = []
    for file in files[:: -math.ceil(len(files) / most)][::-1]:
        images = int(file.stem.rpartition("_")[2])
        shown.append(f"<figure>{_image(file, 'png', 'samples')}<figcaption>{images:,} images</figcaption></figure>")
    return "\n".join(shown)


def _held_out(named: Mapping[str, Path]) -> str | None:
    """The held-out losses of every weight set of several runs, averaged over times."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run_name, run in named.items():
        lines = read_held_out(run)
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(HELD_OUT)):
            name = key.removeprefix(HELD_OUT)
            if "/" not in name:  # a name with / is the loss at one of the times
                found[name if len(named) == 1 else f"{run_name}: {name}"] = _points(lines, key)
    return _figure(found, "held-out loss", log=False)


def _points_of(lines: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, list[tuple[float, float]]]:
    return {label: _points(own, key) for label, own in lines.items()}


def _points(lines: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(line.get("images"), line.get(key)) for line in lines]
    return [(images, value) for images, value in found if _is_number(images) and _is_number(value)]


def _figure(
    found: dict[str, list[tuple[float, float]]], name: str, log: bool, always_labelled: bool = False
) -> str | None:
    """Curves of (images, value) by their labels; None without points. `log` holds if all values are positive."""
    from jitscale.figures import figure  # noqa: PLC0415  # matplotlib belongs to an extra

    if not any(found.values()):
        return None
    buffer = io.StringIO()
    with figure(buffer, panels=1) as (axis,):
        for label, points in found.items():
            if points:
                marker = "o" if len(points) == 1 else None  # a line of one point is invisible
                plain = label.replace("$", r"\$")  # no formula
                axis.plot(*zip(*points, strict=True), label=plain, linewidth=1, marker=marker, markersize=4)
        positive = all(value > 0 for points in found.values() for _, value in points)
        axis.set(xlabel="images seen", ylabel=name, yscale="log" if positive and log else "linear")
        if len(found) > 1 or always_labelled:
            axis.legend(fontsize=7)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # without its prolog


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """Runs by their folders' names, or by their whole paths where two have the same name."""
    resolved = list(dict.fromkeys(run.resolve() for run in runs))
    count = Counter(run.name for run in resolved)
    return {run.name if count[run.name] == 1 else str(run): run for run in resolved}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _features(run: Path) -> str:
    """The network with which a run measures itself, as its settings name it."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return ""
    return _text(_part(settings if isinstance(settings, dict) else {}, "evaluation").get("features"))


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _image(file: Path, kind: str, alternative: str) -> str:
    """The picture as a part of the page."""
    content, look = base64.b64encode(file.read_bytes()).decode(), ' class="grid"' if kind == "png" else ""
    return f'<img{look} alt="{alternative}" src="data:image/{kind};base64,{content}">'


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> str:
    """A number as text; empty where there is none."""
    if not _is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
