"""A fuzzer for each test, and a table of all attempts at the end of the session."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jitscale.command import markdown
from tests.support.fuzzing import SEED, Fuzzer


@pytest.fixture
def fuzz(tmp_path: Path, record_property: Any) -> Iterator[Fuzzer]:
    """The fuzzer counts its attempts by kind and outcome. The counts of worker processes reach the table too."""
    fuzzer = Fuzzer(tmp_path / "fuzz")
    yield fuzzer
    for kind, outcomes in fuzzer.outcomes.items():
        record_property("fuzz", (kind, dict(outcomes)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts of all kinds of inputs. A fault is an end that the project does not document."""
    reports = {
        id(one): one for some in terminalreporter.stats.values() for one in some if hasattr(one, "user_properties")
    }
    counts: dict[str, Counter[str]] = {}
    for report in reports.values():
        for name, value in report.user_properties:
            if name == "fuzz" and report.when == "teardown":
                counts.setdefault(value[0], Counter()).update(value[1])
    if counts:
        total = sum((outcomes for outcomes in counts.values()), Counter[str]())
        rows = [
            (kind, f"{found.total()} ({', '.join(f'{code}: {number}' for code, number in sorted(found.items()))})")
            for kind, found in [*sorted(counts.items()), ("all", total)]
        ]
        terminalreporter.write_line(f"fuzzed with seed {SEED}, inputs by exit code")
        terminalreporter.write_line(markdown(rows))
