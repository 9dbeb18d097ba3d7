"""Execution of a step on a GPU: blocks as CUDA graphs, the fused kernels, and the suite of benchmarks."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence

from tests.nullcuda.bench import (
    CHECKS,
    EAGER,
    KIT,
    MEASURE,
    QUIET,
    ROUTED,
    Bench,
    Finished,
    Outcome,
    check,
    launches,
    to_its_end,
)
from tests.nullcuda.checks.starting import both_ranks

DEPTH, MICRO_BATCHES = 4, 2  # The small network has 4 blocks; the settings below make 2 micro-batches of its 16 images.
DROPOUT = ["model.attn_dropout=0.2", "model.proj_dropout=0.2"]
COMPILED = ["engine.compile=true"]


def judged_graphs(done: Finished, micro_batches: int) -> Outcome:
    """Each block starts one graph forward and one backward in each micro-batch."""
    outcome = to_its_end(done)
    if not outcome.ok or done.step is None:
        return outcome
    found, wanted = done.step["counters"]["graph_launch"], 2 * DEPTH * micro_batches
    wrong = "" if found == wanted else f"; but {wanted} graphs are wanted"
    return Outcome(found == wanted, f"{outcome.figure}; a step: {launches(done.step)}{wrong}")


def training_graphs(
    way: str, ranks: int, settings: Sequence[str], purpose: str, *, micro_batches: int = MICRO_BATCHES
) -> None:
    """Add the check of training with CUDA graphs."""
    name = f"training_graphs_{way}"
    common = [*QUIET, *DROPOUT, "engine.cuda_graphs=true", f"engine.micro_batch_size={16 // ranks // micro_batches}"]

    def run(bench: Bench) -> Outcome:
        if ranks == 1:
            return judged_graphs(bench.train(name, [*common, *settings]), micro_batches)
        done = bench.ranks(name, [*common, *settings], "8")
        outcome = both_ranks(done)
        return judged_graphs(done[0], micro_batches) if outcome.ok else outcome

    run.__name__, run.__doc__ = name, purpose
    CHECKS[name] = (run, False)


training_graphs("eager", 1, EAGER, "Blocks as CUDA graphs in training, with dropout and micro-batches: eager.")
training_graphs("compiled", 1, COMPILED, "The same: compiled blocks, as GPUs have them.")
GRIDS = [*EAGER, *MEASURE, "evaluation.grid_every_images=32"]  # every second step
training_graphs("released", 1, GRIDS, "The same: graphs are freed for each grid of samples, and captured again.")
for stage in (1, 2):
    training_graphs(f"{stage}_ranks_2", 2, [*EAGER, f"engine.zero_stage={stage}"], f"The same: stage {stage}, 2 ranks.")
# The gradients of a single micro-batch stay in the graphs' own memory until the step has used them.
for stage in (0, 1, 2):
    once = [*EAGER, f"engine.zero_stage={stage}", *(["engine.precision=fp32"] if stage == 0 else [])]
    training_graphs(f"{stage}_once", 1, once, f"The same: stage {stage}, without accumulation.", micro_batches=1)
training_graphs("routed", 1, [*EAGER, *ROUTED], "The same: half of the tokens are routed, with a middle output layer.")
training_graphs("routed_compiled", 1, [*COMPILED, *ROUTED], "The same, compiled.")
ENDS = [*EAGER, *ROUTED, "run.route_until_images=32"]  # after two steps of 16 images
training_graphs("route_ends", 1, ENDS, "The same: routing ends, and the graphs are captured again.")


def fused(name: str, settings: Sequence[str], purpose: str) -> None:
    """Add the check of training with the fused kernels."""

    def run(bench: Bench) -> Outcome:
        done = bench.train(name, [*QUIET, *COMPILED, "engine.fused_kernels=triton", *settings])
        outcome = to_its_end(done)
        told = re.search(r"fused kernels ([\w.-]+ [\w.-]+)", done.output)
        if not outcome.ok or done.step is None:
            return outcome
        ok = told is not None and told[1].startswith("triton ")
        said = f"fused kernels {told[1] if told else 'not told'}; a step: {launches(done.step)}"
        return Outcome(ok, f"{outcome.figure}, {said}")

    run.__name__, run.__doc__ = name, purpose
    CHECKS[name] = (run, False)


fused("fused", [*DROPOUT, "engine.cuda_graphs=false"], "The fused kernels, compiled, with dropout, without graphs.")
fused("fused_recompute", ["engine.activation_checkpointing=1", *DROPOUT], "The same: recomputed, in CUDA graphs.")
fused("fused_routed", [*DROPOUT, *ROUTED], "The same in CUDA graphs: routed tokens, a middle layer.")


PATCHED = """import sys
sys.path.insert(0, {kit!r})
import inside
inside.install()
"""
# One tiny item of each command that runs on one GPU.
ITEMS = ["step-h-64-stage-2", "step-h-64-plain", "profile-h-64", "sample-h-64-graphs", "attention-h-0.2"]
ITEMS += ["correct-graphs"]


@check()
def suite(bench: Bench) -> Outcome:
    """The suite of benchmarks in its smoke mode: each item ends with a result, or is refused with a reason."""
    site, out = bench.scratch / "suite_site", bench.scratch / "suite_out"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(PATCHED.format(kit=str(KIT)))
    variables = {"PYTHONPATH": f"{site}:{bench.environment['PYTHONPATH']}", "NULLCUDA_REPORT": "", "NULL_DEVICES": "1"}
    command = [sys.executable, "tools/benchmark.py", "suite", "--smoke", "--minutes", "10", "--out", str(out)]
    done = bench.run("suite", [*command, "--parts", *ITEMS], variables)
    if done.code != 0:
        return Outcome(False, done.why(needed=()))
    records = json.loads((out / "results.json").read_text())["items"]
    states = [records[name]["status"] if name in records else "absent" for name in ITEMS]
    details = [
        f"{name}: {state}{': ' + records[name]['reason'] if state not in ('done', 'absent') else ''}"
        for name, state in zip(ITEMS, states, strict=True)
        if state != "done"
    ]
    ok = set(states) <= {"done", "refused"} and "done" in states
    return Outcome(ok, f"{states.count('done')} of {len(ITEMS)} items have a result, in {done.seconds:.0f} s", details)
