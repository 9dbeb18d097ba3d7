"""Commands under a Python without packages, as if the environment were not activated."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jitscale.installation import REMEDY
from tests.support import ROOT

TOOLS = [path for path in sorted((ROOT / "tools").glob("*.py")) if path.stem != "installed"]
BARE = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@pytest.mark.parametrize("tool", TOOLS, ids=lambda path: path.stem)
def test_every_tool_asks_for_its_packages_first(tool: Path) -> None:
    imports = [node for node in ast.parse(tool.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
    before = names[: names.index("installed")]
    assert all(str(name).partition(".")[0] in sys.stdlib_module_names for name in before)


@pytest.mark.parametrize(
    "command", [["tools/submit.py", "--help"], ["-m", "jitscale.train"], ["-m", "jitscale.launch.supervisor"]]
)
def test_the_environment_is_named_in_one_line(command: list[str]) -> None:
    python = [sys.executable, "-S"]  # -S leaves out site-packages.
    finished = subprocess.run([*python, *command], cwd=ROOT, env=BARE, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: No module named ")
    assert finished.stderr.endswith(f"; {REMEDY}\n")
    assert finished.stderr.count("\n") == 1


def test_other_errors_keep_their_traceback() -> None:
    program = "import jitscale.installation as i; i.explain_missing_packages(); import jitscale.absent"
    finished = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, env=BARE, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert "Traceback" in finished.stderr
