"""tools/index_shards.py and tools/inspect_shards.py on the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jitscale.data.find import find_tars
from jitscale.data.manifest import Manifest
from jitscale.errors import DataError
from tests.preparation.surveying import NAMES, theirs, tool
from tests.support import ROOT
from tests.support.pictures import numbered_png, write_tar

NUMBERED = ", ".join(f"{number} {name}" for number, name in enumerate(NAMES))


def test_the_tools_on_the_command_line(tmp_path: Path) -> None:
    """Index, index again without effect, verify, and inspect: with class names, in several processes."""
    theirs(tmp_path, lambda number: {"cls": NAMES[number % 3]})
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    done = tool("index_shards", tmp_path, "--class-names", tmp_path / "names.txt", "--workers", "2")
    assert done.stdout == f"{tmp_path}: indexed 3 shards with 10 images of 8 x 8 pixels, 3 classes ({NUMBERED})\n"
    assert "scan: 100%" in done.stderr
    done = tool("index_shards", tmp_path)
    assert done.stdout == f"{tmp_path}: is indexed already, 3 shards with 10 images\n"
    assert tool("index_shards", tmp_path, "--verify").stdout.endswith(" 0 defects\n")
    write_tar(tmp_path / "more.tar", ("a.png", numbered_png()))
    refused = tool("index_shards", tmp_path, expect=2)
    assert re.search(r"manifest.json: is there, but 1 tars .* \(more.tar, ...\); look with --verify", refused.stderr)
    assert "manifest.json does not name them: 1 tar of the folder" in tool("index_shards", tmp_path, "--verify").stdout
    refused = tool("index_shards", tmp_path, "--force", expect=2)
    *_, defect, error = refused.stderr.splitlines()
    assert defect.startswith(
        f"{tmp_path}/more.tar: byte 512: sample 0 has no label where a class name is expected; make"
    )
    assert error == f"error: {tmp_path}: 1 defect in 1 of 4 tars; nothing was written; repair or leave out these tars"

    sheet = tmp_path / "sheets" / "sheet.png"
    result = json.loads(tool("inspect_shards", tmp_path, "--json", "--contact-sheet", sheet, "--samples", "7").stdout)
    assert (result["codec"], result["decoded"], result["classes"]["largest"]) == (
        "foreign",
        7,
        {"class": "0 cat", "samples": 4},
    )
    assert Manifest.read(tmp_path / "manifest.json").class_names == NAMES
    assert sheet.exists()
    table = tool("inspect_shards", tmp_path / "theirs-00{0..2}.tar").stdout.splitlines()
    assert table[:2] == ["| | |", "|---|---|"]
    assert "| largest class | 4 samples, 0 cat |" in table
    assert "| classes | 3: cat; dog; bee |" in table


def test_members_next_to_the_images_are_reported(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ("README.md", b"x"), ("a.png", numbered_png()), ("a.txt", b"x"), ("b.txt", b"x"))
    said = "3 other members ignored (.txt 2, .md 1)\n"
    assert tool("index_shards", tmp_path).stdout.endswith(f"8 x 8 pixels, no labels\n{said}")
    assert said in tool("index_shards", tmp_path, "--verify").stdout


def test_a_long_list_of_defects_is_shortened_on_the_screen(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", *[(f"{number:03d}.png", b"") for number in range(60)])
    tool("index_shards", tmp_path)
    lines = tool("index_shards", tmp_path, "--verify", expect=2).stdout.splitlines()
    assert len(lines) == 52
    assert lines[50] == "... and 10 more (--report FILE writes all)"
    assert lines[51].endswith(", 60 defects")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nowhere", "nowhere: there is no such file or folder; correct the path"),
        ("empty", "empty: no tars here; correct the path"),
        ("*.tar", r"\*.tar: no tars here"),
        ("{a,b}/x.tar", r"names tars in 2 folders \(.*a, .*b, ...\), and each has a manifest"),
        ("a/x.{tar", "has unbalanced braces"),
        ("a/*", "a/other.txt: the name does not end in .tar; unpack or rename it"),
        ("pipe:cat a/x.tar", "pipe:cat a/x.tar: is remote, but only local folders are read here"),
        ("s3://bucket/a", "s3://bucket/a: is remote, but only local folders are read here; copy them"),
    ],
)
def test_a_mistake_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b", "empty"):
        Path(folder).mkdir()
        Path(folder, "other.txt").touch()
    for folder in ("a", "b"):
        write_tar(Path(folder, "x.tar"), ("a.png", numbered_png()))
    with pytest.raises(DataError, match=message) as caught:
        find_tars(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["index_shards", "inspect_shards"])
def test_a_mistake_ends_a_tool_with_exit_code_2(tmp_path: Path, name: str) -> None:
    refused = tool(name, tmp_path / "nowhere", expect=2)
    assert refused.stderr == f"error: {tmp_path}/nowhere: there is no such file or folder; correct the path\n"
    refused = tool(name, "pipe:cat x.tar", expect=2)
    assert refused.stderr.count("\n") == 1


def test_the_tools_do_not_import_torch() -> None:
    code = "import sys, index_shards, inspect_shards; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tools", check=True)
