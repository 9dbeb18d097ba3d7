"""Runs the commands of a page of the documentation in order, as its reader would.

A page's fenced blocks are commands (no language, or bash), Python to run (python), or what a command prints (text).
Nothing on a page is passed over: a block of another language, or a command that a test does not run, must be named.
"""

import re
import shlex
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT
from tests.support.forking import Process

CHECKOUT = ("configs", "docs", "jitscale", "tools")  # what commands of pages name besides their own files
LONGEST = 60  # seconds of a command
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int  # of the page, from 1 on
    language: str  # empty: none is given
    text: str


@dataclass(frozen=True)
class Miniature:
    """How a test changes the commands of a page, so that they end in seconds."""

    smaller: Mapping[str, str] = field(default_factory=dict)  # text of a command, and what stands there instead
    left_out: Mapping[str, str] = field(default_factory=dict)  # a command, or a block's first line, and why


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found = _FENCE.finditer(page)
    return [Block(page[: f.start()].count("\n") + 1, f["language"], textwrap.dedent(f["text"])) for f in found]


def run_page(page: Path, folder: Path, miniature: Miniature) -> list[str]:
    """Run every command of `page` in `folder`, which begins with links to the checkout; returns what they printed.

    Fails at a command that fails, a block that is neither run nor named, and a substitution that changes nothing.
    """
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    unused = {*miniature.smaller, *miniature.left_out}
    printed = []
    for line, command in _commands(page, miniature, unused):
        for text, smaller in miniature.smaller.items():
            if text in command:
                unused.discard(text)
                command = command.replace(text, smaller)  # noqa: PLW2901 (each changes what the one before left)
        started = time.perf_counter()
        code, output = _run(command, folder)
        place = f"{page.name}:{line}"
        assert code == 0, f"{place}: {command}\nended with code {code}:\n{output}"
        print(f"{place}: {time.perf_counter() - started:.1f} s: {command}")  # which pytest shows where a test fails
        printed.append(output)
    assert not unused, f"{page.name}: no command has {', '.join(sorted(unused))}: correct the test's table"
    return printed


def _commands(page: Path, miniature: Miniature, unused: set[str]) -> Iterator[tuple[int, str]]:
    """Each command with its line on the page, those that are left out excepted."""
    for line, language, text in blocks_of(page.read_text()):
        place, first = f"{page.name}:{line}", text.partition("\n")[0]
        if language == "text":
            assert not re.search(r"^(\$ |python |make )", text, re.MULTILINE), f"{place}: a command that is not run"
        elif language == "python":
            yield line, shlex.join(["python", "-c", text])
        elif language in ("", "bash"):
            for each in text.replace("\\\n", " ").splitlines():
                command = shlex.join(shlex.split(each, comments=True))
                if command in miniature.left_out:
                    unused.discard(command)
                elif command:
                    yield line, command
        else:
            assert first in miniature.left_out, f"{place}: a block of {language} is neither run nor left out"
            unused.discard(first)


def _run(command: str, folder: Path) -> tuple[int, str]:
    words = shlex.split(command)
    if words[0] != "python":
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False)
        return done.returncode, done.stdout + done.stderr
    process = Process(words[1:], cwd=folder)
    try:
        output, _ = process.communicate(timeout=LONGEST)
    finally:
        process.kill()
    return process.wait(), output
