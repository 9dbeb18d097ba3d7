"""Measure the cost of training, sampling, reading and evaluation on this machine, and where the time goes.

    python tools/benchmark.py step --config configs/jit_b_256.yaml --batch 4 --compare authors
    python tools/benchmark.py sample --config configs/jit_b_256.yaml --batch 4 --compare authors
    python tools/benchmark.py attention --config configs/jit_h_256.yaml --batch 16
    python tools/benchmark.py data
    python tools/benchmark.py metrics --images 50000
    python tools/benchmark.py checkpoint --config configs/jit_b_256.yaml
    torchrun --nproc-per-node 4 tools/benchmark.py memory --config configs/jit_b_256.yaml
    python tools/benchmark.py ranks --ranks 4 8 16 24
    python tools/benchmark.py rehearsal --config configs/jit_b_256.yaml
    python tools/benchmark.py suite --minutes 9 --out DIR
    python tools/benchmark.py report DIR

`suite` measures everything that matters on a GPU, item by item, for --minutes. The same command again continues with
the missing items. `report` prints the results as tables. The items are commands of this tool: `correct` compares the
GPU's results with float64, or its training with the CPU's; `profile` compares the kernels of a step with the roofline;
`multi` measures several GPUs.

`step`, `sample` and `attention` run one process, on the GPU if there is one, with freshly initialised weights and
random images. `step` is the trainer's own step, from shards in a temporary folder. These three, `correct` and
`profile` need torch, numpy, pyyaml and tqdm only. Without deepspeed, `step` measures the same network, optimizer and
averages in plain torch, on a batch that is already on the device. Without OmegaConf, a configuration is read without
interpolations. `--compare authors` also measures our reproduction of the authors' way, in the same process, in turns.
`data` writes synthetic photographs into shards in a temporary folder and reads them. OMP_NUM_THREADS sets the threads.
"""

import argparse
import importlib
import json
import math
import os
from pathlib import Path

import installed

from benchmarks.measuring import describe_conditions, environment
from benchmarks.suite_items import CASES, PARTS, names
from jitscale.command import Parser, markdown, path_text, positive
from jitscale.config import CHOICES
from jitscale.errors import ExitCode, exit_with_message

LEAST_MINUTES = 0.5  # smallest budget of `suite`, which keeps some seconds to end an item


def main() -> int:
    """Parse the command line, measure and print."""
    options = _parser().parse_args()
    # Import the chosen measurement only: a machine may lack the packages of the others. Its `measure` returns the
    # numbers, its `describe` the lines of their table.
    measurement = importlib.import_module(f"benchmarks.{options.command}")
    if options.command == "report":
        print(measurement.report(options.folder))
        return ExitCode.DONE
    load = os.getloadavg()[0]  # before the measurement adds to it
    # Keep the numbers together with their options and conditions.
    result = {**vars(options), **measurement.measure(options), **environment(), "load": load}
    lines = [*measurement.describe(result), *describe_conditions(result)]
    print(json.dumps(result) if options.json else markdown(lines))
    return ExitCode.DONE


def _minutes(text: str) -> float:
    """Enough time to begin an item and to end it."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not LEAST_MINUTES <= minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes from {LEAST_MINUTES:g} on")
    return minutes


def _part(text: str) -> str:
    if text not in names():
        known = f"the parts are {', '.join(PARTS)}, and `suite --list --out DIR` shows the items"
        raise argparse.ArgumentTypeError(f"{text!r} is neither a part nor an item; {known}")
    return text


def _parser() -> Parser:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    step = commands.add_parser("step", help="training steps through the ZeRO engine")
    step.add_number("--steps", 10, "measured steps")
    step.add_number("--warmup", 2, "steps before them")
    engines = "auto: zero where deepspeed is, else plain"
    step.add_argument("--engine", choices=("auto", "zero", "plain"), default="auto", help=engines)

    sample = commands.add_parser("sample", help="guided sampling")
    sample.add_argument("--method", choices=CHOICES["evaluation.method"], default="heun", help="default: %(default)s")
    sample.add_number("--sampler-steps", 10, "steps of the sampler")
    sample.add_number("--guidance", 3.0, "scale", float)
    sample.add_number("--repeats", 1, "measured batches")

    attention = commands.add_parser("attention", help="attention kernels, forward and backward")
    attention.add_argument("--dropout", type=float, metavar="P", help="default: the configuration's")
    attention.add_number("--repeats", 20, "measured passes of each kernel")

    data = commands.add_parser("data", help="reading shards: each codec next to stock webdataset, hand-off, resume")
    sizes = [256, 512]
    data.add_argument("--resolutions", type=positive, nargs="+", default=sizes, metavar="R", help="default: 256 512")
    data.add_number("--images", 400, "photographs")
    data.add_number("--seconds", 3.0, "shortest time of each reader", float)
    data.add_number("--workers", 2, "loader processes of the hand-off")
    data.add_number("--resume-samples", 100_000_000, "samples of the data set in which the resume happens")

    metrics = commands.add_parser("metrics", help="FID and the other numbers, from features")
    metrics.add_number("--images", 50_000, "real images, and as many generated ones")

    save = commands.add_parser(
        "checkpoint", help="time of saving, verifying and loading; how long training stalls; imports"
    )
    save.set_defaults(batch=1)
    save.add_number("--repeats", 3, "measured saves of each kind")

    memory = commands.add_parser("memory", help="memory of each rank in each ZeRO stage; start it with torchrun")
    stages = CHOICES["engine.zero_stage"]
    memory.add_argument("--stages", type=int, nargs="+", choices=stages, default=stages, help="default: all")

    rehearsal = commands.add_parser("rehearsal", help="the whole path at full size with few images and steps")
    rehearsal.add_number("--images", 1000, "crops")
    rehearsal.add_number("--ranks", 2, "ranks of the training")
    rehearsal.add_number("--batch", 8, "images of a step")

    ranks = commands.add_parser("ranks", help="messages between ranks, and opening shards, by number of ranks")
    ranks.add_argument(
        "--ranks",
        type=positive,
        nargs="+",
        default=[4, 8, 16, 24],
        metavar="N",
        help="numbers of ranks, all on this machine",
    )
    ranks.add_number("--repeats", 40, "measured exchanges of each kind")
    ranks.add_number("--shards", 2000, "shards to open")

    suite = commands.add_parser("suite", help="everything that matters on a GPU, in items; the same command continues")
    suite.add_number("--minutes", 9.0, "begin no item that would end later", _minutes)
    suite.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the results")
    meaning = f"parts ({', '.join(PARTS)}) or items (default: all)"
    suite.add_argument("--parts", nargs="+", type=_part, default=[], metavar="PART", help=meaning)
    suite.add_argument("--wheels", type=Path, metavar="DIR", help="folder of wheels for the items, such as DeepSpeed's")
    suite.add_argument("--retry", action="store_true", help="measure failed items again")
    suite.add_argument("--smoke", action="store_true", help="tiny sizes, to show that every item runs")
    suite.add_argument("--list", action="store_true", help="show the items without measuring")

    report = commands.add_parser("report", help="print the results of `suite` as Markdown tables")
    report.add_argument("folder", type=Path, metavar="DIR", help="--out of `suite`")

    correct = commands.add_parser(
        "correct", help="compare the device's results with float64, or its training with the CPU's"
    )
    correct.add_argument("--case", choices=CASES, required=True, help="the comparison")
    correct.add_argument("--smoke", action="store_true", help="tiny sizes")

    roofline = commands.add_parser(
        "profile", help="compare the kernels of a step with the speed of memory and of a large product"
    )
    roofline.add_number("--steps", 5, "steps timed without the profiler")
    roofline.add_number("--warmup", 3, "steps before them")
    roofline.add_number("--rows", 25, "kernels of the table")
    roofline.add_argument("--engine", choices=("auto", "zero", "plain"), default="auto", help=engines)

    multi = commands.add_parser("multi", help="several GPUs: steps, all-reduce, overlap; start it with torchrun")
    multi.add_number("--steps", 6, "measured steps")

    for command in (save, rehearsal):
        command.add_argument(
            "--folder", type=path_text, metavar="DIR", help="folder to write into (default: the temporary folder)"
        )
    for command in (step, sample, attention, roofline):
        command.add_number("--batch", 4, "images")
    multi.add_number("--batch", 4, "images of a rank")
    for command in (step, sample):
        command.add_argument(
            "--compare", choices=("authors",), help="also measure our reproduction of the authors' way"
        )
    for command in (step, sample, attention, save, memory, rehearsal, roofline, multi):
        command.add_argument(
            "--config", type=path_text, default="configs/jit_b_256.yaml", metavar="FILE", help="default: %(default)s"
        )
        command.add_overrides()
    for name, command in commands.choices.items():
        if name != "report":
            command.add_json()
    return parser


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
