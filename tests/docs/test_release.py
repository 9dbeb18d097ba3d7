"""A release has one version, wherever it is written."""

import re

import yaml

import jitscale
from tests.support import ROOT


def test_a_release_has_one_version_and_one_date() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    heads = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == (citation["version"], str(citation["date-released"]))
    assert heads[0][0] == jitscale.__version__
