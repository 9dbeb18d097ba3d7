"""Plan a run on a cluster before it starts: memory, communication, time, and the settings to choose.

    python tools/plan.py --config configs/jit_g_512.yaml --gpus 64 --gpu-memory 141GB
    python tools/plan.py --config configs/jit_b_256.yaml --gpus 8 --gpu-memory 80GB data.batch_size=512
    python tools/plan.py --config configs/jit_h_256.yaml --gpus 16 --gpu-memory 80GB --hpz --json

Memory and traffic are counted from shapes. The utilisation (--mfu) and the host time were measured on one H200 machine;
times with several GPUs were never measured. If the host limits the step, the plan for fewer GPUs is shown too. 1 GB is
10^9 bytes, 1 GiB is 2^30. Bandwidths are for one GPU in one direction.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from typing import Any

import installed

from jitscale.command import Parser, bytes_of, path_text, positive
from jitscale.config import Config, images_of_run, load_config
from jitscale.errors import ConfigError, ExitCode, exit_with_message
from jitscale.evaluation.cost import measuring_cost
from jitscale.model.flops import forward_flops, mean_training_flops
from jitscale.planner.choice import MIN_GAIN, Candidate, candidate, fewer_gpus, recommend
from jitscale.planner.host import LAUNCH_SECONDS
from jitscale.planner.memory import parameters_by_kind
from jitscale.planner.timing import MFU, Cluster

MOST_PEAK = 1e9  # TFLOP/s
MOST_HOST = 1e6  # ms or microseconds
LAUNCH_HELP = "host time of one launch in microseconds, as measured on one H200 machine"
HOST_HELP = "host time of a step with one micro-batch, if you measured it (default: from depth and launches)"
PAPER_GPUS, PAPER_SHARE = 64, 16  # batch 1024 (arXiv 2511.13720, table 9), laid over 64 GPUs


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, plan and print."""
    parser = Parser(__doc__)  # its options include the fields of `Cluster`
    parser.add_argument(
        "--config", type=path_text, required=True, metavar="FILE", help="configuration, such as configs/jit_g_512.yaml"
    )
    parser.add_argument("--gpus", type=positive, required=True, metavar="N", help="ranks of the run")
    rate = bytes_of("/s")
    parser.add_argument("--gpu-memory", type=bytes_of(), required=True, metavar="SIZE", help="of one GPU, such as 80GB")
    parser.add_number("--gpus-per-node", 8, "GPUs on each node")
    parser.add_number("--bandwidth-intra", "450GB/s", "bandwidth of one GPU inside its node", rate, dest="intra")
    parser.add_number("--bandwidth-inter", "50GB/s", "bandwidth of one GPU's network card", rate, dest="inter")
    parser.add_number("--peak", 989, "bf16 peak of one GPU in TFLOP/s", _number(MOST_PEAK))
    parser.add_number("--mfu", MFU, "fraction of the peak that a step reaches", _number(1.0))
    microseconds = _number(MOST_HOST, zero=True)
    parser.add_number("--launch-us", f"{LAUNCH_SECONDS * 1e6:g}", LAUNCH_HELP, microseconds, dest="launch")
    parser.add_argument("--host-ms", type=_number(MOST_HOST), dest="host", metavar="MS", help=HOST_HELP)
    parser.add_number("--margin", 0.1, "fraction of the memory to leave free", _number(1.0, zero=True))
    parser.add_argument("--hpz", action="store_true", help="stage 3: keep a copy of the weights in each node (ZeRO++)")
    waits = "stages 0 to 2: do not hide communication behind backward"
    parser.add_argument("--no-overlap", action="store_false", dest="overlap", help=waits)
    parser.add_json()
    parser.add_overrides()
    options = parser.parse_intermixed_args(arguments)

    gpus, per_node = options.gpus, options.gpus_per_node
    if gpus > per_node and gpus % per_node:
        full = -(-gpus // per_node) * per_node
        raise ConfigError(f"--gpus {gpus}: must fill nodes of --gpus-per-node {per_node}; for example {full}")
    options.peak, options.launch = options.peak * 1e12, options.launch * 1e-6
    options.host = None if options.host is None else options.host * 1e-3
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in fields(Cluster)})
    config = load_config(options.config, options.overrides, world_size=gpus)
    plan = _plan(config, cluster)
    print(json.dumps(plan) if options.json else _text(plan))
    return ExitCode.DONE


def _plan(config: Config, cluster: Cluster) -> dict[str, Any]:
    """Everything that is printed, in bytes, seconds and images."""
    share = config.data.batch_size // cluster.gpus
    micro_batch = config.engine.micro_batch_size or share
    kinds = parameters_by_kind(config.model)
    stages = (0, 1, 2, 3) if config.engine.precision == "fp32" else (1, 2, 3)
    shown = [
        candidate(config, cluster, stage=stage, micro_batch=micro_batch, activation_checkpointing=every)
        for stage in stages
        for every in (0, 1)
    ]
    paper = replace(cluster, gpus=PAPER_GPUS)
    at_paper = replace(config, data=replace(config.data, batch_size=PAPER_GPUS * PAPER_SHARE))
    at_papers_batch = [candidate(at_paper, paper, stage=stage, micro_batch=PAPER_SHARE) for stage in stages]
    cost = measuring_cost(config)
    choice = recommend(config, cluster)
    fewer = fewer_gpus(config, cluster)
    return {
        "caveat": "Memory and traffic are counted from shapes. Times are estimates from the steps of one H200 machine.",
        "cluster": asdict(cluster),
        "precision": config.engine.precision,
        "batch_size": config.data.batch_size,
        "images_per_gpu": share,
        "micro_batch_size": micro_batch,
        "averages": len(config.ema.decays),
        "images_of_run": images_of_run(config),
        "measuring": {"what": str(cost), "share": cost.share},
        "parameters": {"total": sum(kinds.values())} | kinds,
        "flops_per_image": {"forward": forward_flops(config.model), "training": mean_training_flops(config)},
        "stages": [_described(config, cluster, option) for option in shown],
        "paper_batch": [_described(at_paper, paper, option) for option in at_papers_batch],
        "recommended": None if choice is None else _described(config, cluster, choice),
        "reason": _reason(config, cluster, choice),
        "fewer_gpus": None if fewer is None else {"gpus": fewer[0].gpus} | _described(config, *fewer),
    }


def _described(config: Config, cluster: Cluster, option: Candidate) -> dict[str, Any]:
    rate = config.data.batch_size / option.step_seconds
    seconds = images_of_run(config) / rate
    chosen = {"zero_stage": option.stage, "micro_batch_size": option.micro_batch_size}
    chosen["activation_checkpointing"] = option.activation_checkpointing
    return asdict(option) | {
        "memory": asdict(option.memory) | {"total": option.memory.total},
        "gpu_seconds": option.gpu_seconds,
        "step_seconds": option.step_seconds,
        "host_bound": option.host_bound,
        "images_per_second": rate,
        "images_per_second_per_gpu": rate / cluster.gpus,
        "days": seconds / 86_400,
        "gpu_hours": seconds / 3_600 * cluster.gpus,
        "overrides": [f"engine.{name}={value}" for name, value in chosen.items()],
    }


def _reason(config: Config, cluster: Cluster, choice: Candidate | None) -> str:
    """Why these settings are recommended, or why no settings fit."""
    room = f"{_size(cluster.gpu_memory * (1 - cluster.margin))} (GPU: {_size(cluster.gpu_memory)})"
    if choice is None:
        remedy = "take more GPUs, larger ones, or fewer ema.decays"
        return f"Nothing fits in {room}, not even stage 3 with one image and every block recomputed: {remedy}."
    size, every = choice.micro_batch_size, choice.activation_checkpointing
    parts = config.data.batch_size // cluster.gpus // size
    reasons = [f"Stage {choice.stage} takes {_size(choice.memory.total)} of at most {room}"]
    if choice.stage == 2 and config.engine.precision == "bf16":
        reasons.append("with bf16 weights, stage 1 would reduce whole gradients after backward")
    elif choice.stage > 1:
        lower = [
            candidate(config, cluster, stage=stage, micro_batch=size, activation_checkpointing=every)
            for stage in range(1, choice.stage)
        ]
        slower = f"lower stages fit too, but their steps take more than {MIN_GAIN:.0%} longer"
        reasons.append(slower if any(option.fits for option in lower) else "lower stages do not fit")
    whole = "the whole share of a GPU" if parts == 1 else f"1/{parts} of the share of a GPU"
    again = "blocks must be recomputed to fit" if every else "no block needs to be recomputed"
    return "; ".join([*reasons, f"a micro-batch of {size} images is {whole}", again]) + "."


def _text(plan: dict[str, Any]) -> str:
    cluster, parameters, flops, stages = (plan[key] for key in ("cluster", "parameters", "flops_per_image", "stages"))
    kinds = ", ".join(f"{kind} {count / 1e6:.1f}" for kind, count in parameters.items() if kind != "total")
    hidden = "hidden behind backward if possible" if cluster["overlap"] else "not hidden in stages 0 to 2"
    per_gpu = f"{plan['images_per_gpu']} per GPU, in micro-batches of {plan['micro_batch_size']}"
    run = {
        "parameters": f"{parameters['total']:,} (millions: {kinds})",
        "TFLOP per image": f"{flops['forward'] / 1e12:.4f} forward, {flops['training'] / 1e12:.4f} in training",
        "batch": f"{plan['batch_size']} over {cluster['gpus']} GPUs: {per_gpu}",
        "precision": f"{plan['precision']}, {plan['averages']} averages",
        "run": f"{plan['images_of_run']:,} images",
        "measuring": plan["measuring"]["what"],
    }
    sizes_of = ["weights", "gradients", "masters", "moments", "averages", "buckets", "activations", "graphs", "total"]
    memory, time, columns = [], [], ["GPU, ms", "host, ms", "step, ms"]
    for s in stages:
        settings = [str(s["stage"]), "every block" if s["activation_checkpointing"] else "off"]
        sizes = [f"{s['memory'][part] / 1e9:.2f}" for part in sizes_of]
        memory.append([*settings, *sizes, "yes" if s["fits"] else "NO"])
        rates = [f"{s['images_per_second']:.0f}", f"{s['images_per_second_per_gpu']:.1f}"]
        parts = [f"{s[part] * 1e3:.1f}" for part in ("gpu_seconds", "host_seconds", "step_seconds")]
        time.append([*settings, *parts, *rates, f"{s['days']:.2f}", f"{s['gpu_hours']:.0f}"])
    paragraphs = [
        f"{plan['caveat']}\n"
        f"Assumptions: products run at {cluster['mfu']:.0%} of {cluster['peak'] / 1e12:g} TFLOP/s; communication at "
        f"{cluster['intra'] / 1e9:g} GB/s per GPU in a node and {cluster['inter'] / 1e9:g} GB/s between nodes, {hidden}"
        f"; {cluster['margin']:.0%} of the memory left free.",
        _table(["", ""], run.items()),
        "Memory of a GPU in GB, at the peak of the gradients. Buckets hold gradients that are reduced and weights that "
        "are gathered. Graphs is the additional memory of CUDA graphs.",
        _table(["stage", "checkpointing", *sizes_of, "fits"], memory),
        f"Communication of a step at this batch ({plan['images_per_gpu']} images per GPU):",
        _communication_table([s for s in stages if s["activation_checkpointing"] == 0]),
        f"The same at the paper's batch ({PAPER_SHARE} images on each of {PAPER_GPUS} GPUs):",
        _communication_table(plan["paper_batch"]),
        "GPUs wait for the part that is not hidden. No batch hides the gather of the new weights after the update.\n"
        "On GPUs, stages 1 to 3 reduce during backward; --no-overlap shows the cost of waiting for all of it.",
        "Time: a step takes the time of the GPUs, or the time in which the host starts its work, whichever is longer:",
        _table(["stage", "checkpointing", *columns, "images/s", "per GPU", "days", "GPU-hours"], time),
        f"Recommended: {plan['reason']}",
    ]
    if (choice := plan["recommended"]) is not None:
        paragraphs[-1] += f"\nEstimate: {_expected(choice)}."
        paragraphs += [_warning(plan)] if choice["host_bound"] else []
        paragraphs.append(" ".join(choice["overrides"]))
    return "\n\n".join(paragraphs)


def _expected(option: dict[str, Any]) -> str:
    step = f"{option['step_seconds'] * 1e3:.0f} ms per step"
    speed = f"{option['images_per_second']:.0f} images/s ({option['images_per_second_per_gpu']:.1f} per GPU)"
    return f"{step}, {speed}, {option['days']:.2f} days, {option['gpu_hours']:.0f} GPU-hours"


def _warning(plan: dict[str, Any]) -> str:
    """The remedy if the host limits the steps of the recommended choice."""
    choice, fewer, share = plan["recommended"], plan["fewer_gpus"], plan["images_per_gpu"]
    gpu, host = (f"{choice[part] * 1e3:.0f} ms" for part in ("gpu_seconds", "host_seconds"))
    found = f"WARNING: {share} images per GPU are too few: the host starts a step in {host}, the GPU runs it in {gpu}."
    if fewer is None:
        remedy = "No smaller number of GPUs takes fewer GPU-hours with this batch: increase data.batch_size"
        return f"{found}\n{remedy}, or measure a step and give --host-ms."
    images, settings = plan["batch_size"] // fewer["gpus"], " ".join(fewer["overrides"])
    return f"{found}\nWith --gpus {fewer['gpus']}, {images} images per GPU: {_expected(fewer)}.\nThere: {settings}"


def _communication_table(stages: list[dict[str, Any]]) -> str:
    columns = ["stage", "GB sent per GPU", "ms", "not hidden, ms", "after the update, ms", "share of step"]
    rows = []
    for stage in stages:
        traffic = stage["communication"]
        milliseconds = [f"{traffic[part] * 1e3:.2f}" for part in ("seconds", "exposed", "after_step")]
        share = f"{traffic['exposed'] / stage['step_seconds']:.1%}"
        hiding = str(traffic["hiding_batch"] or "none")
        rows.append([str(stage["stage"]), f"{traffic['bytes'] / 1e9:.2f}", *milliseconds, share, hiding])
    return _table([*columns, "images/GPU that hide the rest"], rows)


def _table(head: list[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _number(most: float, *, zero: bool = False) -> Callable[[str], float]:
    """The type of an option between 0 (included only with `zero`) and `most`."""

    def parse(text: str) -> float:
        with suppress(ValueError):
            value = float(text)
            if 0 < value <= most or (zero and value == 0):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} must be a number between 0 and {most:g}")

    return parse


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
