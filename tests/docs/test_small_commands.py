"""The commands of all pages work in miniature, each page's in its order: as far as they need no cluster and no network.

Of commands that differ in names alone the first one runs. Runs and shards lie ready (tests/support/page_miniature.py).
"""

import re
import shlex
from pathlib import Path

import pytest

from tests.support.page_miniature import SMALL, SmallPage, Templates
from tests.support.page_running import run_shell
from tests.support.pages import blocks_of, commands_of, page_names, page_path

# Pages that other tests run whole, or that speak of the past.
ELSEWHERE = {"docs/own-images.md", "CHANGELOG.md"}
# Commands that do not become small, and why.
NOT_SMALL: dict[str, str] = {}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates.make(tmp_path_factory.mktemp("templates"))


def run_small(name: str, text: str, page: SmallPage, done: set[str]) -> None:
    """Run the commands of the page `name`, which are not among the ones that are `done`."""
    for block in blocks_of(text):
        if block.language == "python":
            run_shell(f"{name}:{block.line}", ["python", "-c", page.small_python(block.text)], page.folder)
        for line in commands_of(block) if block.language in ("", "bash") else []:
            words = shlex.split(line.text, comments=True)
            small = None if shlex.join(words) in NOT_SMALL else page.small(words)
            if small and (same := but_for_names(small)) not in done:
                done.add(same)
                run_shell(f"{name}:{line.number}", small, page.folder)


def but_for_names(words: list[str]) -> str:
    """A small command without what changes nothing but the place: names of folders, and the network's size."""
    command = " ".join(word for word in words if not word.startswith("run.dir="))
    return re.sub(r"configs/jit_[blhg]_", "configs/", re.sub(r"\b(runs|data)/[\w./-]+|(?<=--output )\S+", "X", command))


def test_commands_work(templates: Templates, tmp_path: Path) -> None:
    done: set[str] = set()
    for number, name in enumerate(page for page in page_names() if page not in ELSEWHERE):
        folder = tmp_path / str(number)
        folder.mkdir()
        run_small(name, page_path(name).read_text(), SmallPage(folder, templates), done)
    commands = " ".join(done)
    assert [program for program in SMALL if program not in commands] == [], "no page has a command of these"


def test_a_command_that_fails_is_found(templates: Templates, tmp_path: Path) -> None:
    page = SmallPage(tmp_path, templates)
    with pytest.raises(AssertionError, match=r"(?s)a.md:2: python tools/sample.py .*no weight set 'ema_0.5'"):
        run_small(
            "a.md", "```\npython tools/sample.py --checkpoint runs/a --weights ema_0.5 --output b\n```\n", page, set()
        )
    with pytest.raises(AssertionError, match=r"(?s)a.md:1: .*NameError"):
        run_small("a.md", "```python\nnone\n```\n", page, set())
