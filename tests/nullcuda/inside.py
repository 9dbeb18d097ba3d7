"""Runs a module of the project in the process under test: python inside.py [-u] -m jitscale.train ARGUMENTS

A device without values cannot answer some questions. These patches answer them; nothing else is changed:

    probe       attention's kernels run forward and backward; the comparison of their values is skipped
    gpu         the preflight multiplies on the GPU; the comparison of the product is skipped
    nonzero     finds nothing on the device: its count would be arbitrary
    exp2        becomes a power on the device: torch compiles it with NVRTC at run time, which needs a driver
    cudnn       is off in torch: the real library would look for a driver
    lists       that DeepSpeed's stage 3 receives from rank 0 are replaced by the rank's own

If NULLCUDA_REPORT names a file, one training step is recorded: the NULLCUDA_STEP-th call (default: 4) of a method named
train_step. The file is JSON: {"patched": [...], "step": {"counters": ..., "events": [...], "seconds": ...}}. If
NULLCUDA_STOP is set, the process ends there.

`install()` makes the same changes in a process that was started differently.

Functions of the project are found by name, in any module of the package.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from types import CodeType, ModuleType
from typing import Any

import nulllib
import torch

PACKAGE = "jitscale"
STAGE_3 = "deepspeed.runtime.zero.utils"
REPORT = os.environ.get("NULLCUDA_REPORT") or None
STEP = int(os.environ.get("NULLCUDA_STEP", "4"))
report: dict[str, Any] = {"patched": []}


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != "-u"]
    if len(arguments) < 2 or arguments[0] != "-m":
        raise SystemExit(__doc__)
    install()
    sys.argv = [arguments[1], *arguments[2:]]
    sys.path[0] = os.getcwd()
    module = importlib.import_module(arguments[1])  # A module that runs as __main__ would not be patched.
    exec(_main_part(module), vars(module))


def install() -> None:
    """Change torch now, and modules of the project when they are imported."""
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.Tensor.nonzero = torch.nonzero = _nonzero  # type: ignore[method-assign, assignment]
    torch.exp2 = _exp2
    torch.autograd.backward = _backward
    sys.meta_path.insert(0, _AfterImport())
    _write()


def _main_part(module: ModuleType) -> CodeType:
    """The code below `if __name__ == "__main__":`."""
    for part in ast.parse(inspect.getsource(module)).body:
        if isinstance(part, ast.If) and "__main__" in ast.unparse(part.test):
            return compile(ast.Module(part.body, []), str(module.__file__), "exec")
    raise SystemExit(f"{module.__name__} has no `if __name__ == '__main__':`")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Patches each module of the project after its import."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != PACKAGE and name != STAGE_3:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: ModuleType) -> None:
                execute(module)
                _patch(vars(module), module.__name__)

            spec.loader.exec_module = execute_and_patch  # type: ignore[method-assign]
        return spec


def _patch(names: dict[str, Any], module: str) -> None:
    if module == STAGE_3:
        names["assert_lst_len_same_as_other_ranks"] = lambda own: None
        names["get_lst_from_rank0"] = lambda own: own
        return
    for name, value in list(names.items()):
        if getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value) and inspect.isfunction(vars(value).get("train_step")):
            value.train_step = _recorded(value.train_step)
            _done("train_step")
        elif name == "_probe" and inspect.isfunction(value):
            names[name] = _without(value, ValueError, r"\boff\b|differ|toleran|\bnan\b|largest")
            _done("probe")
        elif name == "_gpu" and inspect.isfunction(value):
            names[name] = _without(value, RuntimeError, r"multipl|wrong|differ|\bnan\b")
            _done("gpu")


def _without(call: Callable[..., Any], error: type[Exception], pattern: str) -> Callable[..., Any]:
    """`call` without errors about wrong values: an `error` whose message matches `pattern` is ignored."""

    @functools.wraps(call)
    def tolerant(*arguments: Any, **named: Any) -> Any:
        try:
            return call(*arguments, **named)
        except error as raised:
            if not re.search(pattern, str(raised)):
                raise

    return tolerant


def _recorded(train_step: Callable[..., Any]) -> Callable[..., Any]:
    calls = 0

    @functools.wraps(train_step)
    def step(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if REPORT is None or calls != STEP:
            return train_step(*arguments, **named)
        nulllib.reset()
        nulllib.phase = "forward"
        started = time.perf_counter()
        with nulllib.recording() as events:
            loss = train_step(*arguments, **named)
        seconds = time.perf_counter() - started
        found = [{**event._asdict(), "times": times} for event, times in events.most_common()]
        report["step"] = {"counters": nulllib.counters(), "events": found, "seconds": seconds}
        _write()
        if os.environ.get("NULLCUDA_STOP"):
            os._exit(0)  # The process ends before it saves a large network.
        return loss

    return step


_whole_backward = torch.autograd.backward


@functools.wraps(_whole_backward)
def _backward(*arguments: Any, **named: Any) -> None:
    nulllib.phase = "backward"
    try:
        _whole_backward(*arguments, **named)
    finally:
        nulllib.phase = "after"


_real_nonzero = torch.Tensor.nonzero


def _nonzero(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
    if not tensor.is_cuda or arguments or named:
        return _real_nonzero(tensor, *arguments, **named)
    return torch.empty(0, tensor.dim(), dtype=torch.long, device=tensor.device)


_real_exp2 = torch.exp2


def _exp2(tensor: torch.Tensor, **named: Any) -> torch.Tensor:
    return torch.pow(2.0, tensor) if tensor.is_cuda else _real_exp2(tensor, **named)


def _done(what: str) -> None:
    report["patched"].append(what)
    _write()


def _write() -> None:
    if REPORT is not None and os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        with open(REPORT, "w") as file:
            json.dump(report, file)


if __name__ == "__main__":
    main()
