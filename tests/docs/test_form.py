"""Pages keep their form, words that cost a second reading stay out, and a measured number stands on one page."""

import re
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.pages import (
    inline_code,
    is_of_a_table,
    page_names,
    page_path,
    tables_of,
    tracked_files,
    without_blocks,
    without_code,
)

COLUMNS = 100  # at which prose wraps
README_LINES = 130
PROSE_COLUMNS = 4  # the most in a table
PROSE_WORDS = 6  # a cell with more is prose

# Words that are surely wrong, in pages and in comments, docstrings and messages of the code, each with its replacement.
BANNED = {
    r"beside": "next to, besides, with",
    r"shall": "must, will",
    r"nothing but": "only",
    r"whence": "from which",
    r"for long": "for a long time, or the time in numbers",
    "who(?:so)?ever": "a person who, or the thing with its name",
    r"lest": "so that ... not",
    r"for want of": "because there is no",
    r"thereof|therein|thereby|hereby|wherein|whereby": "the thing with its name",
}
# Words of a pair may stand on two lines, also of a comment.
_BANNED = {
    re.compile(rf"\b(?:{word})\b".replace(" ", r"\s+(?:# )?"), re.IGNORECASE): remedy for word, remedy in BANNED.items()
}
CODE = ("configs/", "docs/", "jitscale/", "slurm/", "tools/")

# A measured number: three significant digits at least, with a unit.
NUMBER = re.compile(
    r"(?<![\w.,])(?P<number>\d[\d,]*(?:\.\d+)?)\s?"
    r"(?P<unit>ms|s|min|GB|GiB|MB|MiB|images/s|images per second|%|TFLOP/s)(?![\w/])"
)
# Numbers that may stand on several pages: limits, settings, sizes of things, different numbers that are equal.
NOT_MEASURED = {
    "10.0 %": "the share of one class in ten",
    "99.7 %": "two findings that have nothing in common but the number",
    "120 s": "how long ranks wait for each other",
    "128 GB": "memory of a machine",
    "141 GB": "memory of an H200",
    "192 GB": "memory of a B200",
    "256 MB": "a limit",
    "512 MB": "a limit",
    "989 TFLOP/s": "peak of an H100",
}


def long_lines(page: str) -> list[str]:
    """Lines of prose that do not wrap, each with its number. Tables, headings and pictures need not."""
    spans = {line.text for line in inline_code(page) if len(line.text) > COLUMNS - 10}
    found = []
    for number, line in enumerate(without_blocks(page).splitlines(), 1):
        unbreakable = any(len(word) > COLUMNS - 10 for word in line.split()) or any(span in line for span in spans)
        whole = unbreakable or is_of_a_table(line) or line.lstrip().startswith(("![", "[![", "#"))
        if len(line) > COLUMNS and not whole:
            found.append(f"{number}: {len(line)} columns")
    return found


def wide_tables(page: str) -> list[str]:
    """Tables with too many columns of prose, each with its line."""
    found = []
    for rows in tables_of(page):
        prose = set()
        for _, cells in rows:
            prose |= {column for column, cell in enumerate(cells) if len(_plain(cell).split()) > PROSE_WORDS}
        if len(prose) > PROSE_COLUMNS:
            found.append(f"{rows[0][0]}: a table with {len(prose)} columns of prose")
    return found


def _plain(cell: str) -> str:
    """A cell's text without the targets of its links; code is one word."""
    return re.sub(r"`[^`]*`", "code", re.sub(r"\]\([^)]*\)", "", cell))


def banned_words(text: str, first: int = 1) -> list[str]:
    """Each banned word in `text`, with its line, counted from `first`, and the remedy."""
    return [
        f"{first + text[: found.start()].count(chr(10))}: {' '.join(found[0].split())}; write {remedy}"
        for word, remedy in _BANNED.items()
        for found in word.finditer(text)
    ]


def banned_words_of_python(path: Path) -> list[str]:
    """The banned words in a file's comments, docstrings and messages."""
    with path.open("rb") as file:
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        tokens = [token for token in tokenize.tokenize(file.readline) if token.type in kinds]
    return [word for token in tokens for word in banned_words(_without_names(token.string), token.start[0])]


def _without_names(string: str) -> str:
    """The text of an f-string without its expressions: names in the code are free."""
    formatted = re.match(r"(?i)[rb]*f[rb]*['\"]", string)
    return re.sub(r"\{[^{}\n]*\}", "{}", string) if formatted else string


def measured_numbers(page: str) -> dict[str, int]:
    """The measured numbers of a page's prose and tables, each with the line where it stands first."""
    found: dict[str, int] = {}
    for number, line in enumerate(without_code(page).splitlines(), 1):
        for each in NUMBER.finditer(line):
            digits = each["number"].replace(",", "")
            digits = digits.replace(".", "").lstrip("0") if "." in digits else digits.strip("0")
            if len(digits) >= 3:
                unit = each["unit"].replace("images per second", "images/s")
                found.setdefault(f"{each['number']} {unit}", number)
    return found


def repeated_numbers(pages: dict[str, str]) -> list[str]:
    """Each measured number that stands on several of the `pages`, given as texts by name."""
    where = defaultdict(list)
    for name, page in pages.items():
        for number, line in measured_numbers(page).items():
            where[number].append(f"{name}:{line}")
    return [
        f"{number}: {', '.join(places)}"
        for number, places in where.items()
        if len(places) > 1 and number not in NOT_MEASURED
    ]


@pytest.mark.parametrize("name", page_names())
def test_a_page_keeps_its_form(name: str) -> None:
    page = page_path(name).read_text()
    wrong = [*long_lines(page), *wide_tables(page), *banned_words(without_code(page))]
    assert not wrong, "\n".join(["", *(f"{name}:{each}" for each in wrong)])


def test_the_first_page_is_short() -> None:
    assert len(page_path("README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("folder", CODE)
def test_the_code_keeps_the_words_out(folder: str) -> None:
    wrong = []
    for name in tracked_files():
        path = ROOT / name
        if name.startswith(folder) and path.suffix in (".py", ".sh", ".yaml"):
            found = banned_words_of_python(path) if path.suffix == ".py" else banned_words(path.read_text())
            wrong += [f"{name}:{each}" for each in found]
    assert not wrong, "\n".join(["", *wrong])


def test_a_measured_number_stands_on_one_page() -> None:
    names = [name for name in page_names() if name == "README.md" or name.startswith("docs/")]
    repeated = repeated_numbers({name: page_path(name).read_text() for name in names})
    assert not repeated, "\n".join(["", *repeated])


def test_what_breaks_the_form_is_found(tmp_path: Path) -> None:
    long = "word " * 25
    assert long_lines(f"{long}\n\n| {long} |\n|---|\n\n```\n{long}\n```\n![{long}](a.png)\n") == ["1: 125 columns"]
    assert long_lines(f"See {'x' * 120} there\n") == []
    cell = "one two three four five six seven"
    assert wide_tables(f"|{f'{cell}|' * 5}\n|{'---|' * 5}\n|{'3|' * 5}\n") == ["1: a table with 5 columns of prose"]
    assert wide_tables(f"|{f'{cell}|' * 4}3|\n|{'---|' * 5}\n") == []
    assert [word.partition(";")[0] for word in banned_words("A\nbeside b, nothing\nbut c, besides\n")] == [
        "2: beside",
        "2: nothing but",
    ]
    (tmp_path / "a.py").write_text('beside = 1\n"""It shall\nbe."""\nx = f"{beside} lest"  # nothing but x\n')
    assert sorted(word.partition(";")[0] for word in banned_words_of_python(tmp_path / "a.py")) == [
        "2: shall",
        "4: lest",
        "4: nothing but",
    ]


def test_a_number_on_two_pages_is_found() -> None:
    assert measured_numbers("It took 3.21 s, 5 s, 1,000 MB, 0.01%, 12.8%, 141 images per second and `4.56 s`.") == {
        "3.21 s": 1,
        "12.8 %": 1,
        "141 images/s": 1,
    }
    pages = {"a.md": "12.8% of 141 GB", "b.md": "\n| 12.8% | 3.21 s |\n", "c.md": "141 GB"}
    assert repeated_numbers(pages) == ["12.8 %: a.md:1, b.md:2"]
