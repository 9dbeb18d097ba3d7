"""A fuzzer for each test, and at the end of the session a table of what all of them tried."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jitscale.command import markdown
from tests.support.fuzzing import SEED, Fuzzer


@pytest.fixture
def fuzz(tmp_path: Path, record_property: Any) -> Iterator[Fuzzer]:
    """Counts its attempts by kind and outcome, also for the table of another process."""
    fuzzer = Fuzzer(tmp_path / "fuzz")
    yield fuzzer
    for kind, outcomes in fuzzer.outcomes.items():
        record_property("fuzz", (kind, dict(outcomes)))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the counts of all kinds of inputs; a fault is an end that the project does not promise."""
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
