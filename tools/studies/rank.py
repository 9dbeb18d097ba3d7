"""Rank-asymmetric prediction: between x-prediction, of rank 0, and v-prediction, of full rank.

The network carries R dimensions of a patch's noise (AsymFlow, arXiv 2605.12964; `jitscale.diffusion.objective`). Digits
and letters, both in patches of 768 numbers. The principal subspace of the data is compared with a random one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jitscale.config import Config, patch_elements
from jitscale.figures import UNCONNECTED, curve_over, figure, plus_minus
from jitscale.training.subspace import random_subspace, write_subspace
from studies.run import Run, seeded
from studies.tasks import Outcomes, Shards, Summary, ends

SHARDS: Shards = [("digits", 32), ("glyphs", 64)]
IMAGES = {"digits": 64_000, "glyphs": 32_000}
CONFIGS = {"digits": "digits_32.yaml", "glyphs": "glyphs_64.yaml"}
RANKS = (2, 4, 8, 16)
FULL = 768
RANDOM = "random_8"
NAMES = {0: "x", **{rank: f"rank_{rank}" for rank in RANKS}, FULL: "v"}  # names of the runs, by rank


@dataclass(frozen=True)
class RandomRun(Run):
    """A run with a random subspace."""

    seed: int = 0

    def load(self, folder: Path, *more: str) -> Config:
        """See `Run`."""
        return super().load(folder, f"diffusion.subspace={self._file(folder)}", *more)

    def execute(self, folder: Path) -> dict[str, Any]:
        """See `Run`."""
        config = self.load(folder)
        drawn = random_subspace(patch_elements(config.model), config.diffusion.rank, self.seed)
        write_subspace(self._file(folder), drawn, {"random": self.seed})
        return super().execute(folder)

    def _file(self, folder: Path) -> Path:
        return (folder / f"{self.name}.safetensors").resolve()


def tasks(seed: int) -> list[Run]:
    """Every rank and the random subspace, for both kinds of data."""
    return [run for data in CONFIGS for run in _runs(data, seed)]


def _runs(data: str, seed: int) -> Iterator[Run]:
    def run(name: str, *settings: str) -> Run:
        return seeded(f"{data}_{name}", seed, CONFIGS[data], IMAGES[data], *settings)

    for rank, name in NAMES.items():
        asym = ("diffusion.prediction=asym", f"diffusion.rank={rank}")
        yield run(name, *(asym if rank in RANKS else (f"diffusion.prediction={name}",)))
    drawn = run(RANDOM, "diffusion.prediction=asym", "diffusion.rank=8")
    yield RandomRun(**vars(drawn), seed=seed)


def summarise(outcomes: Outcomes) -> Summary:
    """Distances and labels by data, run and seed."""
    return {
        "images": IMAGES,
        **{
            key: {data: {name: ends(outcomes, f"{data}_{name}", key) for name in _names()} for data in CONFIGS}
            for key in ("fid", "label_agreement")
        },
        "floor": {data: ends(outcomes, f"{data}_x", "fid_floor")[0] for data in CONFIGS},
    }


def _names() -> list[str]:
    return [*NAMES.values(), RANDOM]


def draw(summary: Summary, path: Path) -> None:
    """Distance over the rank, for both kinds of data. Full rank lies far above the axis, so the title names it."""
    places = {rank: place for place, rank in enumerate((0, *RANKS))}
    with figure(path, panels=2) as axes:
        for axis, data in zip(axes, CONFIGS, strict=True):
            fid = summary["fid"][data]
            curve_over(axis, {place: fid[NAMES[rank]] for rank, place in places.items()}, "principal subspace")
            curve_over(axis, {places[8]: fid[RANDOM]}, "random subspace", 1, **UNCONNECTED)
            axis.set_xticks(list(places.values()), ["0 (x)", *map(str, RANKS)])
            axis.set(xlabel="rank", ylabel=f"{data}-FID", title=f"{data}; rank {FULL} (v): {fmean(fid['v']):.0f}")
            axis.legend()


def describe(summary: Summary) -> list[str]:
    """Distance and labels of each rank."""
    lines = []
    for data in CONFIGS:
        lines.append(f"{data}, {summary['images'][data]:,} images, floor {summary['floor'][data]:.2f}")
        for name in _names():
            agreement = plus_minus([100 * share for share in summary["label_agreement"][data][name]], 5, 1)
            lines.append(f"  {name:9} FID {plus_minus(summary['fid'][data][name], 7)}, as asked {agreement}%")
    return lines
