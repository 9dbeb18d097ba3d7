"""Run all measurements one after another, each in a process of its own, until the time is over.

The same call continues. DIR/results.json holds the results and is rewritten after each item. DIR/logs holds the output
of each item.
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.suite_items import SMOKE_SECONDS, Item, chosen
from jitscale.errors import ExitCode, StorageError, UserError, first_line
from jitscale.files import atomic_write

RESULTS = "results.json"
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/benchmark.py"
LIMIT = 3  # times the estimated seconds, after which an item has failed
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
SPARE_SECONDS = 8.0  # part of the call's time that is kept to end an item and this process
# The status of an item. A skipped or later item has no record, so the next call considers it again.
DONE, REFUSED, FAILED, MEMORY, SLOW = "done", "refused", "failed", "out of memory", "too slow"
SKIPPED, LATER = "skipped", "later"
RECORD = {"status": str, "smoke": bool, "source": str}  # keys of each record, and their types
# A process group, so that an item and all its child processes can be ended together. No session of its own, so that
# none of them outlives the session of this process.
OWN_GROUP: dict[str, Any] = {"process_group": 0} if sys.version_info >= (3, 11) else {"preexec_fn": os.setpgrp}
_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory|CUBLAS_STATUS_ALLOC_FAILED")
_ERROR = re.compile(r"^(error: |[\w.]*(Error|Exception|Interrupt)\b)")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen items that have no result yet, while there is time.

    With --list nothing runs and nothing is written. Raises a UserError if --out is no folder, if it holds damaged
    results or results of the other sizes (tiny or real), or if the wheels cannot be used.
    """
    ends = time.monotonic() + 60 * options.minutes - SPARE_SECONDS
    folder: Path = options.out
    kept = read_results(folder)
    if any(record["smoke"] != options.smoke for record in kept.values()):
        sizes = "results of real sizes" if options.smoke else "results of --smoke, which say nothing about speed"
        raise UserError(f"--out {folder}: holds {sizes}; choose another folder")
    if options.list:
        return _outcome(folder, _listed(options, kept))
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"--out {folder}: cannot be made a folder ({error.strerror}); choose another"
        raise StorageError.of(error, why) from error
    checkout = {"source": _digest_of_sources(), "smoke": options.smoke}
    with _ending_on_signals(), _installed_wheels(options.wheels) as site:
        gpus = _count_gpus()
        states: dict[str, str] = {}
        begun = 0
        for item in chosen(options.parts):
            known = kept.get(item.name)
            again = known is not None and options.retry and known["status"] != DONE
            if known is not None and not again:
                states[item.name] = known["status"]
                continue
            reason = item.obstacle(gpus, smoke=options.smoke)
            if reason is not None:
                states[item.name] = f"{SKIPPED}: {reason}"
                continue
            left = ends - time.monotonic()
            estimated = min(item.seconds, SMOKE_SECONDS) if options.smoke else item.seconds
            if left < estimated and (begun or left < SPARE_SECONDS):
                states[item.name] = LATER
                continue
            limit = left if options.smoke else min(left, LIMIT * estimated)
            record = _run(item, limit, folder, site, gpus, smoke=options.smoke)
            begun += 1
            if record["status"] == SLOW and limit == left and begun > 1:
                states[item.name] = LATER  # the next call begins with this item and has more time
                continue
            kept[item.name] = {"part": item.part, **record, **checkout}
            _write(folder, kept)
            states[item.name] = record["status"]
    return _outcome(folder, states)


def _outcome(folder: Path, states: dict[str, str]) -> dict[str, Any]:
    return {"items": states, "folder": str(folder), "report": f"python tools/benchmark.py report {folder}"}


def _listed(options: argparse.Namespace, kept: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The status that a call would give each item."""
    carried = set() if options.wheels is None else _modules_of(_wheels_in(options.wheels))
    gpus = _count_gpus()
    states = {}
    for item in chosen(options.parts):
        reason = item.obstacle(gpus, smoke=options.smoke, carried=carried)
        known = kept.get(item.name)
        states[item.name] = known["status"] if known else LATER if reason is None else f"{SKIPPED}: {reason}"
    return states


def describe(result: dict[str, Any]) -> measuring.Table:
    """The lines of the table of `measure`."""
    states = result["items"]
    later = sum(state == LATER for state in states.values())
    note = f"{later} of {len(states)} items are left for the next call" if later else "nothing is left"
    return [*states.items(), ("left", note), ("the tables", result["report"])]


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The records in `folder` by their items' names. Raises a UserError if the file is damaged."""
    path = folder / RESULTS
    if not path.exists():
        return {}
    try:
        held = json.loads(path.read_text())
        fault = _fault_of(held)
    except (ValueError, RecursionError) as error:
        held, fault = {}, first_line(error)
    except OSError as error:
        raise StorageError.of(error, f"{path}: cannot be read ({error.strerror}); move it away") from error
    if fault is not None:
        raise UserError(f"{path}: is no file of results ({fault}); move it away")
    items: dict[str, dict[str, Any]] = held["items"]
    return items


def _fault_of(held: Any) -> str | None:
    """The fault of a file of results; None if there is none."""
    if not isinstance(held, dict) or not isinstance(held.get("items"), dict):
        return "it has no items"
    for name, record in held["items"].items():
        if not isinstance(record, dict):
            return f"{name} is no record"
        wanted = RECORD | ({"result": dict} if record.get("status") == DONE else {"reason": str})
        for key, kind in wanted.items():
            if not isinstance(record.get(key), kind):
                return f"{name} has no {key}" if key not in record else f"{name} has an impossible {key}"
        if record["status"] == DONE and not isinstance(record["result"].get("command"), str):
            return f"the result of {name} has no command"
    return None


def _write(folder: Path, kept: dict[str, dict[str, Any]]) -> None:
    with atomic_write(folder / RESULTS) as file:
        file.write(json.dumps({"items": kept}, indent=1).encode())


def _run(item: Item, limit: float, folder: Path, site: Path | None, gpus: int, *, smoke: bool) -> dict[str, Any]:
    """Run `item` for `limit` seconds at most: its status, and its result or the reason why there is none."""
    words = item.arguments(smoke=smoke)
    log = folder / "logs" / f"{item.name}.txt"
    path = [str(site)] if site is not None else []
    inherited = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*path, *([inherited] if inherited else [])])}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(max(gpus, 2))]
    launcher = torchrun if item.gpus > 1 else []
    began = time.monotonic()
    print(f"{item.name}: {' '.join(words)}", file=sys.stderr, flush=True)
    with log.open("wb") as said, tempfile.TemporaryFile() as found:
        with subprocess.Popen(
            [sys.executable, *launcher, str(TOOL), *words],
            cwd=ROOT,
            env=environment,
            stdout=found,
            stderr=said,
            stdin=subprocess.DEVNULL,
            **OWN_GROUP,
        ) as process:
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        found.seek(0)
        output = found.read().decode(errors="replace")
    seconds = time.monotonic() - began
    lines = [line for line in output.splitlines() if line.startswith("{")]
    record: dict[str, Any] = {
        "command": f"python tools/benchmark.py {' '.join(words)}",
        "seconds": round(seconds, 1),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if code == 0 and lines:
        record |= {"status": DONE, "result": json.loads(lines[-1])}
    else:
        record |= _failure(code, log.read_text(errors="replace"), limit)
    reason = f": {record['reason']}" if "reason" in record else ""
    print(f"{item.name}: {record['status']} after {seconds:.0f} s{reason}", file=sys.stderr, flush=True)
    return record


def _failure(code: int | None, said: str, limit: float) -> dict[str, str]:
    """Status and reason of an item that ended with `code` (None: it was ended after `limit` seconds)."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if _ERROR.match(line)]
    if code is None:
        return {"status": SLOW, "reason": f"had not ended after {limit:.0f} s"}
    if any(_MEMORY.search(line) for line in lines):
        (*_, last) = [line for line in lines if _MEMORY.search(line)]
        return {"status": MEMORY, "reason": last[:300]}
    if code == ExitCode.USER_ERROR and errors:
        return {"status": REFUSED, "reason": errors[-1].removeprefix("error: ")[:500]}
    ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return {"status": FAILED, "reason": f"{(errors or lines or ['said nothing'])[-1][:500]} ({ended})"}


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the item and all its child processes, if they still run."""
    for sign, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, GRACE_SECONDS)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


@contextmanager
def _ending_on_signals() -> Iterator[None]:
    """Let SIGTERM end this process like Ctrl-C, so that the current item is ended too."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(ExitCode.INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _installed_wheels(wheels: Path | None) -> Iterator[Path | None]:
    """Install the wheels into a temporary folder, which exists during the `with` statement."""
    if wheels is None:
        yield None
        return
    files = list(map(str, _wheels_in(wheels)))
    with tempfile.TemporaryDirectory(prefix="jitscale_wheels_") as site:
        options = [
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-cache-dir",
            "--no-compile",
            "--disable-pip-version-check",
        ]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", site, *files]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
        if finished.returncode:
            last = (finished.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise UserError(f"--wheels {wheels}: pip cannot install them ({last}); give wheels for this Python")
        sys.path.append(site)  # this process checks whether the packages of an item are installed
        try:
            yield Path(site)
        finally:
            sys.path.remove(site)


def _wheels_in(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*.whl"))
    if not files:
        raise UserError(f"--wheels {folder}: no *.whl there; give a folder of wheels for this Python")
    return files


def _modules_of(wheels: list[Path]) -> set[str]:
    """The names of the packages and modules in `wheels`, which are not installed for that."""
    names: set[str] = set()
    for wheel in wheels:
        try:
            with zipfile.ZipFile(wheel) as archive:
                names |= {name.partition("/")[0].partition(".")[0] for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"--wheels {wheel}: is no wheel ({error}); remove it, or get it again") from error
    return names


def _count_gpus() -> int:
    import torch  # noqa: PLC0415

    return torch.cuda.device_count()


def _digest_of_sources() -> str:
    """Identifies the measured sources. A commit would not: it is not known everywhere and ignores local changes."""
    digest = hashlib.sha256()
    for folder in ("jitscale", "tools/benchmarks", "configs"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
