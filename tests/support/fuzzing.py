"""Hostile inputs for commands, in the process of the test. The fuzzer checks how each attempt ends and what it changes.

The random numbers of an attempt depend only on the seed, its kind and its number. JITSCALE_FUZZ_SEED selects another
set of inputs. JITSCALE_FUZZ_ONLY=KIND:NUMBER repeats one attempt; its inputs then lie in pytest's folder.
"""

import copy
import io
import json
import os
import re
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import matplotlib.pyplot  # noqa: F401  # Imported early: the time of an input must not include this import.
import torch._dynamo  # noqa: F401
import webdataset  # noqa: F401

from jitscale.errors import ExitCode, exit_with_message
from tests.support.confinement import limits, restored, watched

SEED = os.environ.get("JITSCALE_FUZZ_SEED", "19")
ONLY = os.environ.get("JITSCALE_FUZZ_ONLY")
Command = Callable[[], int]

NUMBERS = [0, 1, -1, 2, 7, 255, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-320, 1e308]
NUMBERS += [float("nan"), float("inf"), float("-inf")]
TEXTS = ["", " ", "model", "a" * 5000, "../x", "/dev/zero", "/dev/null/x", "x\0y", "two\nlines", "007", "1e999", "nan"]
TEXTS += [
    "é\u2028",
    "\udcff",
    "-",
    "--help=",
    "~",
    "~nobody/x",
    "${oc.env:HOME}",
    "${model.depth}",
    "${",
    "[1,",
    "{",
    "a:b",
]
TEXTS += [
    "9" * 5000,
    "step_00000001",
    "shard-{0..",
    "shard-{000000..999999999}.tar",
    "*",
    "[",
    "\x1b[31m",
    "NULL",
    "true",
    "off",
]
# These are texts that Python itself would not write as JSON.
WRITTEN = {"<deep>": "[" * 20_000 + "]" * 20_000, "<digits>": "9" * 5000}
HOSTILE: list[Any] = [
    *WRITTEN,
    None,
    True,
    False,
    *NUMBERS,
    *TEXTS,
    [],
    [[]],
    [None],
    {},
    {"a": 1},
    {"": {}},
    [1, "a"],
    [0.5] * 3,
]
TOKENS = [
    b"\0",
    b"\xff\xfe",
    b"\n",
    b"-1",
    b"99999999999999999999",
    b"NaN",
    b"null",
    b"{}",
    b"[",
    b'"',
    b"&a *a",
    b": ",
]
TOKENS += [
    b"!!python/object/apply:os.system [x]",
    b"!!binary x",
    b"<<: *a",
    b"\t",
    b"%YAML 9",
    b"? ",
    b"- ",
    b"\r",
    b"'",
    *(text.encode() for text in WRITTEN.values()),
]


class Mutator:
    """Changes valid inputs. The first attempt of a kind leaves its input unchanged."""

    def __init__(self, kind: str, number: int) -> None:
        self.random = Random(f"{SEED} {kind} {number}")
        self.active = number > 0

    def often(self, share: float = 0.5) -> bool:
        """Whether to make a change; true with probability `share`."""
        return self.active and self.random.random() < share

    def hostile(self) -> Any:
        """A value that no program expects."""
        return copy.deepcopy(self.random.choice(HOSTILE))

    def changed_bytes(self, data: bytes, most: int = 4) -> bytes:
        """`data` with a few changes: bits, slices, tokens, truncation."""
        if not self.active:
            return data
        random, changed = self.random, bytearray(data)
        for _ in range(random.randint(1, most)):
            at = random.randrange(len(changed) + 1)
            to = min(len(changed), at + random.choice([1, 1, 4, 8, 100, 512]))
            match random.randrange(7):
                case 0 if changed:
                    changed[at % len(changed)] ^= 1 << random.randrange(8)
                case 1:
                    changed[at:to] = random.randbytes(to - at)
                case 2:
                    del changed[at:to]
                case 3:
                    changed[at:at] = random.choice(TOKENS)
                case 4:
                    changed[at:at] = changed[random.randrange(len(changed) + 1) :][:512]
                case 5:
                    changed[at:to] = bytes(to - at)
                case _ if random.random() < 0.3:
                    del changed[at:]
        return bytes(changed)

    def tree(self, value: Any) -> Any:
        """A copy of JSON-like `value` in which one or two entries are changed, removed, added or renamed."""
        changed = {"": copy.deepcopy(value)}
        for _ in range(self.random.randint(1, 2) if self.active else 0):
            inside, key = changed, ""
            while isinstance(inside[key], dict | list) and inside[key] and self.random.random() < 0.85:
                inside = inside[key]
                key = self.random.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            match self.random.randrange(6):
                case 0 if inside is not changed:
                    del inside[key]
                case 1 if isinstance(inside, dict) and inside is not changed:
                    inside[str(self.random.choice(TEXTS))] = inside.pop(key)
                case 2 if isinstance(inside[key], dict):
                    inside[key][self.random.choice(TEXTS)] = self.hostile()
                case 3 if isinstance(inside, list):
                    inside.append(copy.deepcopy(inside[key]))
                case 4 if isinstance(inside[key], int | float):
                    inside[key] = self.random.choice(NUMBERS)
                case _:
                    inside[key] = self.hostile()
        return changed[""]

    def json(self, value: Any) -> bytes:
        """JSON of a changed `value`, sometimes with changed bytes."""
        if self.often(0.25):
            return self.changed_bytes(json.dumps(value).encode())
        text = json.dumps(self.tree(value))
        for mark, written in WRITTEN.items():
            text = text.replace(f'"{mark}"', written)
        return text.encode()

    def text(self) -> str:
        """A word of a command line or of an environment. Such words hold no zero bytes."""
        return str(self.hostile()).replace("\0", "")

    def arguments(self, *groups: Sequence[object]) -> list[str]:
        """A command line of `groups`, each an option with its values. Some values are changed, missing or repeated."""
        words = [[str(word) for word in group] for group in groups]
        for _ in range(self.random.randint(1, 2) if self.active else 0):
            group = self.random.choice(words)
            match self.random.randrange(5):
                case 0:
                    words.remove(group)
                case 1 if group:
                    group.pop()
                case 2:
                    words.append([self.text()])
                case 3:
                    words.append(list(group))
                case _ if group:
                    group[-1] = self.text()
            words = words or [[self.text()]]
        return [word for group in words for word in group]


class Fuzzer:
    """The attempts of one test, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.inputs, self.output = self.folder / "inputs", self.folder / "output"
        self.elsewhere, self.temporary = self.folder / "elsewhere", self.folder / "temporary"
        for made in (self.inputs, self.elsewhere, self.temporary, self.folder / "bin"):
            made.mkdir(parents=True)
        # The folder holds no command of Slurm.
        (self.folder / "bin/tail").symlink_to(shutil.which("tail") or "/usr/bin/tail")
        self.outcomes: dict[str, Counter[str]] = {}
        self.faults: dict[str, list[str]] = {}  # fault -> the attempts that found it, the first one with details

    def run(self, kind: str, count: int, make: Callable[[Mutator], Command], *, reports: bool = False) -> None:
        """Make and try `count` inputs of a `kind`. The first one is valid and must end with exit code 0.

        `make` writes into `inputs` and returns what to call; that may write into `output`, which is empty. `reports`:
        exit code 2 may come with a report on stdout instead of an error.
        """
        outcomes = self.outcomes.setdefault(kind, Counter())
        for number in range(count):
            if ONLY not in (None, f"{kind}:{number}"):
                continue
            command = make(Mutator(kind, number))
            code, fault = self.attempt(command, reports=reports)
            if number == 0 and code != ExitCode.DONE:
                fault = fault or f"the valid input ended with {code}"
            outcomes["fault" if fault else str(code)] += 1
            if fault:
                known = self.faults.setdefault(f"{kind} {fault.partition(' | ')[0]}", [])
                known.append(f"{kind}:{number} {fault}" if not known else f"{kind}:{number}")
            shutil.rmtree(self.output, ignore_errors=True)

    def attempt(self, command: Command, *, reports: bool = False) -> tuple[int | None, str]:
        """Run `command`; returns its exit code and its fault, or an empty text if its end is documented."""
        before, touched = self._snapshot(), []
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
        code, fault = None, ""
        with restored(), limits(), redirect_stdout(out), redirect_stderr(err):
            os.chdir(self.elsewhere)
            os.environ |= {"HOME": str(self.elsewhere), "TMPDIR": str(self.temporary), "PATH": str(self.folder / "bin")}
            os.environ |= dict.fromkeys(("TORCHINDUCTOR_CACHE_DIR", "MPLCONFIGDIR"), str(self.temporary))
            with watched([self.output, self.temporary], touched), mock.patch.object(os, "_exit", sys.exit):
                try:
                    exit_with_message(command, same_on_all_ranks=False)
                except SystemExit as end:
                    code = int(end.code or 0)
                except BaseException as error:
                    fault = _described(error)
        out.flush()
        err.flush()
        said, errors = (stream.buffer.getvalue().decode(errors="replace") for stream in (out, err))
        fault = fault or _judge(code, said, errors, reports=reports)
        if touched or before != self._snapshot():
            fault = f"writes elsewhere: {touched[:2]}; {fault}"
        return code, re.sub(r"0x[0-9a-f]{8,}", "0x...", fault)

    def finish(self) -> None:
        """Fail with all faults, each once, with the first attempts that found it."""
        texts = [f"[{len(met)} x, seed {SEED}] {met[0]}" for met in self.faults.values()]
        assert not texts, f"{len(texts)} kinds of faults\n\n" + "\n\n".join(texts)

    def _snapshot(self) -> dict[str, tuple[int, int]]:
        found = {}
        for folder, folders, files in os.walk(self.folder):
            if Path(folder) == self.folder:
                folders[:] = sorted({*folders} - {self.output.name, self.temporary.name})
            for name in files:
                status = os.lstat(os.path.join(folder, name))
                found[os.path.join(folder, name)] = status.st_size, status.st_mtime_ns
            found[folder] = len(files), 0
        return found


def tool(name: str, arguments: Sequence[str]) -> Command:
    """The command `python tools/NAME.py ARGUMENTS...`, or a module of the package such as jitscale.train."""
    main = import_module(name if "." in name else f"tools.{name}").main

    def call() -> int:
        with mock.patch.object(sys, "argv", [name, *arguments]):
            return main()

    return call


def done(call: Callable[[], object]) -> Command:
    """A function as a command."""

    def command() -> int:
        call()
        return ExitCode.DONE

    return command


def _judge(code: int | None, said: str, errors: str, *, reports: bool) -> str:
    lines = re.split(r"[\r\n]+", errors.strip())
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if "Traceback (most recent call last)" in errors + said:
        return f"exit code {code}, with a traceback in its output | {lines[-1][:300]}"
    if code == ExitCode.DONE:
        return ""
    if code not in list(ExitCode):
        return f"exit code {code} is not documented"
    if reports and code == ExitCode.USER_ERROR and said:
        return ""
    if len(starts) != 1:
        return f"exit code {code} with {len(starts)} lines of error | {errors.strip()[-300:]!r}"
    if more := [line for line in lines[starts[0] + 1 :] if not line.startswith("  ")]:
        return f"more lines behind the error | {more[0][:200]!r}"
    return ""


def _described(error: BaseException) -> str:
    """The kind of an error, its place in the project's code, and the last lines of the traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/tests/" not in frame.filename]
    own = [frame for frame in frames if "/jitscale/" in frame.filename or "/tools/" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in (*own[-2:], *frames[-1:])]
    text = re.sub(r"'[^']*'|\d+", "_", str(error))[:160]  # The text is the same for different inputs.
    return f"{type(error).__name__}: {' '.join(text.split())}  <- {' <- '.join(reversed(places))}"
