"""`--list-settings` and docs/settings.md show the same page, with every fact of the schema."""

import pytest

from jitscale.config import CHOICES, SETTINGS, load_config
from jitscale.config.listing import WIDTH, settings_page
from jitscale.errors import ConfigError
from jitscale.train import main
from tests.support import ROOT


def test_the_page_in_the_documentation_equals_the_output_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--list-settings"])
    assert end.value.code == 0, "the listing needs no --config"
    assert (ROOT / "docs/settings.md").read_text() == capsys.readouterr().out, "docs/settings.md is old; run: make docs"


def test_every_setting_is_listed_with_all_facts_of_the_schema() -> None:
    page = settings_page()
    assert max(map(len, page.splitlines())) <= WIDTH
    entries = [" ".join(entry.split()) for entry in page.split("\n- `")[1:]]
    assert [entry.partition("=")[0] for entry in entries] == list(SETTINGS)
    for entry, (key, known) in zip(entries, SETTINGS.items(), strict=True):
        assert all(part in entry for part in (known.meaning, known.unit, known.limit, *map(str, CHOICES.get(key, ()))))
    assert "model.hidden_size=768`: width of a token (integer; in [1, 131072])" in entries
    assert any(entry.startswith("ema.decays=[0.9996,0.9998,0.9999]`: decays per step of") for entry in entries)
    assert any("(integer or null; at least 1)" in entry for entry in entries)
    assert any("(true or false)" in entry for entry in entries)
    assert any(entry.startswith("evaluation.features_dir=null`") and "(text or null)" in entry for entry in entries)


def test_every_listed_default_is_a_valid_override() -> None:
    """The default is a valid override: lists contain no spaces, and null stands where a setting may have no value."""
    written = [line.partition("`")[2].partition("`")[0] for line in settings_page().splitlines() if line[:3] == "- `"]
    load_config(ROOT / "configs/demo.yaml", [*written, "run.max_steps=1"])
    with pytest.raises(ConfigError, match="--list-settings shows all settings"):
        load_config(ROOT / "configs/demo.yaml", ["qqqqq.zzzz=1"])
