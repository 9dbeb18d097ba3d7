"""docs/reference.md is the output of docs/reference.py, and complete. test_recorded.py checks the metrics of runs."""

import runpy
from typing import Any

import pytest

from jitscale.errors import ExitCode
from jitscale.recorded import EVALUATION_METRICS, FILES, HELD_OUT_METRICS, STEP_METRICS, WANDB_RECORDS
from tests.support import ROOT


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs/reference.py"))


def test_the_page_in_the_documentation_is_that_of_the_script(script: dict[str, Any]) -> None:
    assert (ROOT / "docs/reference.md").read_text() == script["page"](), "run: make docs"


def test_every_entry_is_on_the_page(script: dict[str, Any]) -> None:
    page = script["page"]()
    for metric in (*STEP_METRICS, *HELD_OUT_METRICS, *EVALUATION_METRICS, *WANDB_RECORDS):
        assert f"| `{metric.name}` |" in page
    for file in FILES:
        assert f"| `{file.path}` |" in page
    for code in ExitCode:
        assert f"| {code:d} | {code.name} | {code.meaning} | {code.remedy} |" in page
    for anchor in ("Exit codes", "Metrics", "Files of a run", "Commands"):
        assert f"\n## {anchor}\n" in page, "other pages link to it"


def test_a_command_has_its_place_or_the_page_is_refused(script: dict[str, Any]) -> None:
    script["COMMANDS"]["Train"] = [path for path in script["COMMANDS"]["Train"] if path != "tools/submit.py"]
    with pytest.raises(ValueError, match=r"differs from the files: \['tools/submit.py'\]"):
        script["page"]()


def test_a_make_target_has_its_words_or_the_page_is_refused(script: dict[str, Any]) -> None:
    assert ["`make lint`", "Check style and types."] in script["targets"]()
    with pytest.raises(ValueError, match="Makefile: b: say after ##"):
        script["targets"](".PHONY: a b\na: c ## Do it.\n\techo\nb: a\n")


def test_the_first_sentence_of_a_command(script: dict[str, Any]) -> None:
    assert script["said"]("jitscale/train.py") == "Train a model.", "without the example after it"
    assert script["said"]("tools/gallery.py").startswith("Write one HTML page to look at a run: results, curves,")
    assert "sbatch" not in script["said"]("slurm/train_jit_h.sh")
    assert all(script["said"](path)[-1] in ".?" for path in script["commands"]())
