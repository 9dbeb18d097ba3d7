"""Print the results of `suite` as Markdown tables, in the form of docs/performance.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.correct import describe_comparison
from benchmarks.measuring import CONDITIONS
from benchmarks.profile import NAME_LENGTH
from benchmarks.suite import DONE, RESULTS, read_results
from benchmarks.suite_items import items
from jitscale.errors import UserError, first_line

Records = dict[str, dict[str, Any]]
BASE = "step-h-64"  # the switches are compared with it
OPERATORS_LENGTH = 40
AS_GRAPHS = "blocks as CUDA graphs"  # words of a network's description of its execution


def report(folder: Path) -> str:
    """All tables for which there are results in `folder`.

    Raises a UserError if there are none, or if a result lacks numbers that the tables need.
    """
    records = read_results(folder)
    if not records:
        raise UserError(f"{folder}: no results there; run `tools/benchmark.py suite --out {folder}` first")
    done = {name: record["result"] for name, record in records.items() if record["status"] == DONE}
    try:
        sections = [
            _conditions(records, done),
            _steps(done),
            _switches(done),
            *(_profile(name, found) for name, found in done.items() if found["command"] == "profile"),
            _correct(done),
            _samples(done),
            _attention(done),
            _multi(done),
            _failures(records),
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"a result there lacks what the tables need ({type(error).__name__}: {first_line(error)})"
        raise UserError(
            f"{folder / RESULTS}: {what}; another version wrote it, so measure into another folder"
        ) from error
    return "\n\n".join(section for section in sections if section)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; an empty text if there are no rows."""
    lines = [" | ".join(cell.replace("|", "/") for cell in row) for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {line} |" for line in lines)])


def _conditions(records: Records, done: Records) -> str:
    """Card, versions and dates; one line for each group of results that share them."""
    names = [name for name in CONDITIONS if name not in ("load", "threads")]
    kinds: dict[tuple[str, ...], list[str]] = {}
    for item, found in done.items():
        conditions = tuple(f"{name} {found[name]}" for name in names if name in found)
        kinds.setdefault((*conditions, f"source {records[item]['source']}"), []).append(item)
    lines = [f"{', '.join(conditions)}: {_counted(members)}." for conditions, members in kinds.items()]
    if any(record["smoke"] for record in records.values()):
        lines.insert(0, "**Tiny sizes (--smoke): these numbers show that the items run, and nothing else.**")
    return "\n\n".join(lines)


def _counted(members: list[str]) -> str:
    return ", ".join(members) if len(members) < 4 else f"{len(members)} items"


def _steps(done: Records) -> str:
    rows, engines = [], set()
    for item in items():
        found = done.get(item.name)
        if item.command != "step" or item.changes or found is None:
            continue
        engines.add(found["engine"])
        rows.append([_label(item.name), _speed(found), _use(found), f"{_memory(found)}; {_compared(found)}"])
    head = ["", "images/s, step (range)", "MFU; share of a large product", "peak memory; the authors' way"]
    return _section("A training step", f"Engine: {'; '.join(sorted(engines))}.", table(head, rows))


def _switches(done: Records) -> str:
    base, rows = done.get(BASE), []
    for item in items():
        found = done.get(item.name)
        if item.command != "step" or not item.changes or found is None:
            continue
        plain = done.get("-".join(item.name.split("-")[:3]))
        ratio = found["images_per_second"] / plain["images_per_second"] if plain else None
        clocks = found["mfu_of_matmul"] / plain["mfu_of_matmul"] if plain else None
        compared = "not compared" if ratio is None else f"{ratio:.3f} ({clocks:.3f})"
        rows.append([f"{_label(item.name)}: {' '.join(item.changes)}", _speed(found), compared, _memory(found)])
    text = "Each is compared with the step of the same size without the switch. Clocks differ between runs, so the "
    text += "ratio in brackets compares the shares of a large product in the same process."
    if base is not None:
        text += f" {_label(BASE)} by itself: {_speed(base)}; {base['execution']}."
    return _section("Switches, one by one", text, table(["", "images/s, step (range)", "ratio", "peak memory"], rows))


def _profile(name: str, found: dict[str, Any]) -> str:
    busy, step = found["busy_ms"], found["ms_per_step"]
    copy, product = found["copy_terabytes_per_second"], found["matmul_tflops_per_second"]
    text = (
        f"A step takes {step:.1f} ms. The device is busy for {busy:.1f} ms of the profiled step "
        f"({busy / step:.1%} of a step without the profiler). The host starts {found['launches']} kernels or graphs, "
        f"and is ready after {found['host_ms']:.1f} ms. A copy in memory reaches {copy:.2f} TB/s, a large product "
        f"{product:.0f} TFLOP/s. Bytes count each argument of a kernel once, as if it were read or written whole. "
        f"Shares are given for kernels whose work is known."
    )
    head = ["", "time, executions", "GB, share of a copy's speed", "TFLOP, share of a large product's"]
    kinds = [[kind, *_work(group)] for kind, group in found["kinds"].items()]
    kernels = [[_kernel_label(group), *_work(group)] for group in found["kernels"]]
    kernels.append(["all others", f"{found['kernels_left_out_ms']:.2f} ms", "", ""])
    if AS_GRAPHS in found["execution"]:
        text += " The work of kernels that a CUDA graph starts is not known."
    changes = next((item.changes for item in items() if item.name == name), ())
    title = f"Where a step goes: {_label(name)} ({', '.join([found['engine'], *changes])})"
    return _section(title, text, f"{table(head, kinds)}\n\n{table(head, kernels)}")


def _kernel_label(group: dict[str, Any]) -> str:
    operator = f" of `{group['operator'][:OPERATORS_LENGTH]}`" if group["operator"] not in ("", group["name"]) else ""
    return f"`{group['name'][:NAME_LENGTH]}`{operator}"


def _work(group: dict[str, Any]) -> list[str]:
    moved = "" if group["copy_share"] is None else f"{group['gbyte']:.2f}, {group['copy_share']:.0%}"
    counted = "" if group["product_share"] is None else f"{group['gflop'] / 1e3:.2f}, {group['product_share']:.0%}"
    return [f"{group['ms']:.2f} ms, {group['count']}", moved, counted]


def _correct(done: Records) -> str:
    rows, details = [], []
    for name, found in done.items():
        if found["command"] != "correct":
            continue
        computed = [each for each in found["comparisons"] if each["error"] is not None]
        nearest = max(computed, key=lambda each: each["error"] / max(each["limit"], 1e-12), default=None)
        closest = "" if nearest is None else f"{nearest['name']}: {describe_comparison(nearest)}"
        absent = sorted({each["note"] for each in found["comparisons"] if each["error"] is None})
        verdict = f"{len(found['wrong'])} wrong" if found["wrong"] else "all right"
        rows.append([name, f"{len(computed)} comparisons, {verdict}", closest, "; ".join(absent)])
        wrong = [each for each in computed if not each["holds"]]
        details += [[name, each["name"], describe_comparison(each)] for each in wrong]
    head = ["", "result", "nearest to its limit", "not computed"]
    text = "The error is relative to the 2-norm of the float64 result; for losses, to the CPU's. "
    text += "If the limit is 0, the error is a count: of tensors that differ, passes without a graph, or values that "
    text += "are not finite."
    tables = [table(head, rows), table(["", "wrong", "error"], details)]
    return _section("Correctness", text, "\n\n".join(each for each in tables if each))


def _samples(done: Records) -> str:
    rows = []
    for name, found in done.items():
        if found["command"] != "sample":
            continue
        compared = f"{found['ratio']:.2f} times the authors' way" if "ratio" in found else ""
        speed = f"{found['images_per_second']:.3g}, {found['seconds']:.2f} s"
        rows.append([f"{name}, {found['sampler_steps']} steps", speed, _use(found), compared])
    return _section("Sampling", "", table(["", "images/s, batch", "MFU; share of a large product", "compared"], rows))


def _attention(done: Records) -> str:
    rows = []
    for name, found in done.items():
        if found["command"] != "attention":
            continue
        for kernel, measured in found["kernels"].items():
            ms, use = measured["ms"], (measured["forward"]["mfu_of_matmul"], measured["backward"]["mfu_of_matmul"])
            shape = " x ".join(map(str, found["shape"]))
            label = f"{name.removeprefix('attention-')[0].upper()}, {shape}, dropout {found['dropout']:g}"
            both = f"{ms['forward']:.3f} ms, {ms['backward']:.3f} ms"
            rows.append([label, kernel, both, f"{use[0]:.1%}, {use[1]:.1%}"])
    return _section("Attention", "", table(["", "kernel", "forward, backward", "share of a large product"], rows))


def _multi(done: Records) -> str:
    rows, speeds = [], []
    for found in done.values():
        if found["command"] != "multi":
            continue
        hidden = "" if found["nccl_hidden"] is None else f", {found['nccl_hidden']:.0%} while other kernels run"
        speed = f"{found['images_per_second']:.4g}, {found['ms_per_step']:.1f} ms"
        rows.append(
            [f"{found['engine']}, {found['ranks']} ranks", speed, _use(found), f"{found['nccl_ms']:.1f} ms{hidden}"]
        )
        speeds = [
            [f"{int(size) / 2**20:g} MiB", f"{gigabytes:.3g} GB/s"]
            for size, gigabytes in found["all_reduce_gigabytes_per_second"].items()
        ]
    head = ["", "images/s, step", "MFU; share of a large product", "collectives of a step"]
    tables = [table(head, rows), table(["all-reduce", "over each link"], speeds)]
    return _section("Several GPUs", "", "\n\n".join(each for each in tables if each))


def _failures(records: Records) -> str:
    rows = [[name, record["status"], record["reason"]] for name, record in records.items() if record["status"] != DONE]
    missing = [item.name for item in items() if item.name not in records]
    text = f"Not measured: {', '.join(missing)}." if missing else ""
    return _section("Without a result", text, table(["", "what", "reason"], rows)) or (text and f"{text}")


def _section(title: str, text: str, tables: str) -> str:
    return "\n\n".join(part for part in (f"**{title}.** {text}".strip(), tables) if part) if tables else ""


def _label(name: str) -> str:
    """`step-h512-64-stage-2` -> `H/16 at 512 px, 64 images`."""
    _, size, batch, *_ = name.split("-")
    pixels = 512 if size.endswith("512") else 256
    return f"{size[0].upper()} at {pixels} px, {batch} images"


def _speed(found: dict[str, Any]) -> str:
    low, high = found["ms_per_step_range"]
    return f"{found['images_per_second']:.4g}, {found['ms_per_step']:.1f} ms ({low:.1f} to {high:.1f})"


def _use(found: dict[str, Any]) -> str:
    mfu = "not known" if found["mfu"] is None else f"{found['mfu']:.1%}"
    return f"{mfu}; {found['mfu_of_matmul']:.1%} of {found['matmul_tflops_per_second']:.3g}"


def _memory(found: dict[str, Any]) -> str:
    return f"{found['peak_memory_mib'] / 2**10:.1f} GiB"


def _compared(found: dict[str, Any]) -> str:
    if "authors" in found:
        return f"{found['authors']['images_per_second']:.4g} images/s, ours is {found['ratio']:.2f} times as fast"
    return "does not fit next to ours" if "authors_missing" in found else "not measured"
