"""Every link of the pages, and every mention of a page in the code, leads to a file and a heading that exist."""

import re
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import pytest

from tests.support import ROOT
from tests.support.pages import anchors_of, links_of, page_names, page_path, tracked_files

# In code, configurations, messages and prose: docs/train.md or docs/train.md#resume.
MENTION = re.compile(r"(?<![\w/.-])docs/(?P<page>[\w-]+\.md)(?:#(?P<anchor>[\w-]+))?")
TEXTS = {".c", ".cff", ".def", ".json", ".md", ".py", ".sh", ".toml", ".txt", ".yaml", ""}
OF_THESE_TESTS = "tests/docs/"  # their examples lead nowhere on purpose
STARTS = ("README.md", "docs/README.md")  # from where a reader reaches every page of docs/


def problem_of(page: str, target: str) -> str | None:
    """Return the fault of a link of `page` to `target`, or None."""
    if not target:
        return "leads nowhere"
    address = urlsplit(target)
    if address.scheme in ("http", "https"):
        return None if re.fullmatch(r"[\w.-]+\.[a-z]+(:\d+)?", address.netloc) else "is no address"
    if address.scheme or target.startswith("/"):
        return "is neither an address nor a path from the page's folder"
    file = (page_path(page).parent / address.path).resolve() if address.path else page_path(page)
    if not file.is_relative_to(ROOT) or not file.exists():
        return "there is no such file"
    if address.fragment and (file.suffix != ".md" or address.fragment not in anchors_of(file.read_text())):
        return "the file has no such heading"
    return None


@pytest.mark.parametrize("page", page_names())
def test_links_lead_somewhere(page: str) -> None:
    wrong = [
        f"{page}:{link.number}: {link.text}: {problem}"
        for link in links_of(page_path(page).read_text())
        if (problem := problem_of(page, link.text))
    ]
    assert not wrong, "\n".join(["", *wrong])


def test_pages_that_files_mention_are_there() -> None:
    wrong = []
    anchors = {name: anchors_of(page_path(name).read_text()) for name in page_names()}
    for name in tracked_files():
        if PurePosixPath(name).suffix not in TEXTS or name.startswith(OF_THESE_TESTS):
            continue
        text = (ROOT / name).read_text(errors="replace")
        for found in MENTION.finditer(text):
            page, anchor = f"docs/{found['page']}", found["anchor"]
            if page not in anchors or (anchor and anchor not in anchors[page]):
                wrong.append(f"{name}:{text[: found.start()].count(chr(10)) + 1}: {found[0]}")
    assert not wrong, "\n".join(["", *wrong])


def test_every_page_is_reached() -> None:
    waiting, reached = [name for name in STARTS if page_path(name).exists()], set[str]()
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for link in links_of(page_path(page).read_text()):
            address = urlsplit(link.text)
            file = (page_path(page).parent / address.path).resolve()
            if not address.scheme and file.suffix == ".md" and file.is_relative_to(ROOT) and file.exists():
                name = file.relative_to(ROOT).as_posix()
                waiting += [] if name in reached else [name]
    assert {name for name in page_names() if name.startswith("docs/")} <= reached


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("docs/settings.md", None),
        ("docs/settings.md#none", "no such heading"),
        ("docs/none.md", "no such file"),
        ("../other/README.md", "no such file"),
        ("#the-house", "no such heading"),
        ("https://arxiv.org/abs/2511.13720", None),
        ("https:/arxiv.org", "no address"),
        ("ftp://arxiv.org", "neither"),
        ("/docs/settings.md", "neither"),
        ("", "nowhere"),
    ],
)
def test_a_wrong_link_is_found(target: str, problem: str | None) -> None:
    found = problem_of("README.md", target)
    assert (found is None) if problem is None else (problem in str(found))


def test_links_and_anchors_are_those_of_github() -> None:
    page = (
        '# A `bf16` title, with (signs): 3 of 4!\n\n## Same\n\n## Same\n\n<a id="own"></a>\n'
        "[one](a.md#b) ![two](c.png) [![three](d.png)](e.md) `[code](f.md)` [wrapped\nlink](g.md)\n"
        "```text\n# no heading\n[four](h.md)\n```\n"
    )
    assert anchors_of(page) == {"a-bf16-title-with-signs-3-of-4", "same", "same-1", "own"}
    assert {link.text for link in links_of(page)} >= {"a.md#b", "c.png", "e.md", "g.md"}
    assert not {link.text for link in links_of(page)} & {"f.md", "h.md"}
