"""A final evaluation for people: a table of all settings, and a figure over guidance."""

import logging
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS = ("fid", "sfid", "inception_score", "kid", "precision", "recall", "label_agreement")


def table_of(result: dict[str, Any]) -> str:
    """The rows of `result["table"]`, the best one last, and the metrics of that one with their floors."""
    fewest = min(row["num_images"] for row in result["table"])
    rows = sorted(result["table"], key=lambda row: (row["num_images"] > fewest, -row["fid"]))
    lines = [f"{'weights':16}{'interval':>14}{'guidance':>10}{'images':>9}{'FID':>12}{'IS':>10}"]
    for row in rows:
        interval = ":".join(f"{t:g}" for t in row["guidance_interval"])
        setting = f"{row['weights']:16}{interval:>14}{row['guidance_scale']:10g}{row['num_images']:9}"
        lines.append(f"{setting}{row['fid']:12.3f}{row['inception_score']:10.2f}")
    best = result["best"]
    lines.append(f"best: {best['weights']}, guidance {best['guidance_scale']:g}, {result['num_images']} images")
    further = [key for key in result if key.startswith("fd_") and not key.endswith("_floor")]
    for key in (key for key in (*METRICS, *further) if key in result):
        floor = result.get(f"{key}_floor")
        said = "" if floor is None else f"   (real half against real half: {floor:.4g})"
        lines.append(f"  {key:18}{result[key]:.6g}{said}")
    return "\n".join(lines)


def draw_sweep(result: dict[str, Any], path: Path) -> None:
    """FID and IS over guidance, a line for each weight set and interval; without matplotlib, it warns."""
    if find_spec("matplotlib") is None:
        logger.warning("%s is not drawn: matplotlib is not installed (pip install 'jitscale[demo]')", path)
        return
    from jitscale.figures import MARKERS, figure  # noqa: PLC0415  # matplotlib belongs to an extra

    fewest = min(row["num_images"] for row in result["table"])
    precise = [row for row in result["table"] if row["num_images"] > fewest]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in result["table"]:
        if row["num_images"] == fewest:
            low, high = row["guidance_interval"]
            lines.setdefault(f"{row['weights']}, {low:g} to {high:g}", []).append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    with figure(path, panels=2) as panels:
        for axis, key, name in zip(panels, ("fid", "inception_score"), ("FID", "IS"), strict=True):
            for (label, rows), marker in zip(lines.items(), cycle(MARKERS), strict=False):
                points = sorted((row["guidance_scale"], row[key]) for row in rows)
                axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
            if precise:
                scales = [row["guidance_scale"] for row in precise]
                axis.plot(scales, [row[key] for row in precise], "k*", label=f"{precise[0]['num_images']} images")
            axis.set(xlabel="guidance scale", ylabel=name, title=f"{name}, {fewest} images each")
        panels[0].legend(fontsize=7)
