"""The fuzzer finds the faults that it is meant to find."""

import sys
from functools import partial
from pathlib import Path

import pytest

from jitscale.errors import UserError
from tests.support import confinement
from tests.support.fuzzing import Command, Fuzzer, Mutator, done


def fail(error: BaseException) -> None:
    raise error


def test_each_kind_of_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confinement, "SECONDS", 0.2)
    fuzz = Fuzzer(tmp_path / "fuzz")
    (fuzz.inputs / "x").write_text("x")
    bad = {
        "KeyError: _": partial(fail, KeyError("step")),
        "writes elsewhere": lambda: (fuzz.elsewhere / "new").write_text("x"),
        "writes elsewhere: ": (fuzz.inputs / "x").unlink,
        "TooSlow": lambda: [None for _ in range(10**7) for _ in range(10**7)],
        "MemoryError": lambda: bytearray(2 * confinement.ROOM),
        "more lines behind the error": lambda: print("error: two\nlines", file=sys.stderr) or sys.exit(2),
        "exit code 7 is not documented": partial(sys.exit, 7),
        "exit code 2 with 0 lines of error": partial(sys.exit, 2),
    }
    for expected, call in bad.items():
        assert expected in fuzz.attempt(done(call))[1], expected
    good = {
        0: lambda: (fuzz.output.mkdir(), (fuzz.output / "new").write_text("x")),
        2: partial(fail, UserError("x: is y, must be z; write z\r\nor w")),
    }
    for code, call in good.items():
        assert fuzz.attempt(done(call)) == (code, "")


def test_a_fault_names_its_input_and_the_first_input_is_valid(tmp_path: Path) -> None:
    fuzz, seen = Fuzzer(tmp_path / "fuzz"), []

    def make(mutator: Mutator) -> Command:
        seen.append(mutator.changed_bytes(b"valid" * 100))
        return done(lambda: fail(KeyError("x")) if len(seen) == 3 else None)

    fuzz.run("kind", 5, make)
    assert seen[0] == b"valid" * 100 not in seen[1:]
    assert fuzz.outcomes["kind"] == {"0": 4, "fault": 1}
    with pytest.raises(AssertionError, match=r"1 x, seed \w+\] kind:2 KeyError"):
        fuzz.finish()
