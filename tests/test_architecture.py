"""Imports go down only, and only one file imports deepspeed."""

import ast
from pathlib import Path

from tests.support import ROOT

# The lowest layer comes first. A module may import modules of its own row and of earlier rows.
LAYERS = [
    {
        "addresses",
        "command",
        "errors",
        "files",
        "installation",
        "keyed_random",
        "launcher_environment",
        "recorded",
        "versions",
    },
    {"config"},
    {"parallel", "run_folder"},
    {"node"},
    {"model", "diffusion", "data"},
    {"figures", "planner", "progressive", "tracking"},
    {"checkpoints"},
    {"evaluation"},
    {"training"},
    {"launch"},
    {"train", "evaluate", "preparation", "__init__"},
]
RANK = {name: index for index, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit(module: str) -> str | None:
    """`jitscale.training.ema` -> `training`; None for modules of other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "jitscale" and len(parts) > 1 and parts[1] in RANK else None


def test_imports_go_down_only() -> None:
    for path in (ROOT / "jitscale").rglob("*.py"):
        own = path.relative_to(ROOT / "jitscale").parts[0].removesuffix(".py")
        for module in imports(path):
            other = unit(module)
            assert other is None or RANK[other] <= RANK[own], f"{path} imports {module}, which lies above it"


def test_no_two_files_import_each_other() -> None:
    """No import is direct or in a circle, at the top of a file or later, in the package and in the tools."""
    files = {}
    for folder, root in (("jitscale", ROOT), ("tools", ROOT / "tools")):
        # An `__init__` passes names on.
        paths = [path for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"]
        files |= {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    above = {name: {other for other in imports(path) if other in files} - {name} for name, path in files.items()}
    while bottom := {name for name, others in above.items() if not others}:
        above = {name: others - bottom for name, others in above.items() if name not in bottom}
    assert not above, f"these files are in an import cycle, or import one of its files: {above}"


def test_packages_see_only_what_they_need() -> None:
    allowed = {
        "model": {"config", "errors", "model", "versions"},
        "diffusion": {"config", "diffusion"},
        "data": {"addresses", "config", "data", "errors", "files", "keyed_random"},
        "preparation": {"data", "errors", "files", "keyed_random", "preparation"},
    }
    for package, units in allowed.items():
        for path in (ROOT / "jitscale" / package).rglob("*.py"):
            seen = {other for module in imports(path) if (other := unit(module)) is not None}
            assert seen <= units, f"{path} imports {seen - units}"


def test_only_the_engine_imports_deepspeed() -> None:
    users = [path.name for path in ROOT.glob("**/jitscale/**/*.py") if any("deepspeed" in m for m in imports(path))]
    assert users == ["engine.py"]


def test_every_module_has_a_place() -> None:
    units = {path.name.removesuffix(".py") for path in (ROOT / "jitscale").iterdir() if path.suffix == ".py"}
    units |= {path.name for path in (ROOT / "jitscale").iterdir() if (path / "__init__.py").exists()}
    assert units == set(RANK)
