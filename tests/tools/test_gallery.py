"""The page about a run is complete in one file, whatever files the run has so far."""

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jitscale.config import Config, to_yaml
from jitscale.errors import CheckpointError, UserError
from jitscale.evaluation.report import draw_sweep
from jitscale.evaluation.sweep import TRIED
from jitscale.preparation.array_shards import write_shards
from jitscale.tracking import BEST_SAMPLES, SAMPLES, Tracker
from tests.support.pictures import numbered
from tools.gallery import curves, data, main, sweep

MARKER = 'stroke: #0072b2"/>\n    </defs>'  # the marker of a single point in the first colour


class Page(HTMLParser):
    """Counts the elements of a page, and collects its references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


def run(folder: Path) -> Path:
    config = Config()
    config.run.dir, config.tracking.name, config.evaluation.features = str(folder), "a<b", "digits"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    tracker = Tracker(config, folder, True, 0)
    for step in range(1, 30):
        tracker.log({"step": step, "images": 8 * step, "loss": 1 / step, "lr": 1e-3, "grad_norm": 1.0})
        if step % 2 == 0:
            tracker.log_image(SAMPLES, np.full((16, 16, 3), step, np.uint8), 8 * step)
        if step % 10 == 0:
            result = {"fid": 100 / step, "inception_score": 2.0, "num_images": 5000, "protocol": {"weights": "model"}}
            tracker.log_few(result, step, 8 * step)
    tracker.close()
    return folder


def test_the_page_of_a_run(tmp_path: Path) -> None:
    folder = run(tmp_path / "first")
    best = {"weights": "ema_0.9999", "guidance_scale": 2.0, "guidance_interval": [0, 1]}
    rows = [
        {**best, "guidance_scale": w, "fid": w, "inception_score": w, "num_images": count}
        for w, count in ((1.0, 200), (2.0, 200), (2.0, 50_000))
    ]
    result = {
        "best": best,
        "fid": 3.25,
        "fid_floor": 0.5,
        "inception_score": 9.0,
        "num_images": 50_000,
        "table": rows,
        "protocol": {"features": "digits"},
    }
    (folder / "result.json").write_text(json.dumps(result))
    draw_sweep(result, folder / "sweep.svg")
    tracker = Tracker(Config(), folder, True, None)
    tracker.log_image(BEST_SAMPLES, np.zeros((16, 16, 3), np.uint8), 232)
    tracker.close()
    assert main([str(folder)]) == 0
    text = (folder / "gallery.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 5, "the curves are loss, gradient norm, learning rate, FID, IS"
    assert page.tags.count("img") == 9, "the best samples, every second one of 14 pictures, and the sweep"
    assert "<title>" in text
    assert "fid 5k" in text, "the number of images distinguishes it from FID-50K"
    assert "2-norm of the whole gradient before clipping" in text, "the explanation of a curve stands below it"
    assert "224 images" in text, "the newest picture is shown"
    assert all(reference.startswith(("data:", "#")) for reference in page.references), "the page needs no other file"
    assert "<!-- digits, model, 5,000 images -->" in text, (
        "the network, the weights and the images stand next to every distance"
    )
    assert ", ".join(re.findall(r"<td>([^<]*)</td>", text)[i] for i in (1, 2, 5)) == "digits, ema_0.9999, 50,000", (
        "the network, the weights and the images stand next to every distance"
    )
    assert {"3.25", "0.5", "50,000", "ema_0.9999", "2"} <= set(re.findall(r"<td>([^<]*)</td>", text))
    assert "a&lt;b" in text
    assert "a<b" not in text


def test_several_runs_and_a_run_without_results(tmp_path: Path) -> None:
    folder, empty = run(tmp_path / "first"), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("run: {}\n")
    assert main([str(folder), str(empty), "--output", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text().count("<h2>Samples: ") == 2
    assert main([str(empty)]) == 0
    with pytest.raises(CheckpointError, match="no run there"):
        main([str(tmp_path / "absent")])


def bare(folder: Path) -> Path:
    """A run that has written only its settings."""
    folder.mkdir()
    (folder / "config.yaml").write_text("run: {}\n")
    return folder


def swept(folder: Path, scales: int) -> list[dict[str, Any]]:
    """Write a sweep into a run's result: every guidance scale, half of them with internal guidance, then the best one.

    Returns the rows without the best one.
    """
    row = {"weights": "ema_0.9", "guidance_interval": [0.1, 1.0], "internal_interval": [0.0, 0.8], "num_images": 100}
    rows = [
        {**row, "guidance_scale": 1 + n / 4, "internal_guidance": 1 + n % 2 / 2, "fid": 9.0 - n, "inception_score": 2.0}
        for n in range(scales)
    ]
    best = {**rows[-1], "num_images": 1000, "fid": 2.5}
    tried = {key: best[key] for key in TRIED}
    result = {"best": tried, "fid": 2.5, "num_images": 1000, "table": [*rows, best], "protocol": {"features": "digits"}}
    (folder / "result.json").write_text(json.dumps(result))
    return rows


def cells_of(text: str) -> list[list[str]]:
    """The cells of every row of a table."""
    return [re.findall(r"<t[dh]>([^<]*)</t[dh]>", row) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", text)]


def test_the_sweep_is_a_table_with_the_best_setting_marked(tmp_path: Path) -> None:
    folder = bare(tmp_path / "first")
    (folder / "config.yaml").write_text('evaluation: {sweep: ["guidance=1:4:0.25", "internal=1,1.5"]}\n')
    rows = swept(folder, 4)
    text = sweep(folder)
    head, best, *others = cells_of(text)
    intervals, guidances = ["guidance interval", "internal interval"], ["guidance scale", "internal guidance"]
    assert head == ["weights", guidances[0], intervals[0], guidances[1], intervals[1], "images", "FID", "IS"]
    assert best == ["ema_0.9", "1.75", "0.1:1", "1.5", "0:0.8", "1,000", "2.5", "2"]
    assert re.findall(r'<tr class="best"[^>]*><td>.*?<td>1,000</td>', text), "only the best row is marked"
    assert text.count('class="best"') == 1
    assert [row[6] for row in others] == ["6", "7", "8", "9"], "the smallest distance comes first"
    assert "guidance=1:4:0.25, internal=1,1.5" in text
    assert "<details>" not in text
    swept(folder, 14)
    text = sweep(folder)
    assert "<summary>5 further settings</summary>" in text
    assert len(cells_of(text)) == 1 + 10 + 1 + 5
    result = json.loads((folder / "result.json").read_text())
    plain = [{**row, "internal_guidance": 1.0} for row in rows]
    dino = [
        {"fd_dinov2": row["fid"], **{k: v for k, v in row.items() if k not in ("fid", "inception_score")}}
        for row in plain
    ]
    result = {"best": result["best"], "fd_dinov2": 1.0, "table": dino}
    (folder / "result.json").write_text(json.dumps(result))
    head, *_ = cells_of(sweep(folder))
    assert head == ["weights", "guidance scale", "guidance interval", "images", "FD dinov2"]
    hostile = [7, {"weights": HOSTILE, "fid": [HOSTILE], "num_images": "x"}, {"guidance_interval": [HOSTILE, 1]}]
    (folder / "result.json").write_text(json.dumps({"table": hostile, "best": HOSTILE}))
    assert "<script" not in sweep(folder)
    (folder / "result.json").write_text(json.dumps({"table": rows[:1], "best": rows[0]}))
    assert sweep(folder) == "", "one setting makes no sweep"


def test_the_data_is_shown_as_a_contact_sheet_or_a_reason(tmp_path: Path) -> None:
    """Runs that read the same shards share one contact sheet."""
    write_shards(numbered(40, size=8) + 60, np.arange(40) % 4, tmp_path / "shards_8")
    folders = [bare(tmp_path / name) for name in ("first", "second", "third")]
    for folder in folders[:2]:
        shards = f"data: {{shards: '{tmp_path}/shards_{{resolution}}'}}\nmodel: {{image_size: 8}}\n"
        (folder / "config.yaml").write_text(shards)
    assert main([*map(str, folders)]) == 0
    text = (folders[0] / "gallery.html").read_text()
    assert text.count('class="sheet"') == 1
    assert "<h2>Data: first, second</h2>" in text
    assert f"40 images, 4 classes: {tmp_path / 'shards_8'}" in text
    assert "no contact sheet: the settings name no data.shards" in text
    (encoded,) = re.findall(r'class="sheet".*?base64,([^"]*)"', text)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"))
    assert {tuple(colour) for colour in sheet[::4, ::4].reshape(-1, 3)} >= {(60 + n, 60, 60) for n in range(40)}
    (tmp_path / "shards_8/manifest.json").unlink()
    assert "has no manifest; tools/index_shards.py writes one" in data(str(tmp_path / "shards_8"))
    assert "no contact sheet: s3://bucket/x: is remote, but only local folders" in data("s3://bucket/x")
    assert "&lt;script&gt;" in data(f"/{HOSTILE}")
    assert "<script>" not in data(f"/{HOSTILE}")


HOSTILE = "<script>alert('seen')</script>"


def test_no_script_in_a_runs_files_can_run(tmp_path: Path) -> None:
    """The files hold scripts in pictures, names and numbers. A value that is not a number is left out."""
    folder = run(tmp_path / "a $x$ & <b>")
    (folder / "sweep.svg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'>{HOSTILE}</svg>")
    (folder / "config.yaml").write_text(f'evaluation: {{features: "{HOSTILE}"}}\nrun: {HOSTILE}\n')
    best = {"weights": HOSTILE, "guidance_scale": HOSTILE}
    result = {"best": best, "fid": HOSTILE, "kid": [1], "precision": None, "num_images": 10**400, "recall": True}
    (folder / "result.json").write_text(json.dumps({**result, "protocol": {"features": HOSTILE}, "inception_score": 2}))
    (folder / SAMPLES / f"{HOSTILE[:8]}.png").write_bytes(b"")
    with (folder / "evaluations.jsonl").open("a") as file:
        for line in ({"fid_5k": HOSTILE}, {"fid_5k": None}, {"fid_5k": [1]}, {"weights": HOSTILE, "fid_5k": 1.5}):
            file.write(json.dumps({"step": 30, "images": 240, **line}) + "\n")
        file.write(json.dumps({"step": 30, "images": "many", "fid_5k": 1.5, "weights": ["model"]}) + "\n")
    assert main([str(folder)]) == 0
    text = (folder / "gallery.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "onload" not in text, "the sweep is embedded as an image"
    assert text.count("data:image/svg+xml;base64,") == 1
    cells = re.findall(r"<td>([^<]*)</td>", text)
    escaped = "&lt;script&gt;alert(&#x27;seen&#x27;)&lt;/script&gt;"
    assert cells == ["a $x$ &amp; &lt;b&gt;", escaped, escaped, "", "", "", "", "2", "", "", ""]


@pytest.mark.parametrize("content", [b"[1]", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_an_unreadable_result_is_reported(tmp_path: Path, content: bytes) -> None:
    folder = bare(tmp_path / "first")
    (folder / "result.json").write_bytes(content)
    assert main([str(folder)]) == 0
    assert "result.json cannot be read: first" in (folder / "gallery.html").read_text()


def test_parts_of_a_wrong_type_are_left_out(tmp_path: Path) -> None:
    folder = bare(tmp_path / "first")
    (folder / "result.json").write_text(json.dumps({"best": None, "protocol": "inception", "fid": 2.5}))
    assert main([str(folder)]) == 0
    assert re.findall(r"<td>([^<]*)</td>", (folder / "gallery.html").read_text()) == [
        "first",
        "",
        "",
        "",
        "",
        "",
        "2.5",
    ]


def test_a_single_point_is_drawn(tmp_path: Path) -> None:
    """A line needs two points. A single point is a marker, which matplotlib's SVG uses once."""
    folder = bare(tmp_path / "first")
    (folder / "evaluations.jsonl").write_text('{"step": 1, "images": 8, "fid_5k": 3.0, "weights": "model"}\n')
    one = curves({"first": folder})
    assert "<!-- model, ? images -->" in one
    assert MARKER in one
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"step": 2, "images": 16, "fid_5k": 3.0, "weights": "model"}\n')
    assert MARKER not in curves({"first": folder})


def test_runs_with_the_same_name_keep_their_curves(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        run(tmp_path / parent / "same")
    output = tmp_path / "both.html"
    assert main([str(tmp_path / "a/same"), str(tmp_path / "b/same"), "--output", str(output)]) == 0
    assert all(f"<!-- {tmp_path / parent / 'same'} -->" in output.read_text() for parent in ("a", "b"))


def test_an_unwritable_file_is_a_one_line_error(tmp_path: Path) -> None:
    folder = run(tmp_path / "first")
    with pytest.raises(UserError, match=r"metrics\.jsonl: .*; see to its permissions and room"):
        main([str(folder), "--output", str(folder / "metrics.jsonl" / "page.html")])


def test_held_out_losses_are_one_figure_with_a_curve_for_each_set(tmp_path: Path) -> None:
    folder, other = run(tmp_path / "first"), run(tmp_path / "other")
    assert main([str(folder)]) == 0
    before = (folder / "gallery.html").read_text()
    assert "held-out" not in before
    tracker = Tracker(Config(), folder, True, None)
    for images in (80, 160, 240):
        values = {"held_out/model": 1 / images, "held_out/model/t0.0625": 3.0, "held_out/ema_0.9": None}
        tracker.log({"step": images // 8, "images": images, "held_out_samples": 5, **values})
    tracker.log({"step": 31, "images": 248, "held_out/model": 0.1, "held_out/ema_0.9": 0.2})
    tracker.close()
    assert main([str(folder)]) == 0
    text = (folder / "gallery.html").read_text()
    assert text.count("<svg") == before.count("<svg") + 1
    for label in ("held-out loss", "model", "ema_0.9"):
        assert f"<!-- {label} -->" in text
    assert "t0.0625" not in text
    assert main([str(folder), str(other)]) == 0
    assert "<!-- first: ema_0.9 -->" in (folder / "gallery.html").read_text()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_shows_the_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "first")
    assert main([str(folder)]) == 0
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"]
    shot = [f"--screenshot={tmp_path / 'page.png'}", f"file://{folder / 'gallery.html'}"]
    subprocess.run([*command, *shot], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    blue = (np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)) < 30).all(axis=2)
    assert blue.sum() > 200, "the colour of the curves must be visible"
    assert (pixels < 250).any(axis=2).any(axis=1).mean() > 0.5, "the page must be filled from top to bottom"
