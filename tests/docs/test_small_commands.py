"""The commands of all pages work in miniature, in the order of the page, unless they need a cluster or a network.

Of commands that differ in names alone the first one runs. Runs and shards lie ready (tests/support/page_miniature.py).
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitscale.errors import UserError
from tests.support.page_miniature import SMALL, SmallPage, Templates
from tests.support.page_running import run_shell
from tests.support.pages import blocks_of, commands_of, page_names, page_path

# Pages that other tests run whole, or that speak of the past.
ELSEWHERE = {"docs/own-images.md", "CHANGELOG.md"}
# Commands of programs in SMALL that are only parsed, and why.
HUB = "python tools/make_shards.py --input hub_data --split train --output /data/hub_256 --resolution 256 --codec webp"
NOT_SMALL = {
    HUB: "tests/preparation/test_hub.py packs Parquet files of the Hub",
    f"{HUB} --class-names wnids.txt": "tests/preparation/test_hub.py packs Parquet files of the Hub",
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates.make(tmp_path_factory.mktemp("templates"))


def failures_of(name: str, text: str, page: SmallPage, done: set[str]) -> list[str]:
    """Run the commands of the page `name` that are not among `done`; returns the failures."""
    failed = []
    for number, words in _commands(text):
        try:
            if words[:2] == ["python", "-c"]:
                small: list[str] | None = ["python", "-c", page.small_python(words[2])]
            else:
                small = None if shlex.join(words) in NOT_SMALL else page.small(words)
            if small and (same := but_for_names(small)) not in done:
                done.add(same)
                run_shell(f"{name}:{number}", small, page.folder)
        except (AssertionError, UserError) as error:
            failed.append(f"{name}:{number}: {shlex.join(words)}\n{error}")
    return failed


def _commands(text: str) -> Iterator[tuple[int, list[str]]]:
    """The words of each command of a page, with its line. A block of Python is a command."""
    for block in blocks_of(text):
        if block.language == "python":
            yield block.line, ["python", "-c", block.text]
        elif block.language in ("", "bash"):
            yield from ((line.number, shlex.split(line.text, comments=True)) for line in commands_of(block))


def but_for_names(words: list[str]) -> str:
    """A small command without names of folders and without the network's size."""
    command = " ".join(word for word in words if not word.startswith("run.dir="))
    return re.sub(r"configs/jit_[blhg]_", "configs/", re.sub(r"\b(runs|data)/[\w./-]+|(?<=--output )\S+", "X", command))


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The commands that have run."""
    return set()


@pytest.mark.parametrize("name", [page for page in page_names() if page not in ELSEWHERE])
def test_commands_work(name: str, templates: Templates, done: set[str], tmp_path: Path) -> None:
    failed = failures_of(name, page_path(name).read_text(), SmallPage(tmp_path, templates), done)
    assert not failed, "\n\n".join(["", *failed])


def test_pages_have_a_command_of_each_program() -> None:
    commands = [" ".join(words) for name in page_names() for _, words in _commands(page_path(name).read_text())]
    assert [program for program in SMALL if not any(program in command for command in commands)] == []
    assert [command for command in NOT_SMALL if command not in commands] == []


def test_a_command_that_fails_is_found(templates: Templates, tmp_path: Path) -> None:
    text = "```\npython tools/sample.py --checkpoint runs/a --weights ema_0.995 --output b\n```\n```python\nnone\n```\n"
    sample, python = failures_of("a.md", text, SmallPage(tmp_path, templates), set())
    assert sample.startswith("a.md:2: python tools/sample.py")
    assert "no weight set 'ema_0.995'" in sample
    assert python.startswith("a.md:4: python -c")
    assert "NameError" in python


def test_no_command_of_a_program_is_passed_over(templates: Templates, tmp_path: Path) -> None:
    train, page = "python -m jitscale.train", SmallPage(tmp_path, templates)
    text = f"```\n{train} --config mine.yaml\npython tools/sample.py --checkpoint b.safetensors --output c\n```\n"
    mine, sample = failures_of("a.md", text, page, set())
    assert "NOT_SMALL" in mine
    assert "b.safetensors: no earlier command" in sample
    orders = ("--print-config --config configs/jit_b_256.yaml", "--print-config --config=configs/jit_b_256.yaml")
    for order in orders:
        small = page.small([*train.split(), "data.shards=/d", *order.split()])
        assert small is not None
        assert "model.hidden_size=32" in small
