"""Find the best guidance and average of a run: a sweep on few images, then the best settings on many.

    torchrun --nproc-per-node 8 tools/evaluate_fid.py --checkpoint runs/h \\
        --sweep guidance=1.0:4.0:0.1 ema=all interval=0.1:1.0,0.2:0.8 --coarse 5000 --fine 50000 --keep 3

All ranks share the work; started again, it goes on where it was. It ends with a table, RUN/sweep.json, a figure
RUN/sweep.svg, and RUN/result.json of the best setting.
"""

from __future__ import annotations

import argparse
import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jitscale import parallel
from jitscale.config import FEWEST_SAMPLES, load_config
from jitscale.errors import ConfigError, ExitCode, exit_with_message
from jitscale.evaluation.distributed import Evaluator
from jitscale.evaluation.generate import ready_to_sample
from jitscale.evaluation.sweep import AXES, Setting, measure_settings, settings_of
from jitscale.files import appearing_whole
from jitscale.launcher_environment import adopt_launcher_environment
from jitscale.model.jit import JiT
from jitscale.tracking import Tracker, check_wandb
from jitscale.weights.opening import open_weights, read_guide


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, sweep and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="PATH", help="a run, or any stored weights")
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: the run's config.yaml")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="AXIS=VALUES", help=f"axes: {', '.join(AXES)}")
    parser.add_argument("--coarse", type=int, default=5000, metavar="N", help="images of each; default: %(default)s")
    parser.add_argument("--fine", type=int, metavar="N", help="of the best; default: evaluation.num_images")
    parser.add_argument("--keep", type=int, default=3, metavar="K", help="how many are best; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win, after --")
    options = parser.parse_intermixed_args(arguments)
    overrides = [*options.overrides, *(text for text in options.sweep if "." in text.partition("=")[0])]
    axes = [text for text in options.sweep if "." not in text.partition("=")[0]]

    adopt_launcher_environment()
    path = options.config or options.checkpoint / "config.yaml"
    if not path.exists():
        raise ConfigError(f"{path}: not there; give --config FILE")
    if options.config is None:
        overrides.append(f"run.dir={options.checkpoint}")
    config = load_config(path, overrides, bf16_supported=parallel.bf16_supported)
    fine = options.fine or config.evaluation.num_images
    if min(options.coarse, fine) < FEWEST_SAMPLES or options.keep < 1:
        raise ConfigError(f"--coarse and --fine must be at least {FEWEST_SAMPLES}, --keep at least 1")
    if find_spec("matplotlib") is None:
        raise ConfigError("sweep.svg is drawn by matplotlib, which is not installed: pip install 'jitscale[demo]'")
    stored = open_weights(options.checkpoint, config if options.config is not None else None)
    settings, guide = settings_of(axes, config, stored.weight_sets), read_guide(config)

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    world = parallel.start(parallel.choose_device(config.run.device))
    run_dir = Path(config.run.dir)
    try:
        parallel.together(lambda: stored.verify(world.rank, world.size))
        parallel.together(lambda: check_wandb(config) if world.is_main else None)

        def network(name: str) -> JiT:
            return ready_to_sample(stored.weight_set(name).build(), config, world.device)

        evaluator = Evaluator(config, world, run_dir / "evaluation", guide)
        if world.is_main:
            logging.info("%d settings, %d images each", len(settings), options.coarse)
        coarse = list(measure_settings(settings, network, evaluator, options.coarse))
        best = sorted(coarse, key=lambda result: result["fid"])[: options.keep]
        chosen = [Setting(r["weights"], (r["interval"][0], r["interval"][1]), r["scale"]) for r in best]
        chosen.sort(key=settings.index)  # those of one network together
        precise = list(measure_settings(chosen, network, evaluator, fine, neighbours=True))
        precise.sort(key=lambda result: result["fid"])
        if world.is_main:
            report(coarse, precise, run_dir)
            tracker = Tracker(config, run_dir, True, None)  # the run may be training
            tracker.log_final(final(coarse, precise))
            tracker.close()
        parallel.barrier()  # rank 0 serves the others' rendezvous: it must not leave first
    finally:
        parallel.stop()
    return ExitCode.DONE


def final(coarse: list[dict[str, Any]], fine: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of the best setting, and the sweep's table."""
    table = [
        {**result, "guidance_scale": result["scale"], "guidance_interval": result["interval"]}
        for result in [*coarse, *fine]
    ]
    best = {name: table[len(coarse)][name] for name in ("weights", "guidance_scale", "guidance_interval")}
    return {**fine[0], "best": best, "table": table}


def report(coarse: list[dict[str, Any]], fine: list[dict[str, Any]], run_dir: Path) -> None:
    """Write and print the results, the best one last."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with appearing_whole(run_dir / "sweep.json") as file:
        file.write(json.dumps({"coarse": coarse, "fine": fine}, indent=1).encode())
    with appearing_whole(run_dir / "result.json") as file:
        file.write(json.dumps(fine[0], indent=2).encode())
    print(f"{'weights':16}{'interval':>14}{'guidance':>10}{'images':>9}{'FID':>12}{'IS':>10}")
    for result in [*sorted(coarse, key=lambda r: -r["fid"]), *reversed(fine)]:
        interval = ":".join(f"{t:g}" for t in result["interval"])
        print(
            f"{result['weights']:16}{interval:>14}{result['scale']:10g}{result['num_images']:9}{result['fid']:12.3f}"
            f"{result['inception_score']:10.2f}"
        )
    draw(coarse, fine, run_dir / "sweep.svg")
    print(f"best: the last line; {run_dir / 'sweep.json'}, {run_dir / 'sweep.svg'}, {run_dir / 'result.json'}")


def draw(coarse: list[dict[str, Any]], fine: list[dict[str, Any]], path: Path) -> None:
    """FID and IS over guidance, a line for each weight set and interval."""
    from jitscale.figures import MARKERS, figure  # noqa: PLC0415  # matplotlib belongs to an extra

    lines = list(dict.fromkeys((r["weights"], tuple(r["interval"])) for r in coarse))
    with figure(path, panels=2) as panels:
        for axis, key, name in zip(panels, ("fid", "inception_score"), ("FID", "IS"), strict=True):
            for number, (weights, interval) in enumerate(lines):
                own = sorted(
                    (r["scale"], r[key]) for r in coarse if (r["weights"], tuple(r["interval"])) == (weights, interval)
                )
                label = f"{weights}, {interval[0]:g} to {interval[1]:g}"
                axis.plot(*zip(*own, strict=True), label=label, marker=MARKERS[number % len(MARKERS)], markersize=4)
            axis.plot([r["scale"] for r in fine], [r[key] for r in fine], "k*", label=f"{fine[0]['num_images']} images")
            axis.set(xlabel="guidance scale", ylabel=name, title=f"{name}, {coarse[0]['num_images']} images each")
        panels[0].legend(fontsize=7)


if __name__ == "__main__":
    exit_with_message(main)
