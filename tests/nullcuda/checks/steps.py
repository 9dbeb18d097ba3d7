"""The work that one training step gives the GPU: waits, reductions, launches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tests.nullcuda.bench import (
    CHECKS,
    EAGER,
    QUIET,
    ROUTED,
    STEP,
    Bench,
    Finished,
    Outcome,
    check,
    launches,
    unrecorded,
)

REDUCED_EARLY = 0.5  # share of the gradient elements that are reduced before the backward pass ends
GRADIENT_ELEMENTS = 1000  # in elements; smaller collectives exchange norms and flags
SIZE_OF_B = [
    *(*EAGER, *QUIET, "run.max_steps=5"),
    *("model.hidden_size=768", "model.depth=12", "model.num_heads=12", "model.in_context_start=4"),
]


def waits_of(step: dict[str, Any]) -> tuple[int, int, int, list[str]]:
    """The number of host waits, of pageable copies and of late reads of an event, and the places of all of them.

    A read is late if at least half a step of launches lies between the record of the event and the wait.
    """
    counted = step["counters"]
    half = (counted["launch"] + counted["driver_launch"] + counted["product"]) / 2
    waits = pageable = late = 0
    places = []
    for event in step["events"]:
        what, times = event["what"], event["times"]
        if what == "cudaEventSynchronize" and event["count"] >= half:
            late += times
            places.append(f"{times} x {what}, late ({event['count']} launches after the record): {event['place']}")
            continue
        if what.startswith("cuda"):
            waits += times
        elif what.startswith("pageable"):
            pageable += times
        else:
            continue
        places.append(f"{times} x {what}, {event['phase']}: {event['place']}")
    return waits, pageable, late, places


def judged_waits(done: Finished) -> Outcome:
    if done.step is None:
        return Outcome(False, unrecorded(done))
    waits, pageable, late, places = waits_of(done.step)
    ok = done.code == 0 and waits == 0 and pageable == 0 and late <= 1
    return Outcome(
        ok, f"the host waits {waits} times per step, {pageable} pageable copies, {late} late reads of an event", places
    )


@check()
def waits(bench: Bench) -> Outcome:
    """Host synchronisations of a default training step: none, except the late verdict on the step before."""
    return judged_waits(bench.train("waits", [*EAGER, *QUIET]))


@check()
def waits_routed(bench: Bench) -> Outcome:
    """The same with routed tokens and a middle output layer."""
    return judged_waits(bench.train("waits_routed", [*EAGER, *QUIET, *ROUTED]))


def no_waits(precision: str, stage: int, ranks: int) -> None:
    """Add the check of waits for one precision, ZeRO stage and number of ranks, with micro-batches and clipping."""
    name = f"waits_{precision}_{stage}_ranks_{ranks}"
    settings = [*EAGER, *QUIET, f"engine.precision={precision}", f"engine.zero_stage={stage}"]
    settings += ["optim.grad_clip=1.0", f"engine.micro_batch_size={8 // ranks}"]

    def run(bench: Bench) -> Outcome:
        if ranks == 1:
            return judged_waits(bench.train(name, settings))
        return judged_waits(bench.ranks(name, settings, "8")[0])

    run.__name__, run.__doc__ = name, f"The same: {precision}, stage {stage}, {ranks} ranks, clipped."
    CHECKS[name] = (run, False)


for _precision in ("fp32", "autocast", "bf16"):
    for _stage in (1, 2):
        no_waits(_precision, _stage, ranks=1)
    # On one rank, stage 3 has nothing to shard, and DeepSpeed waits at each fetch. On several ranks, DeepSpeed bounds
    # its memory: it waits for events of earlier fetches and reductions if more than a few are pending. Events of this
    # CUDA are always complete, so these waits are not visible here.
    # of earlier fetches and reductions if more than a few are under way, so that memory stays bounded: events of this
    # CUDA are always over, so that these waits are not seen here.
    for _stage in (1, 2, 3):
        no_waits(_precision, _stage, ranks=2)


def judged_reduction(done: Finished) -> Outcome:
    if done.step is None:
        return Outcome(False, unrecorded(done))
    early: list[int] = []
    late: list[int] = []
    for event in done.step["events"]:
        if re.match("nccl(AllReduce|ReduceScatter|Reduce)$", event["what"]) and event["count"] >= GRADIENT_ELEMENTS:
            (early if event["phase"] == "backward" else late).extend([event["count"]] * event["times"])
    total = sum(early) + sum(late)
    if total == 0:
        return Outcome(False, "no reduction of gradients was seen")
    share = sum(early) / total
    largest = max([*early, *late])
    return Outcome(
        share >= REDUCED_EARLY,
        f"{share:.0%} of {total / 1e6:.0f} M gradient elements are reduced during the backward pass, "
        f"in {len(early)} of {len(early) + len(late)} collectives, the largest of {largest / 1e6:.0f} M",
    )


@check()
def reduction(bench: Bench) -> Outcome:
    """Gradients of a network of JiT-B's size are reduced while the backward pass runs, not after it."""
    return judged_reduction(bench.train("reduction", SIZE_OF_B, {"NULLCUDA_STOP": "1"}))


def reductions(stage: int) -> None:
    """Add the check of reductions for two ranks in one ZeRO stage."""
    name = f"reduction_{stage}_ranks_2"

    def run(bench: Bench) -> Outcome:
        settings = [*SIZE_OF_B, f"engine.zero_stage={stage}"]
        return judged_reduction(bench.ranks(name, settings, "8", {"NULLCUDA_STOP": "1"})[0])

    run.__name__, run.__doc__ = name, f"The same: stage {stage}, 2 ranks."
    CHECKS[name] = (run, False)


for _stage in (1, 2, 3):
    reductions(_stage)


def full(name: str, recipe: str, settings: Sequence[str], purpose: str) -> None:
    """Add the slow check of a whole step of one of the recipes: 64 images at 256 px, compiled, one rank."""

    def run(bench: Bench) -> Outcome:
        once = [*QUIET, "data.batch_size=64", "run.max_images=null", f"run.max_steps={STEP + 1}"]
        once += ["evaluation.grid_every_images=0", "evaluation.at_end=false", "evaluation.every_images=0"]
        # The final save would write 15 GB of zeros for H, so the run ends itself at the recorded step.
        config = f"configs/jit_{recipe}.yaml"
        done = bench.train(name, [*once, *settings], {"NULLCUDA_STOP": "1"}, small=False, config=config)
        if done.step is None:
            return Outcome(False, unrecorded(done))
        host = 1e3 * done.step["seconds"]
        counted = ", ".join(f"{name} {count}" for name, count in done.step["counters"].items() if count)
        waits = judged_waits(done)
        return Outcome(
            True,
            f"{launches(done.step)}; {host:.0f} ms of host time",
            [waits.figure, judged_reduction(done).figure, counted, *waits.details],
        )

    run.__name__, run.__doc__ = name, purpose
    CHECKS[name] = (run, True)


for _size in ("b", "l", "h"):
    full(f"full_{_size}", f"{_size}_256", [], f"A step of JiT-{_size.upper()} at full size: what the host starts.")
    full(f"full_{_size}_kernels", f"{_size}_256", ["engine.cuda_graphs=false"], "The same without CUDA graphs.")
    full(f"full_{_size}_plus", f"{_size}_256_plus", [], "The same with the additions.")
