"""The paper's recipe and the additions, one by one and together, at equal training compute.

Letters at 64 px. Every training takes as many floating-point operations as the paper's recipe takes over `IMAGES`.
"""

from pathlib import Path
from statistics import fmean

from jitscale.figures import COLOURS, figure, mean_and_deviation, plus_minus
from studies.run import SHORT_AVERAGE, flops_of, images_at, seeded
from studies.tasks import Outcomes, Shards, Summary, Task, by_seed, difference, ends
from studies.ways import Measured, of_ways

SHARDS: Shards = [("glyphs", 64)]
CONFIG = "glyphs_64.yaml"
IMAGES, SAMPLES = 32_000, 384
# Chosen by sections 11 to 14 of docs/experiments.md: settings of training and settings of sampling.
ADDED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rank 8": (("diffusion.prediction=asym", "diffusion.rank=8"), ()),
    "internal guidance": (("model.middle_head=3",), ("evaluation.internal_guidance=3",)),
    "routing": (("model.route_share=0.5", "model.route_blocks=[1,-1]"), ()),
    "ab2": ((), ("evaluation.method=ab2", "evaluation.steps=20")),
}
ROUTED_UNTIL = 0.8  # of a training with routing: the share of its images after which all tokens pass
SAMPLED = ("evaluation.method=heun", "evaluation.steps=15")
SCALES = (1.0, 1.5, 3.0)  # of classifier-free guidance
# Heun's method in 10 steps takes about as many evaluations as ab2.
CHANGES = {"10 steps": ((), ("evaluation.steps=10",)), **ADDED}
RECIPES = {"paper": (), **{name: (name,) for name in CHANGES}, "together": tuple(ADDED)}


def way(scale: float) -> str:
    """The name of a way of sampling."""
    return f"scale {scale:g}"


def tasks(seed: int) -> list[Task]:
    """A training for each recipe, shared by recipes that differ in sampling only, and the ways to sample."""
    flops = IMAGES * flops_of(CONFIG, SHORT_AVERAGE)
    found: list[Task] = []
    runs = {}
    for recipe, added in RECIPES.items():
        training = (*SHORT_AVERAGE, *(setting for name in added for setting in CHANGES[name][0]))
        if training not in runs:
            until = ROUTED_UNTIL if "routing" in added else 1.0
            images = images_at(flops, CONFIG, training, until)
            route = (f"run.route_until_images={round(until * images)}",) if until < 1.0 else ()
            own = (*training, *route, f"evaluation.num_images={SAMPLES}")
            runs[training] = seeded(f"trained_{_identifier(recipe)}", seed, CONFIG, images, *own)
            found.append(runs[training])
        sampling = (*SAMPLED, *(setting for name in added for setting in CHANGES[name][1]))
        ways = {way(scale): (*sampling, f"evaluation.guidance_scale={scale}") for scale in SCALES}
        run = runs[training]
        found.append(Measured(f"{_identifier(recipe)}_s{seed}", run, ways, after=run.name))
    return found


def _identifier(recipe: str) -> str:
    return recipe.replace(" ", "_")


def summarise(outcomes: Outcomes) -> Summary:
    """Distances, labels and evaluations of sampling by recipe, way and seed; images of the trainings."""
    trained = {name: by_seed(outcomes, f"trained_{_identifier(name)}") for name in RECIPES}
    return {
        "images": {name: seeds[0]["measurements"][-1]["images"] for name, seeds in trained.items() if seeds},
        "seconds": {name: [seed["training_seconds"] for seed in seeds] for name, seeds in trained.items() if seeds},
        "floor": ends(outcomes, "trained_paper", "fid_floor")[0],
        **{
            key: {name: of_ways(outcomes, _identifier(name), key) for name in RECIPES}
            for key in ("fid", "label_agreement", "evaluations")
        },
    }


def draw(summary: Summary, path: Path) -> None:
    """Distances of the recipes without and with classifier-free guidance, and evaluations of the network."""
    width = 0.8 / len(SCALES)
    with figure(path, panels=1, width=7.0) as (axis,):
        for number, scale in enumerate(SCALES):
            places = [at + width * (number - (len(SCALES) - 1) / 2) for at in range(len(RECIPES))]
            found = [mean_and_deviation(summary["fid"][name][way(scale)]) for name in RECIPES]
            means, deviations = zip(*found, strict=True)
            label = f"guidance {scale:g}" if scale != 1.0 else "no classifier-free guidance"
            axis.bar(places, means, 0.9 * width, yerr=deviations, capsize=2, color=COLOURS[number], label=label)
            for place, name, mean, deviation in zip(places, RECIPES, means, deviations, strict=True):
                evaluations = summary["evaluations"][name][way(scale)][0]
                axis.annotate(str(evaluations), (place, mean + deviation), ha="center", va="bottom", fontsize=7)
        axis.axhline(summary["floor"], color="black", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(RECIPES)), [name.replace(" ", "\n", 1) for name in RECIPES])
        axis.set(ylabel="glyphs-FID", title="equal training compute; above each bar: evaluations per image")
        axis.margins(y=0.2)
        axis.legend(ncols=len(SCALES), loc="upper center")


def describe(summary: Summary) -> list[str]:
    """A row for each recipe and way; the difference to the paper's is taken within a seed, with its standard error."""
    images = ", ".join(f"{name} {count:,}" for name, count in summary["images"].items())
    lines = [f"images: {images}; floor {summary['floor']:.2f}"]
    for scale in SCALES:
        paper = summary["fid"]["paper"][way(scale)]
        for name in RECIPES:
            fid, asked = (summary[key][name][way(scale)] for key in ("fid", "label_agreement"))
            evaluations = summary["evaluations"][name][way(scale)][0]
            mean, error = difference(paper, fid)
            words = f"{plus_minus(fid):>16}{f'{mean:+.2f} ±{error:.2f}':>18}{fmean(asked):10.0%}"
            lines.append(f"{way(scale):12}{name:20}{evaluations:4} evaluations{words}")
    both = [summary["fid"][name] for name in ("paper", "together")]
    best = [min(found.values(), key=fmean) for found in both]
    lines.append(f"best of {len(SCALES)} scales: together {plus_minus(best[1])}, the paper's {plus_minus(best[0])}")
    return lines
