"""Reads the pages of the documentation: fenced blocks, code in prose, prose, tables, headings, links.

Languages of blocks: none or `bash` are commands for a shell, `python` runs, `yaml` is a piece of a configuration,
`text` is output, formulas and layouts.
"""

import functools
import re
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.support import ROOT

LANGUAGES = ("", "bash", "python", "yaml", "text")
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
_PROGRAM = r"(?:python|torchrun|sbatch|srun|make|pip) "
_CODE = re.compile(r"(?<!`)`(?P<code>[^`]+)`(?!`)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\](?:\([^)]*\))?)*\]\((?P<target>[^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")
_HEADING = re.compile(r"^#{1,6} +(?P<title>.+?)\s*$", re.MULTILINE)
_ANCHOR = re.compile(r"<a (?:id|name)=\"(?P<name>[^\"]+)\"")
_LAST = re.compile(r"(?<!\\)\|")  # ends a cell of a table; `\|` is a bar inside one


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int  # line of the page, from 1 on
    language: str  # empty: none is given
    text: str


class Line(NamedTuple):
    """A line, a cell or a piece of code, and where it stands."""

    number: int  # line of the page, from 1 on
    text: str


@functools.cache
def tracked_files() -> tuple[str, ...]:
    """The files of the checkout, as paths from its root; new files that git does not ignore are among them."""
    said = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return tuple(name for name in sorted(set(said.splitlines())) if (ROOT / name).is_file())


def page_names() -> list[str]:
    """All pages, as paths from the root of the checkout."""
    return [name for name in tracked_files() if name.endswith(".md")]


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page's text."""
    found = _FENCE.finditer(page)
    return [Block(page[: f.start()].count("\n") + 1, f["language"], textwrap.dedent(f["text"])) for f in found]


def commands_of(block: Block) -> list[Line]:
    """The commands of a block for a shell, each with its line on the page: one a line, unless a backslash goes on.

    Lines that are comments are left out.
    """
    found, begun, parts = [], 0, ""
    for number, text in enumerate(block.text.splitlines(), block.line + 1):
        begun = number if not parts else begun
        parts += text.removesuffix("\\") + " "
        if not text.endswith("\\"):
            command = parts.strip()
            found += [Line(begun, command)] if command and not command.startswith("#") else []
            parts = ""
    assert not parts, f"line {block.line}: the block ends with a backslash"
    return found


def holds_commands(text: str) -> bool:
    """Return whether a line of a block begins as a command, in a block of another kind."""
    return re.search(rf"^\s*(\$ |{_PROGRAM})", text, re.MULTILINE) is not None


def indented_commands(page: str) -> list[Line]:
    """The commands of blocks that are indented instead of fenced."""
    prose = without_blocks(page)
    found = re.finditer(rf"(?<=\n\n)( {{4,}}|\t)(?P<command>{_PROGRAM}.*)$", prose, re.MULTILINE)
    return [Line(prose[: f.start()].count("\n") + 1, f["command"]) for f in found]


def without_blocks(page: str) -> str:
    """The page's text with an empty line for each line of a fenced block."""
    return _FENCE.sub(lambda found: "\n" * found.group().count("\n"), page)


def without_code(page: str) -> str:
    """The page's text, with the same lines, without fenced blocks and without code in prose."""
    return _CODE.sub(lambda found: "`" + "\n" * found["code"].count("\n") + "`", without_blocks(page))


def inline_code(page: str) -> list[Line]:
    """The code between backticks outside of fenced blocks, in one line each."""
    prose = without_blocks(page)
    found = _CODE.finditer(prose)
    return [Line(prose[: f.start()].count("\n") + 1, " ".join(f["code"].split())) for f in found]


def links_of(page: str) -> list[Line]:
    """The targets of the links and images of a page."""
    prose = without_code(page)
    found = _LINK.finditer(prose)
    return [Line(prose[: f.start()].count("\n") + 1, f["target"]) for f in found]


def anchors_of(page: str) -> set[str]:
    """The anchors that GitHub gives a page's headings, and those that the page sets itself."""
    prose = without_blocks(page)
    found, seen = {each["name"] for each in _ANCHOR.finditer(prose)}, dict[str, int]()
    for heading in _HEADING.finditer(prose):
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading["title"]).lower()
        anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
        count = seen.get(anchor, 0)
        seen[anchor] = count + 1
        found.add(f"{anchor}-{count}" if count else anchor)
    return found


def is_of_a_table(line: str) -> bool:
    """Return whether a line outside of blocks is a row of a table."""
    return line.lstrip().startswith("|")


def tables_of(page: str) -> Iterator[list[tuple[int, list[str]]]]:
    """Each table of a page, as rows with their line and their cells; the line under the head is left out."""
    rows: list[tuple[int, list[str]]] = []
    for number, line in enumerate([*without_blocks(page).splitlines(), ""], 1):
        if is_of_a_table(line):
            cells = [cell.strip() for cell in _LAST.split(line.strip().strip("|"))]
            if not all(re.fullmatch(r":?-+:?", cell) for cell in cells):
                rows.append((number, cells))
        elif rows:
            yield rows
            rows = []


def page_path(name: str) -> Path:
    """Where a page of `page_names` is."""
    return ROOT / name
