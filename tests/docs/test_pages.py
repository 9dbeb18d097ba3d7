"""Every command of these pages works, in miniature, in the order of the page."""

import json
import re
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.pages import Block, Miniature, blocks_of, run_page

OWN_IMAGES = Miniature(
    smaller={
        "make_pictures.py": "make_pictures.py --count 240 --resolution 20",
        "128": "16",
        "train --config runs/letters.yaml run.max_images=512000": "train --config runs/letters.yaml run.max_images=1280",
    }
)


def test_own_images(tmp_path: Path) -> None:
    printed = run_page(ROOT / "docs/own-images.md", tmp_path, OWN_IMAGES)
    assert printed


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
    with pytest.raises(AssertionError, match=r"page.md:9: cat one\n *ended with code 1:\n *cat: one: No such file"):
        run(PAGE, "b")
    with pytest.raises(AssertionError, match="no command has four"):
        run(sound, "c", smaller={"four": "4"})
    with pytest.raises(AssertionError, match="page.md:2: a block of yaml is neither run nor left out"):
        run("\n```yaml\na: 1\n```\n", "d")
    assert run("\n```yaml\na: 1\n```\n```\necho 1\nmake it\n```\n", "e", left_out={"a: 1": "x", "make it": "y"}) == ["1\n"]
    with pytest.raises(AssertionError, match="page.md:2: a command that is not run"):
        run("\n```text\npython -m jitscale.train\n```\n", "f")
