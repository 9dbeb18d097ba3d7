"""Runs the commands of a page of the documentation in order, as its reader would.

Nothing on a page is skipped silently: a block of another language, or a command that a test skips, must be named.
"""

import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import ROOT
from tests.support.forking import Process
from tests.support.pages import blocks_of, commands_of, holds_commands

CHECKOUT = ("configs", "docs", "jitscale", "tools")  # folders that commands of pages name besides their own files
LONGEST = 60  # seconds of a command


@dataclass(frozen=True)
class Miniature:
    """How a test changes the commands of a page, so that they end in seconds."""

    smaller: Mapping[str, str] = field(default_factory=dict)  # text of a command, and its replacement
    left_out: Mapping[str, str] = field(default_factory=dict)  # a command, or a block's first line, and why


def run_page(page: Path, folder: Path, miniature: Miniature) -> list[str]:
    """Run every command of `page` in `folder`, which begins with links to the checkout; returns their outputs.

    Fails at a command that fails, a block that is neither run nor named, and a substitution that changes nothing.
    """
    link_checkout(folder)
    unused = {*miniature.smaller, *miniature.left_out}
    printed = []
    for line, command in _commands(page, miniature, unused):
        for text, smaller in miniature.smaller.items():
            if text in command:
                unused.discard(text)
                command = command.replace(text, smaller)  # noqa: PLW2901 (each changes the result of the one before)
        printed.append(run_shell(f"{page.name}:{line}", shlex.split(command), folder))
    assert not unused, f"{page.name}: no command has {', '.join(sorted(unused))}: correct the test's table"
    return printed


def link_checkout(folder: Path) -> None:
    """Give `folder` links to the folders of the checkout that commands of pages name."""
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)


def run_shell(place: str, words: list[str], folder: Path) -> str:
    """Run a command in `folder`; returns its output. Fails if the command fails, and says its `place`."""
    started = time.perf_counter()
    command = shlex.join(words)
    code, output = _run(words, folder)
    assert code == 0, f"{place}: {command}\nended with code {code}:\n{output}"
    print(f"{place}: {time.perf_counter() - started:.1f} s: {command}")  # which pytest shows where a test fails
    return output


def _commands(page: Path, miniature: Miniature, unused: set[str]) -> Iterator[tuple[int, str]]:
    """Each command with its line on the page, those that are left out excepted."""
    for block in blocks_of(page.read_text()):
        place, first = f"{page.name}:{block.line}", block.text.partition("\n")[0]
        if block.language == "text":
            assert not holds_commands(block.text), f"{place}: a command that is not run"
        elif block.language == "python":
            yield block.line, shlex.join(["python", "-c", block.text])
        elif block.language in ("", "bash"):
            for line, text in commands_of(block):
                command = shlex.join(shlex.split(text, comments=True))
                if command in miniature.left_out:
                    unused.discard(command)
                else:
                    yield line, command
        else:
            assert first in miniature.left_out, f"{place}: a block of {block.language} is neither run nor left out"
            unused.discard(first)


def _run(words: list[str], folder: Path) -> tuple[int, str]:
    if words[0] != "python":
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=LONGEST, check=False)
        return done.returncode, done.stdout + done.stderr
    process = Process(words[1:], cwd=folder)
    try:
        output, _ = process.communicate(timeout=LONGEST)
    finally:
        process.kill()
    return process.wait(), output
