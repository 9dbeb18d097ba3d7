"""Write one HTML page to look at a run: results, curves, samples by step, sweep, data and settings.

    python tools/gallery.py runs/jit_h_256         # writes runs/jit_h_256/gallery.html
    python tools/gallery.py runs/a runs/b --output compare.html

The page needs no other file. The runs may still be training. The contact sheet of the data appears if the run's shards
are on this machine and have a manifest.
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
from jitscale.data.find import find_tars
from jitscale.errors import CheckpointError, DataError, ExitCode, UserError, exit_with_message
from jitscale.evaluation.sweep import TRIED
from jitscale.files import atomic_write
from jitscale.preparation.inspection import collect, contact_sheet
from jitscale.recorded import STEP_METRICS
from jitscale.tracking import (
    BEST_SAMPLES,
    HELD_OUT,
    SAMPLES,
    distance_of,
    distance_title,
    read_evaluations,
    read_held_out,
    read_metrics,
)

MOST_GRIDS = 12  # grids shown of a run, spread evenly over its steps
MOST_ROWS = 10  # rows of a sweep that are not folded away
CURVES = {"loss": "training loss", "grad_norm": "gradient norm", "lr": "learning rate", "images_per_second": "images/s"}
PICTURE = re.compile(r"images_(\d+)\.png")  # the names that training gives to grids of samples
SCORES = ("inception_score", "kid", "precision", "recall", "label_agreement")
LARGEST = 1e300  # matplotlib cannot draw larger numbers, and they are not measurements
# The name of a measurement on few images ends with their number, as in fid_5k.
MEASURED = re.compile(r"(fid|fd_\w+?|inception_score)(_\d+k?)?")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222; }
h1, h2 { font-weight: 600; } h2 { border-top: 1px solid #ddd; padding-top: 1rem; margin-top: 2rem; }
figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
figcaption { color: #666; font-size: 13px; max-width: 30rem; }
img, svg { max-width: 100%; height: auto; } img.grid { image-rendering: pixelated; width: 20rem; }
table { border-collapse: collapse; } td, th { vertical-align: bottom; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; }
td:first-child, th:first-child { text-align: left; } pre { background: #f6f6f6; padding: 1rem; overflow: auto; }
div.wide { overflow-x: auto; margin: 0 0 1rem 0; } tr.best td { background: #e8f3ee; font-weight: 600; }
summary { cursor: pointer; margin: 1rem 0; } img.sheet { width: 42.25rem; }
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
    """The whole page. Content of a run's files is escaped; a value that is not a number is shown as missing."""
    named = _named(runs)
    title = html.escape(", ".join(named))
    parts = [f"<h1>{title}</h1>", "<h2>Results</h2>", results(named), "<h2>Curves</h2>", curves(named)]
    for text, run in named.items():
        name = html.escape(text)
        if (run / BEST_SAMPLES).exists():
            parts += [f"<h2>Samples of the best setting: {name}</h2>", grids(run / BEST_SAMPLES, most=1)]
        parts += [f"<h2>Samples: {name}</h2>", grids(run / SAMPLES, most=MOST_GRIDS)]
        if tried := sweep(run):
            parts += [f"<h2>Sweep: {name}</h2>", tried]
    for pattern, names in _by_shards(named).items():
        parts += [f"<h2>Data: {html.escape(', '.join(names))}</h2>", data(pattern)]
    for text, run in named.items():
        name = html.escape(text)
        settings = html.escape((run / "config.yaml").read_text(errors="replace"))
        parts.append(f"<details><summary>Settings: {name}</summary><pre>{settings}</pre></details>")
    return PAGE.format(title=title, style=STYLE, body="\n".join(parts))


def results(named: Mapping[str, Path]) -> str:
    """A table of the final evaluations: features, weights, guidance and number of images, then the metrics."""
    found = {name: _json(run / "result.json") for name, run in named.items() if (run / "result.json").exists()}
    if not found:
        return "<p>no result.json yet</p>"
    named_metrics = list(dict.fromkeys(key for result in found.values() for key in result))
    distances = [key for key in named_metrics if re.fullmatch(r"(fid|fd_\w+?)(_floor)?", key)]
    distances.sort(key=lambda key: not key.startswith("fid"))  # stable: each distance stays before its floor
    shown = [*distances, *(key for key in SCORES if key in named_metrics)]
    head = (
        "run",
        "features",
        "weights",
        "guidance",
        "internal guidance",
        "images",
        *(key.replace("_", " ") for key in shown),
    )
    rows = []
    for name, result in found.items():
        best, protocol = _part(result, "best"), _part(result, "protocol")
        cells = [name, _text(protocol.get("features")), _text(best.get("weights")), _number(best.get("guidance_scale"))]
        cells.append(_number(best.get("internal_guidance")))
        cells += [_number(result.get(key)) for key in ("num_images", *shown)]
        rows.append(cells)
    unread = [name for name, result in found.items() if not result]
    note = f"<p>result.json cannot be read: {html.escape(', '.join(unread))}</p>" if unread else ""
    return _table(head, rows) + note


def sweep(run: Path) -> str:
    """The final sweep: its figure, and a table with the best setting first; empty if there was no sweep."""
    parts = []
    if (run / "sweep.svg").exists():  # embedded as an image, so that a script in it does not run
        parts.append(f"<figure>{_image((run / 'sweep.svg').read_bytes(), 'svg+xml', 'the sweep')}</figure>")
    result = _json(run / "result.json")
    table, best = result.get("table"), {**_part(result, "best"), "num_images": result.get("num_images")}
    rows = [row for row in table if isinstance(row, dict)] if isinstance(table, list) else []
    if len(rows) < 2:
        return "\n".join(parts)
    asked = _part(_settings(run), "evaluation").get("sweep")
    axes = ", ".join(map(_text, asked)) if isinstance(asked, list) else ""
    parts.append(f"<p>evaluation.sweep: {html.escape(axes)}</p>" if axes else "")
    distance = distance_of(result)
    rows.sort(key=lambda row: (-_sortable(row.get("num_images"), 0), _sortable(row.get(distance), LARGEST)))
    columns = {key: key.replace("_", " ").removeprefix("num ") for key in (*TRIED, "num_images")}
    if all(row.get("internal_guidance", 1.0) == 1.0 for row in rows):
        columns = {key: name for key, name in columns.items() if "internal" not in key}
    columns[distance] = distance_title(distance)
    if any("inception_score" in row for row in rows):
        columns["inception_score"] = "IS"
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    marked = next((n for n, row in enumerate(rows) if all(row.get(key) == best[key] for key in best)), None)
    head = [*columns.values()]
    parts.append(_table(head, cells[:MOST_ROWS], marked))
    if len(rows) > MOST_ROWS:
        hidden = _table(head, cells[MOST_ROWS:])
        parts.append(f"<details><summary>{len(rows) - MOST_ROWS} further settings</summary>{hidden}</details>")
    return "\n".join(parts)


def data(pattern: str) -> str:
    """The contact sheet of the shards `pattern`, or the reason why there is none."""
    if not pattern:
        return "<p>no contact sheet: the settings name no data.shards</p>"
    try:
        tars = find_tars(pattern)
        if tars.manifest is None:
            raise DataError(f"{pattern}: has no manifest; tools/index_shards.py writes one")
        sheet = contact_sheet(collect(tars, workers=1), seed=0)
    except (DataError, OSError) as error:
        return f"<p>no contact sheet: {html.escape(str(error))}</p>"
    caption = f"{tars.manifest.total:,} images, {tars.manifest.num_classes:,} classes: {pattern}"
    picture = _image(sheet, "png", "images of the data", look="sheet")
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _by_shards(named: Mapping[str, Path]) -> dict[str, list[str]]:
    """The names of the runs that read the same shards, by the pattern of the shards."""
    found: dict[str, list[str]] = {}
    for name, run in named.items():
        settings = _settings(run)
        size = _number(_part(settings, "model").get("image_size")).replace(",", "")
        pattern = _text(_part(settings, "data").get("shards")).replace("{resolution}", size)
        found.setdefault(pattern, []).append(name)
    return found


def curves(named: Mapping[str, Path]) -> str:
    """Curves of the values in metrics.jsonl and evaluations.jsonl over images seen."""
    lines = {name: read_metrics(run) for name, run in named.items()}
    meanings = {metric.name: metric.meaning.replace("`", "") for metric in STEP_METRICS}
    figures = {key: _figure(_points_of(lines, key), name, log=key == "loss") for key, name in CURVES.items()}
    of_steps = [
        f"<figure>{svg}<figcaption>{html.escape(meanings[key])}</figcaption></figure>"
        for key, svg in figures.items()
        if svg
    ]
    drawn = []
    measured = _measured(named)
    for key in sorted({key for own in measured.values() for line in own for key in line if MEASURED.fullmatch(key)}):
        points = {label: points for label, points in _points_of(measured, key).items() if points}
        drawn.append(_figure(points, key.replace("_", " "), log=key.startswith(("fid", "fd")), always_labelled=True))
    drawn.append(_held_out(named))
    return "\n".join([*of_steps, *(f"<figure>{svg}</figure>" for svg in drawn if svg)]) or "<p>no metrics yet</p>"


def _measured(named: Mapping[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """The lines of evaluations.jsonl by curve: same features, weights and number of images, so comparable."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, run in named.items():
        features = _text(_part(_settings(run), "evaluation").get("features"))
        for line in read_evaluations(run):
            said = [features, _text(line.get("weights")), f"{_number(line.get('num_images')) or '?'} images"]
            label = ", ".join(filter(None, said))
            found.setdefault(label if len(named) == 1 else f"{name}: {label}", []).append(line)
    return found


def grids(folder: Path, most: int) -> str:
    """Grids of samples by images seen: at most `most`, always with the newest."""
    files = sorted(file for file in folder.glob("*.png") if PICTURE.fullmatch(file.name))
    if not files:
        return "<p>none; set evaluation.grid_every_images to draw them while training</p>"
    shown = []
    for file in files[:: -math.ceil(len(files) / most)][::-1]:
        images = int(file.stem.rpartition("_")[2])
        picture = _image(file.read_bytes(), "png", "samples", look="grid")
        shown.append(f"<figure>{picture}<figcaption>{images:,} images</figcaption></figure>")
    return "\n".join(shown)


def _held_out(named: Mapping[str, Path]) -> str | None:
    """The held-out losses of every weight set of several runs, averaged over times."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run_name, run in named.items():
        lines = read_held_out(run)
        for key in dict.fromkeys(key for line in lines for key in line if key.startswith(HELD_OUT)):
            name = key.removeprefix(HELD_OUT)
            if "/" not in name:  # a name with / is the loss at a single time
                found[name if len(named) == 1 else f"{run_name}: {name}"] = _points(lines, key)
    return _figure(found, "held-out loss", log=True)


def _points_of(lines: Mapping[str, list[dict[str, Any]]], key: str) -> dict[str, list[tuple[float, float]]]:
    return {label: _points(own, key) for label, own in lines.items()}


def _points(lines: Iterable[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    found = [(line.get("images"), line.get(key)) for line in lines]
    return [(images, value) for images, value in found if _is_number(images) and _is_number(value)]


def _figure(
    found: dict[str, list[tuple[float, float]]], name: str, log: bool, always_labelled: bool = False
) -> str | None:
    """An SVG of curves of (images, value), by label; None without points. `log` needs positive values."""
    from jitscale.figures import figure  # noqa: PLC0415  # matplotlib belongs to an extra

    if not any(found.values()):
        return None
    buffer = io.StringIO()
    with figure(buffer, panels=1) as (axis,):
        for label, points in found.items():
            if points:
                marker = "o" if len(points) == 1 else None  # a line through one point is invisible
                plain = label.replace("$", r"\$")  # $ must not start a formula
                axis.plot(*zip(*points, strict=True), label=plain, linewidth=1, marker=marker, markersize=4)
        positive = all(value > 0 for points in found.values() for _, value in points)
        axis.set(xlabel="images seen", ylabel=name, yscale="log" if positive and log else "linear")
        if len(found) > 1 or always_labelled:
            axis.legend(fontsize=7)  # labels may be long paths
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]  # HTML does not take the XML prolog


def _named(runs: Sequence[Path]) -> dict[str, Path]:
    """The runs by the names of their folders, or by their whole paths if two have the same name."""
    resolved = list(dict.fromkeys(run.resolve() for run in runs))
    count = Counter(run.name for run in resolved)
    return {run.name if count[run.name] == 1 else str(run): run for run in resolved}


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _settings(run: Path) -> dict[str, Any]:
    """The settings of a run; empty if they cannot be read."""
    try:
        settings = yaml.safe_load((run / "config.yaml").read_text(errors="replace"))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key)
    return found if isinstance(found, dict) else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: int | None = None) -> str:
    """An HTML table of texts; row number `best` is marked."""
    lines = ["".join(f"<th>{html.escape(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    looks = ["", *(' class="best" title="the best setting"' if n == best else "" for n in range(len(rows)))]
    body = "".join(f"<tr{look}>{line}</tr>" for look, line in zip(looks, lines, strict=True))
    return f'<div class="wide"><table>{body}</table></div>'


def _image(content: bytes, kind: str, alternative: str, look: str = "") -> str:
    """An image embedded in the page."""
    encoded = base64.b64encode(content).decode()
    return f'<img class="{look}" alt="{alternative}" src="data:image/{kind};base64,{encoded}">'


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> str:
    """A number as text; empty if `value` is not a number."""
    if not _is_number(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: object) -> str:
    """A name, a number or an interval as text; empty for anything else."""
    if isinstance(value, list):
        return ":".join(map(_number, value))
    return _text(value) or _number(value)


def _sortable(value: object, otherwise: float) -> float:
    return value if _is_number(value) else otherwise


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
