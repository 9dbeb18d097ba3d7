"""Reports of a final evaluation: a table of all settings, and a figure over guidance."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from jitscale.tracking import distance_of, distance_title, sweep_lines

logger = logging.getLogger(__name__)

METRICS = ("fid", "sfid", "inception_score", "kid", "precision", "recall", "label_agreement")
FURTHER = ("fd_", "kd_")  # prefixes of metrics whose names end with the network's name


def table_of(result: dict[str, Any]) -> str:
    """The rows of `result["table"]`, the best one last; then the metrics of the best one, with their floors."""
    fewest, distance = min(row["num_images"] for row in result["table"]), distance_of(result)
    rows = sorted(result["table"], key=lambda row: (row["num_images"] > fewest, -row[distance]))
    internal = any(row["internal_guidance"] != 1.0 for row in rows)
    inner = f"{'internal':>14}{'guidance':>10}" if internal else ""
    score = f"{'IS':>10}" if "inception_score" in rows[0] else ""
    lines = [f"{'weights':16}{'interval':>14}{'guidance':>10}{inner}{'images':>9}{distance_title(distance):>12}{score}"]
    for row in rows:
        setting = f"{row['weights']:16}{_interval(row['guidance_interval']):>14}{row['guidance_scale']:10g}"
        if internal:
            setting += f"{_interval(row['internal_interval']):>14}{row['internal_guidance']:10g}"
        scored = f"{row['inception_score']:10.2f}" if score else ""
        lines.append(f"{setting}{row['num_images']:9}{row[distance]:12.3f}{scored}")
    best = result["best"]
    inner = f"internal guidance {best['internal_guidance']:g}, " if internal else ""
    lines.append(f"best: {best['weights']}, guidance {best['guidance_scale']:g}, {inner}{result['num_images']} images")
    further = [key for key in result if key.startswith(FURTHER) and not key.endswith(("_floor", "_std"))]
    for key in (key for key in (*METRICS, *further) if key in result):
        floor = result.get(f"{key}_floor")
        said = "" if floor is None else f"   (real half against real half: {floor:.4g})"
        lines.append(f"  {key:18}{result[key]:.6g}{said}")
    return "\n".join(lines)


def _interval(interval: Sequence[float]) -> str:
    return ":".join(f"{t:g}" for t in interval)


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """Draw the distance and perhaps the IS over guidance, with a line for each combination of the other settings.

    Without matplotlib, a warning is logged instead.
    """
    if find_spec("matplotlib") is None:
        logger.warning("%s is not drawn: matplotlib is not installed (pip install 'jitscale[demo]')", path)
        return
    from jitscale.figures import MARKERS, figure  # noqa: PLC0415  # matplotlib belongs to an extra

    fewest = min(row["num_images"] for row in result["table"])
    precise = [row for row in result["table"] if row["num_images"] > fewest]
    along, lines = sweep_lines(result["table"])
    path.parent.mkdir(parents=True, exist_ok=True)
    distance = distance_of(result)
    shown = {distance: distance_title(distance), "inception_score": "IS"}
    shown = {key: name for key, name in shown.items() if key in result["table"][0]}
    with figure(path, panels=len(shown)) as panels:
        for axis, (key, name) in zip(panels, shown.items(), strict=True):
            for (label, rows), marker in zip(lines.items(), cycle(MARKERS), strict=False):
                points = [(row[along], row[key]) for row in rows]
                axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
            if precise:
                scales = [row[along] for row in precise]
                axis.plot(scales, [row[key] for row in precise], "k*", label=f"{precise[0]['num_images']} images")
            axis.set(xlabel=along.replace("_", " "), ylabel=name, title=f"{name}, {fewest} images each")
        panels[0].legend()
