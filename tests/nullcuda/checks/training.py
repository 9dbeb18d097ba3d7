"""Training to its end in each precision, ZeRO stage and execution mode."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from tests.nullcuda.bench import (
    CHECKS,
    EAGER,
    HARD,
    MEASURE,
    QUIET,
    ROUTED,
    Bench,
    Outcome,
    check,
    launches,
    to_its_end,
)
from tests.nullcuda.checks.steps import waits_of

# The matrix products of Muon in one step: 5 iterations of 3 products, for more than 4 matrices in each of 4 blocks.
OF_MUON = 5 * 3 * 4 * 4


def trains(name: str, settings: Sequence[str], purpose: str) -> None:
    def run(bench: Bench) -> Outcome:
        return to_its_end(bench.train(name, settings))

    run.__name__, run.__doc__ = name, purpose
    CHECKS[name] = (run, False)


for precision, stages in (("autocast", (1, 2, 3)), ("bf16", (1, 2))):
    for stage in stages:
        trains(
            f"{precision}_{stage}",
            [*EAGER, *HARD, f"engine.precision={precision}", f"engine.zero_stage={stage}"],
            f"{precision}, ZeRO stage {stage}: clipped gradients, micro-batches, saves in the background.",
        )
for stage in (2, 3):
    settings = [*EAGER, *HARD, *ROUTED, f"engine.zero_stage={stage}"]
    trains(f"routed_{stage}", settings, f"Routed tokens and a middle output layer, ZeRO stage {stage}.")


@check()
def resume(bench: Bench) -> Outcome:
    """Train in stage 1, resume in stage 3, resume in stage 2 with bf16."""
    parts = (
        ["run.max_steps=3"],
        ["engine.zero_stage=3"],
        ["run.max_steps=9", "engine.zero_stage=2", "engine.precision=bf16"],
    )
    seconds = 0.0
    for number, settings in enumerate(parts):
        done = bench.train(f"resume_{number}", [*EAGER, *settings], {"NULLCUDA_STEP": "2"}, run="resume")
        seconds += done.seconds
        if not (outcome := to_its_end(done)).ok:
            return Outcome(False, f"part {number + 1} of 3: {outcome.figure}")
    return Outcome(True, f"stage 1 -> stage 3 -> stage 2 in bf16, in {seconds:.0f} s")


trains("evaluation", [*EAGER, *MEASURE], "Sampling and FID at the end of a run.")
trains("grey", [*EAGER, *MEASURE, "model.in_channels=1"], "Images of one channel, through training to FID.")
trains("graphs", [*EAGER, *MEASURE, "evaluation.cuda_graphs=true"], "The same, with the network as CUDA graphs.")


@check()
def muon(bench: Bench) -> Outcome:
    """Muon.

    The host waits once, to read whether the gradient is infinite. It must read "no", otherwise no step is taken.
    """
    done = bench.train("muon", [*EAGER, *QUIET, "optim.name=muon"], {"NULL_BOOL": "0"})
    outcome = to_its_end(done)
    if not outcome.ok or done.step is None:
        return outcome
    stepped = done.step["counters"]["product"] > OF_MUON
    waits, pageable, _, places = waits_of(done.step)
    said = f"; {'a step' if stepped else 'no step of Muon'}: {launches(done.step)}; the host waits {waits} times"
    return Outcome(stepped and waits <= 1 and pageable == 0, outcome.figure + said, places)


trains("offload", [*EAGER, "engine.offload_optimizer=true"], "Optimizer state in the CPU's memory.")


@check()
def float8(bench: Bench) -> Outcome:
    """Matrix products in float8, if torchao is installed."""
    there = subprocess.run([sys.executable, "-c", "import torchao"], capture_output=True, check=False).returncode == 0
    if not there:
        return Outcome(True, "not checked: torchao is not installed")
    # Three images have 204 tokens, or 108 routed ones. Neither is a multiple of 16, which the products need.
    odd = bench.train("float8_odd", [*EAGER, *ROUTED, "engine.float8=true", "data.batch_size=3"])
    return to_its_end(odd) if odd.code != 0 else to_its_end(bench.train("float8", [*EAGER, "engine.float8=true"]))


@check()
def compiled(bench: Bench) -> Outcome:
    """Blocks compiled by Inductor for sm_90, the default on GPUs."""
    done = bench.train("compiled", ["engine.compile=true", *QUIET])
    return to_its_end(done) if done.step is None else to_its_end(done, f"; a step: {launches(done.step)}")


@check()
def recompute(bench: Bench) -> Outcome:
    """Compiled blocks with activation checkpointing and dropout 0.2."""
    dropout = ["model.attn_dropout=0.2", "model.proj_dropout=0.2"]
    return to_its_end(bench.train("recompute", ["engine.compile=true", "engine.activation_checkpointing=1", *dropout]))
