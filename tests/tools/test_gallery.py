"""The page about a run: complete in one file, whatever the run has so far."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jitscale.config import Config, to_yaml
from jitscale.errors import CheckpointError
from jitscale.evaluation.report import draw_sweep
from jitscale.tracking import BEST_SAMPLES, SAMPLES, Tracker
from tools.gallery import main


class Page(HTMLParser):
    """Counts elements, and remembers what it refers to."""

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
    config.run.dir, config.tracking.name = str(folder), "a<b"
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
    result = {"best": best, "fid": 3.25, "fid_floor": 0.5, "inception_score": 9.0, "num_images": 50_000, "table": rows}
    (folder / "result.json").write_text(json.dumps(result))
    draw_sweep(result, folder / "sweep.svg")
    tracker = Tracker(Config(), folder, True, None)
    tracker.log_image(BEST_SAMPLES, np.zeros((16, 16, 3), np.uint8), 232)
    tracker.close()
    assert main([str(folder)]) == 0
    text = (folder / "gallery.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 6, "loss, gradient norm, learning rate, FID, IS, sweep"
    assert page.tags.count("img") == 8, "the best ones; 14 pictures, every second one"
    assert "<title>" in text
    assert "fid 5k" in text, "nobody takes it for FID-50K"
    assert "224 images" in text, "the newest"
    assert all(reference.startswith(("data:", "#")) for reference in page.references), "nothing lies elsewhere"
    assert {"3.25", "0.5", "50,000", "ema_0.9999", "2"} <= set(re.findall(r"<td>([^<]*)</td>", text))
    assert "a&lt;b" in text
    assert "a<b" not in text


def test_several_runs_and_a_run_that_has_nothing_yet(tmp_path: Path) -> None:
    folder, empty = run(tmp_path / "first"), tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("run: {}\n")
    assert main([str(folder), str(empty), "--output", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text().count("<h2>Samples: ") == 2
    assert main([str(empty)]) == 0
    with pytest.raises(CheckpointError, match="no run there"):
        main([str(tmp_path / "absent")])


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
def test_a_browser_shows_it(tmp_path: Path) -> None:
    folder = run(tmp_path / "first")
    assert main([str(folder)]) == 0
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400"]
    shot = [f"--screenshot={tmp_path / 'page.png'}", f"file://{folder / 'gallery.html'}"]
    subprocess.run([*command, *shot], check=True, capture_output=True, timeout=60)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    blue = (np.abs(pixels.astype(int) - (0x00, 0x72, 0xB2)) < 30).all(axis=2)
    assert blue.sum() > 200, "the curves' colour"
    assert (pixels < 250).any(axis=2).any(axis=1).mean() > 0.5, "drawn from top to bottom"
