"""Does the project's CUDA code run? From the project's checkout, on a machine without a GPU:

    tests/nullcuda/run.sh python -m tests.nullcuda.check              # all quick checks
    tests/nullcuda/run.sh python -m tests.nullcuda.check waits full_h # these two checks
    tests/nullcuda/run.sh python -m tests.nullcuda.check --list

Each check prints one line, `ok name: figure` or `FAIL name: figure`, and details below it. Exit code 1: a check failed.
$NULLCUDA_HOME/logs keeps the whole output of each process.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.nullcuda import checks
from tests.nullcuda.bench import CHECKS, HOME, Bench, Outcome

for _module in pkgutil.iter_modules(checks.__path__, checks.__name__ + "."):
    importlib.import_module(_module.name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="checks; default: all but the slow ones")
    parser.add_argument("--list", action="store_true", help="name the checks and stop")
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="checks side by side (default: %(default)s)"
    )
    parser.add_argument("--keep", action="store_true", help="leave the runs in $NULLCUDA_HOME/scratch")
    options = parser.parse_args()
    if options.list:
        for name, (function, slow) in CHECKS.items():
            print(f"{name:12} {'(slow) ' if slow else ''}{function.__doc__}")
        return 0
    unknown = [name for name in options.names if name not in CHECKS]
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    if "libcuda" not in os.environ.get("LD_PRELOAD", ""):
        parser.error("start this through run.sh")
    names = options.names or [name for name, (_, slow) in CHECKS.items() if not slow]
    logs = HOME / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    scratch = HOME / "scratch" / str(os.getpid())
    # Remove the folders of killed checks.
    for other in (HOME / "scratch").glob("[0-9]*"):
        if other == scratch or not Path(f"/proc/{other.name}").exists():
            shutil.rmtree(other, ignore_errors=True)
    scratch.mkdir(parents=True)
    started = time.monotonic()
    failed = 0
    try:
        bench = Bench(scratch, logs)
        bench.shards(32)

        def timed(name: str) -> None:
            nonlocal failed
            try:
                outcome = CHECKS[name][0](bench)
            except Exception as error:  # An error of one check must not hide the others.
                outcome = Outcome(False, f"the check itself failed: {type(error).__name__}: {error}")
            failed += not outcome.ok
            lines = [
                f"{'ok  ' if outcome.ok else 'FAIL'} {name}: {outcome.figure}",
                *(f"         {line}" for line in outcome.details),
            ]
            print("\n".join(lines), flush=True)

        with ThreadPoolExecutor(max(1, options.jobs)) as pool:
            list(pool.map(timed, names))
    finally:
        if not options.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print(f"{len(names) - failed} ok, {failed} failed, in {time.monotonic() - started:.0f} s; logs in {logs}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
