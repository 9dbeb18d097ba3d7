"""Save in every ZeRO stage and continue, or load the checkpoints of other worlds and continue from there.

Usage: resume_matrix.py save FOLDER
       resume_matrix.py load FOLDER 'SOURCE to PLACE' ...    both as RANKS-STAGE; a PLACE has the ranks of this start
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from jitscale import parallel
from jitscale.checkpoints.format import Checkpoint, Progress, load_fragments
from jitscale.checkpoints.saving import write_folder
from jitscale.training.ema import ShardedEma
from jitscale.training.engine import ZeroEngine
from tests.distributed.programs.zero_parity import GLOBAL_BATCH, STAGES, build, largest_difference, train_step
from tests.support.processes import leave_after

SAVED_AT, END = 4, 7  # in steps; the first step is skipped, so there are fewer optimizer steps

State = dict[str, dict[str, torch.Tensor]]  # set -> parameter -> whole tensor


class Run:
    """An engine and its averages, saved and loaded in the same way as in the trainer."""

    def __init__(self, stage: int, world: parallel.World) -> None:
        model, self.config = build(stage, "fp32", world.size)
        self.engine = ZeroEngine(model, self.config, world)
        self.ema = ShardedEma(self.config.ema, self.engine.masters())

    def train(self, start: int, stop: int) -> list[float]:
        return [train_step(self.engine, self.ema, step, poison=step == 0)[0] for step in range(start, stop)]

    def save(self, folder: Path, step: int) -> Checkpoint:
        progress = Progress(step, step * GLOBAL_BATCH, self.engine.optimizer_step(), None, skipped_steps=1)
        return Checkpoint(write_folder(folder, progress, self.config, self.engine.fragments, self._sets()))

    @torch.no_grad()
    def load(self, checkpoint: Checkpoint) -> None:
        sets = self.engine.prepare_to_load(checkpoint.progress.optimizer_step) | self.ema.sets
        assert sets.keys() == set(checkpoint.sets)
        for flats in sets.values():
            for f in self.engine.fragments:
                # A value that is not loaded stays NaN, so that the test finds it.
                flats[f.flat][f.start : f.start + f.length] = float("nan")
        load_fragments(checkpoint, self.engine.fragments, sets)
        self.engine.finish_loading()

    def state(self) -> State:
        """All sets as whole tensors; a collective call."""
        return {name: self.engine.gather(flats) for name, flats in self._sets().items()}

    def _sets(self) -> dict[str, list[torch.Tensor]]:
        return {"model": self.engine.masters(), **self.ema.sets, **self.engine.moments()}


def state_of(checkpoint: Checkpoint) -> State:
    return {name: {p: checkpoint.tensor(name, p) for p in checkpoint.shapes} for name in checkpoint.sets}


def differing(a: State, b: State) -> list[str]:
    """The sets that are not bit-equal in `a` and `b`."""
    assert a.keys() == b.keys()
    return [name for name in a if not all(torch.equal(a[name][p], b[name][p]) for p in b[name])]


def save(folder: Path, world: parallel.World) -> dict[str, Any]:
    results = {}
    for stage in STAGES:
        run, name = Run(stage, world), f"{world.size}-{stage}"
        run.train(0, SAVED_AT)
        saved = run.save(folder / name, SAVED_AT)
        written_otherwise = differing(state_of(saved), run.state())
        losses = run.train(SAVED_AT, END)
        end = run.save(folder / f"{name}-end", END)
        results[name] = {
            "losses": losses,
            "differing": written_otherwise,
            "optimizer_steps": [saved.progress.optimizer_step, end.progress.optimizer_step],
        }
        run.engine.destroy()
    return results


def load(folder: Path, world: parallel.World, resumes: list[str]) -> dict[str, Any]:
    """The engine of each stage loads its sources one after another.

    It is fresh before the first source, and has trained further before each other one.
    """
    into: dict[int, list[str]] = {stage: [] for stage in STAGES}
    for resume in resumes:
        source, place = resume.split(" to ")
        into[int(place.removeprefix(f"{world.size}-"))].append(source)
    sources = sorted({source for chosen in into.values() for source in chosen})
    saved = {source: Checkpoint(folder / source) for source in sources}
    states = {source: state_of(checkpoint) for source, checkpoint in saved.items()}
    ends = {source: state_of(Checkpoint(folder / f"{source}-end")) for source in sources}
    results = {}
    for stage in STAGES:
        run = Run(stage, world)
        for source in into[stage][stage:] + into[stage][:stage]:  # Each stage starts with a different source.
            run.load(saved[source])
            loaded_otherwise, steps = differing(states[source], run.state()), run.engine.optimizer_step()
            losses, state = run.train(SAVED_AT, END), run.state()
            results[f"{source} to {world.size}-{stage}"] = {
                "losses": losses,
                "differing": loaded_otherwise,
                "optimizer_steps": [steps, run.engine.optimizer_step()],
                "differing_at_end": differing(ends[source], state),
                "off_at_end": {name: largest_difference(state[name], ends[source][name]) for name in state},
            }
        run.engine.destroy()
    return results


def main() -> None:
    world = parallel.start(torch.device("cpu"))
    action, folder = sys.argv[1], Path(sys.argv[2])
    results = save(folder, world) if action == "save" else load(folder, world, sys.argv[3:])
    if world.is_main:
        (folder / f"{action}-{world.size}.json").write_text(json.dumps(results))
    parallel.stop()


if __name__ == "__main__":
    leave_after(main)
