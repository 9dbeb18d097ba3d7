"""Every command of these pages works, in miniature, in the order of the page."""

import json
import re
from pathlib import Path

import pytest

from jitscale.data.manifest import Manifest
from jitscale.planner.starting import Machine, Pictures, as_yaml, starting_lines
from jitscale.preparation.glyphs import GLYPH_CLASSES
from tests.support import ROOT
from tests.support.page_running import Miniature, run_page
from tests.support.pages import Block, blocks_of

SHORT = "run.max_images=64 data.batch_size=16 model.depth=3 evaluation.steps=2 evaluation.num_images=20"
OFTEN = "checkpoint.every_images=32 evaluation.grid_every_images=32 evaluation.held_out_every_images=64"
OWN_IMAGES = Miniature(
    smaller={
        "make_pictures.py": "make_pictures.py --count 240 --resolution 40",
        "128": "32",
        "--config runs/letters.yaml": f"--config runs/letters.yaml {SHORT} {OFTEN} evaluation.block_size=8",
        "run.max_images=256000": "run.max_images=128",
    },
    left_out={
        "make install": "the tests run in an environment",
        "source .venv/bin/activate": "the tests run in an environment",
    },
)


def test_own_images(tmp_path: Path) -> None:
    """The commands of the page run, and each leaves the files that the page says."""
    page = (ROOT / "docs/own-images.md").read_text()
    run_page(ROOT / "docs/own-images.md", tmp_path, OWN_IMAGES)
    assert (tmp_path / "runs/pictures/letters/B/000001.png").exists()
    manifest = Manifest.read(tmp_path / "runs/shards/letters_32/manifest.json")
    assert (manifest.total, manifest.class_names, manifest.resolution) == (240, GLYPH_CLASSES, 32)
    run = tmp_path / "runs/letters"
    assert {path.name for path in (run / "samples").iterdir()} == {
        f"images_{images:012d}.png" for images in (32, 64, 96, 128)
    }
    assert len(list((run / "drawn").glob("class_*.png"))) == 16
    (result,) = (json.loads(path.read_text()) for path in (run / "results").iterdir())
    assert (result["num_images"], result["protocol"]["features"]) == (20, "glyphs")
    for file in re.findall(r"`(runs/\S+\.(?:png|html|json|yaml))`", page):
        assert (tmp_path / file).exists(), file


def test_the_configuration_that_the_page_shows_is_that_of_its_pictures() -> None:
    """The page's pictures at the page's size: lines that it shows, and numbers that it says."""
    lines = starting_lines(Pictures("runs/shards/letters_128", 3000, 10, 128), Machine(0), "runs/letters")
    written = as_yaml(lines, "")
    shown = [block.text for block in blocks_of((ROOT / "docs/own-images.md").read_text()) if "ema:" in block.text]
    assert len(shown) == 1
    assert shown[0] in written


PAGE = """
```
echo one \\
  two   # a comment
```

1. In a list:

   ```bash
   cat one
   ```

```text
one two
```

```python
print(6 * 7)
```
"""


def test_blocks_are_found_wherever_they_stand() -> None:
    assert blocks_of(PAGE)[1] == Block(9, "bash", "cat one\n")
    assert [block.language for block in blocks_of(PAGE)] == ["", "bash", "text", "python"]


def test_a_page_is_run_in_order_and_nothing_of_it_is_passed_over(tmp_path: Path) -> None:
    def run(page: str, folder: str, **tables: dict[str, str]) -> list[str]:
        (tmp_path / folder).mkdir()
        (tmp_path / "page.md").write_text(page)
        return run_page(tmp_path / "page.md", tmp_path / folder, Miniature(**tables))

    sound = PAGE.replace("cat one", "echo three")
    assert run(sound, "a", smaller={"three": "3"}) == ["one two\n", "3\n", "42\n"]
    with pytest.raises(AssertionError, match=r"page.md:10: cat one\n *ended with code 1:\n *cat: one: No such file"):
        run(PAGE, "b")
    with pytest.raises(AssertionError, match="no command has four"):
        run(sound, "c", smaller={"four": "4"})
    with pytest.raises(AssertionError, match=r"page.md:2: a block of yaml is neither run nor left out"):
        run("\n```yaml\na: 1\n```\n", "d")
    assert run("\n```yaml\na: 1\n```\n```\necho 1\nmake it\n```\n", "e", left_out={"a: 1": "x", "make it": "y"}) == [
        "1\n"
    ]
    with pytest.raises(AssertionError, match=r"page.md:2: a command that is not run"):
        run("\n```text\npython -m jitscale.train\n```\n", "f")
