"""Read a profiler's trace: time, FLOPs and bytes of a GPU's kernels by name, and how busy the GPU is.

The sizes of a kernel are those of the arguments of the operator, or compiled kernel, that launched it. The profiler
must record shapes.
"""

import json
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long": 8, "long int": 8, "int": 4, "bool": 1}
BYTES |= {"unsigned char": 1, "signed char": 1, "c10::Float8_e4m3fn": 1, "c10::Float8_e5m2": 1}
PRODUCTS = {"mm": 2, "bmm": 2, "_scaled_mm": 2, "addmm": 3, "baddbmm": 3}  # the place of the second factor
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = re.compile(r"^(cu|cuda)(Launch\w*|GraphLaunch)")
KINDS = {  # the first that matches a kernel's name or its operator's
    "NCCL": r"nccl",
    "attention": r"attention|flash|fmha|cudnn_generated.*sdpa",
    "matrix products": r"^aten::(mm|addmm|bmm|baddbmm|linear|_scaled_mm)$|gemm|nvjet|cutlass",
    "AdamW": r"adam",
    "fused by Inductor, or Triton": r"^triton_",
    "copies": r"mem(cpy|set)|copy",
}


class Kernel(NamedTuple):
    """One execution of a kernel."""

    name: str
    operator: str
    begin: float  # microseconds
    duration: float
    flops: float | None  # None: not known
    bytes: float | None


class Trace(NamedTuple):
    """A step in the profiler's trace."""

    kernels: list[Kernel]
    launches: int  # calls of the driver's library that start something on the device


def read_trace(profiler: torch.profiler.profile, device: torch.device) -> Trace:
    """The trace of a stopped `profiler`. On a CPU, operators that call no other operator count as kernels."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return trace_of(events, on_gpu=device.type == "cuda")


def trace_of(events: Iterable[dict[str, Any]], *, on_gpu: bool) -> Trace:
    """The trace in the `events` of a trace file. With `on_gpu`, only events on the GPU count as kernels."""
    whole = [event for event in events if event.get("ph") == "X"]
    operators = {e["args"].get("External id"): e for e in whole if e.get("cat") == "cpu_op" and "args" in e}
    launched = [e for e in whole if e.get("cat") in ON_DEVICE] if on_gpu else list(_leaves(operators.values()))
    kernels = []
    for event in launched:
        operator = operators.get(event.get("args", {}).get("External id"), {})
        flops, moved = _work(operator.get("name", ""), operator.get("args", {}))
        kernels.append(Kernel(event["name"], operator.get("name", ""), event["ts"], event["dur"], flops, moved))
    return Trace(kernels, sum(bool(LAUNCHES.match(e["name"])) for e in whole if "cuda" in str(e.get("cat"))))


def by_name(kernels: Iterable[Kernel]) -> list[dict[str, Any]]:
    """Sums over kernels of the same name and operator; the longest first."""
    groups: dict[tuple[str, str], list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        groups[kernel.name, kernel.operator].append(kernel)
    summed = [{"name": name, "operator": operator, **_sum(group)} for (name, operator), group in groups.items()]
    return sorted(summed, key=lambda group: -group["ms"])


def by_kind(kernels: Iterable[Kernel]) -> dict[str, dict[str, Any]]:
    """Sums over kernels of the same of KINDS; all others are "other"."""
    groups: dict[str, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        texts = (kernel.operator, kernel.name)
        found = (kind for kind, pattern in KINDS.items() if any(re.search(pattern, t, re.IGNORECASE) for t in texts))
        groups[next(found, "other")].append(kernel)
    return dict(sorted(((kind, _sum(group)) for kind, group in groups.items()), key=lambda pair: -pair[1]["ms"]))


def busy_ms(kernels: Iterable[Kernel]) -> float:
    """Milliseconds in which one of the kernels ran."""
    return sum(end - begin for begin, end in _union(kernels)) / 1e3


def overlap_ms(these: Iterable[Kernel], those: Iterable[Kernel]) -> float:
    """Milliseconds in which one of `these` and one of `those` ran."""
    others, both = list(_union(those)), 0.0
    for begin, end in _union(these):
        both += sum(max(0.0, min(end, last) - max(begin, first)) for first, last in others)
    return both / 1e3


def _union(kernels: Iterable[Kernel]) -> Iterator[tuple[float, float]]:
    begin = end = -math.inf
    for kernel in sorted(kernels, key=lambda kernel: kernel.begin):
        if kernel.begin > end:
            if end > begin:
                yield begin, end
            begin = kernel.begin
        end = max(end, kernel.begin + kernel.duration)
    if end > begin:
        yield begin, end


def _leaves(operators: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The operators that call no other operator, thread by thread."""
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for event in operators:
        threads[event["tid"]].append(event)
    for events in threads.values():
        ordered = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
        for event, following in zip(ordered, [*ordered[1:], None], strict=True):
            if following is None or following["ts"] >= event["ts"] + event["dur"]:
                yield event


def _sum(group: Sequence[Kernel]) -> dict[str, Any]:
    """Count and milliseconds; GFLOP and GB, each with the milliseconds of the kernels for which it is known."""
    summed: dict[str, Any] = {"count": len(group), "ms": sum(kernel.duration for kernel in group) / 1e3}
    for name, unit in (("flops", "gflop"), ("bytes", "gbyte")):
        known = [(value, kernel.duration) for kernel in group if (value := getattr(kernel, name)) is not None]
        summed[unit] = sum(value for value, _ in known) / 1e9
        summed[f"{unit}_ms"] = sum(duration for _, duration in known) / 1e3
    return summed


def _work(operator: str, recorded: dict[str, Any]) -> tuple[float | None, float | None]:
    """FLOPs and bytes of an operator with its `recorded` arguments; None if they are not known.

    Bytes are those of all arguments, each counted once, and of a product's output: the least that must be moved if the
    kernel reads its arguments whole.
    """
    dims, types = recorded.get("Input Dims", []), recorded.get("Input type", [])
    tensors = [(dim, BYTES[kind]) for dim, kind in zip(dims, types, strict=False) if dim and kind in BYTES]
    if any(isinstance(each, list) for dim, _ in tensors for each in dim) or not tensors:
        return None, None
    moved = float(sum(math.prod(dim) * size for dim, size in tensors))
    shapes, width = [dim for dim, _ in tensors], tensors[0][1]
    name = operator.removeprefix("aten::")
    if name in PRODUCTS and len(shapes) >= PRODUCTS[name]:
        count = PRODUCTS[name]
        first, second = shapes[count - 2 : count]
        output = math.prod([*first[:-1], second[-1]])
        written = 0 if len(shapes) == count + 1 else output * max(2, width)  # else it is among the arguments
        return 2.0 * output * first[-1], moved + written
    if "attention" in name and len(shapes[0]) == 4:
        batch, heads, tokens, head_dim = shapes[0]  # shape of the queries; in the backward pass, of the gradient
        if name.startswith("_flash"):
            heads, tokens = tokens, heads
        products, outputs = (4, 3) if "backward" in name else (2, 1)
        flops = 2.0 * products * batch * heads * tokens**2 * head_dim
        return flops, moved + outputs * math.prod(shapes[0]) * width
    return (None, moved) if operator.startswith("triton_") or name == "copy_" else (None, None)
