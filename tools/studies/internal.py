"""Internal guidance, alone and with classifier-free guidance, and the place of the middle layer.

Letters at 64 px, eight blocks; a second output layer after a quarter, three eighths or half of them, or none.
Classifier-free guidance takes another evaluation of the network, internal guidance none. The numbers of steps are
chosen so that all ways take equally many evaluations.
"""

from pathlib import Path
from statistics import fmean

from jitscale.figures import curve_over, figure, plus_minus
from studies.run import SHORT_AVERAGE, seeded
from studies.tasks import Outcomes, Shards, Summary, Task, difference, ends
from studies.ways import Measured, of_ways

SHARDS: Shards = [("glyphs", 64)]
IMAGES, SAMPLES = 32_000, 384
HEADS = (0, 2, 3, 4)  # blocks before the middle layer; 0: there is none
INTERNAL = (1.0, 1.5, 2.0, 3.0)
SCALES = (1.25, 1.5, 2.0, 3.0)  # of classifier-free guidance, without a middle layer
SCALE = 1.5  # of classifier-free guidance, with a middle layer
# Both take 29 evaluations by Heun's method: 15 steps, or 8 steps of which all but the first are guided.
STEPS, GUIDED_STEPS = 15, 8


def way(internal: float, scale: float = 1.0) -> str:
    """The name of a way of sampling."""
    return f"{internal:g} {scale:g}"


def ways(head: int) -> dict[str, tuple[str, ...]]:
    """The ways to sample from a network with a middle layer after `head` blocks, with their settings."""
    chosen = [(1.0, 1.0), *((1.0, scale) for scale in SCALES)]
    if head > 0:
        chosen = [(internal, scale) for scale in (1.0, SCALE) for internal in INTERNAL]
    return {
        way(internal, scale): (
            f"evaluation.internal_guidance={internal}",
            f"evaluation.guidance_scale={scale}",
            f"evaluation.steps={STEPS if scale == 1.0 else GUIDED_STEPS}",
        )
        for internal, scale in chosen
    }


def tasks(seed: int) -> list[Task]:
    """A training for each place of the middle layer, and the ways to sample from its network."""
    own = (*SHORT_AVERAGE, "model.depth=8", f"evaluation.steps={STEPS}", f"evaluation.num_images={SAMPLES}")
    found: list[Task] = []
    for head in HEADS:
        run = seeded(f"head_{head}", seed, "glyphs_64.yaml", IMAGES, *own, f"model.middle_head={head}")
        found += [run, Measured(f"guided_{head}_s{seed}", run, ways(head), after=run.name)]
    return found


def summarise(outcomes: Outcomes) -> Summary:
    """Distances, labels and evaluations by middle layer, way and seed."""
    return {
        "images": IMAGES,
        "samples": SAMPLES,
        "floor": ends(outcomes, "head_0", "fid_floor")[0],
        **{
            key: {str(head): of_ways(outcomes, f"guided_{head}", key) for head in HEADS}
            for key in ("fid", "label_agreement", "evaluations")
        },
    }


def draw(summary: Summary, path: Path) -> None:
    """Distance over internal guidance, without and with classifier-free guidance."""
    fid = summary["fid"]
    with figure(path, panels=2) as axes:
        for axis, scale in zip(axes, (1.0, SCALE), strict=True):
            for number, head in enumerate(HEADS[1:], start=1):
                found = {w: fid[str(head)][way(w, scale)] for w in INTERNAL}
                curve_over(axis, found, f"middle layer after {head} of 8 blocks", number)
            without = fmean(fid["0"][way(1.0, scale)])
            axis.axhline(without, color="black", linewidth=0.8, linestyle=":", label="no middle layer")
            evaluations = summary["evaluations"][str(HEADS[-1])][way(1.0, scale)][0]
            axis.set(xlabel="internal guidance w", ylabel="glyphs-FID")
            guided = "no classifier-free guidance" if scale == 1.0 else f"classifier-free guidance {scale:g}"
            axis.set_title(f"{guided}, {evaluations} evaluations", fontsize=9)
            axis.margins(y=0.25)
        plain = {scale: fid["0"][way(1.0, scale)] for scale in (1.0, *SCALES)}
        curve_over(axes[0], plain, "classifier-free guidance, its scale", 0, linestyle="--")
        for axis in axes:
            axis.legend()


def describe(summary: Summary) -> list[str]:
    """A row for each way; the difference to the plain network is taken within a seed, with its standard error."""
    lines = [f"{summary['images']:,} images, {summary['samples']} samples, floor {summary['floor']:.2f}"]
    plain = summary["fid"]["0"][way(1.0)]
    lines.append(
        f"{'middle layer, w, guidance':28}{'evaluations':>12}{'glyphs-FID':>16}{'less the plain':>18}  as asked"
    )
    for head in HEADS:
        for name, fid in summary["fid"][str(head)].items():
            mean, error = difference(plain, fid)
            asked = fmean(summary["label_agreement"][str(head)][name])
            row = f"after {head}, {name}" if head else f"none, {name}"
            evaluations = summary["evaluations"][str(head)][name][0]
            lines.append(f"{row:28}{evaluations:12}{plus_minus(fid):>16}{f'{mean:+.2f} ±{error:.2f}':>18}{asked:10.0%}")
    return lines
