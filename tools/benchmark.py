"""What training, sampling, reading and measuring cost on this machine, and where the time goes.

    python tools/benchmark.py step --config configs/jit_b_256.yaml --batch 4 --compare reference
    python tools/benchmark.py sample --config configs/jit_b_256.yaml --batch 4 --compare reference
    python tools/benchmark.py attention --config configs/jit_h_256.yaml --batch 16
    python tools/benchmark.py data
    python tools/benchmark.py metrics --images 50000
    python tools/benchmark.py checkpoint --config configs/jit_b_256.yaml
    torchrun --nproc-per-node 4 tools/benchmark.py memory --config configs/jit_b_256.yaml
    python tools/benchmark.py rehearsal --config configs/jit_b_256.yaml

`step`, `sample` and `attention` run one process on the GPU if there is one, with freshly initialised weights and random
images. `step` is the trainer's own step, from shards in a temporary folder. All three need torch, numpy, omegaconf and
tqdm only: without deepspeed `step` measures the same network, optimizer and averages in plain torch, on a batch that is
there already. `--compare reference` measures the authors' way in the same process, in turns.
`data` reads shards of synthetic photographs that it makes in a temporary folder. OMP_NUM_THREADS sets the threads.
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from benchmarks.conditions import environment
from jitscale.errors import ExitCode, exit_with_message


def main() -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    step = commands.add_parser("step", help="training steps through the ZeRO engine")
    step.add_argument("--steps", type=_positive, default=10, metavar="N", help="measured steps (default: %(default)s)")
    step.add_argument("--warmup", type=_positive, default=2, metavar="N", help="steps before (default: %(default)s)")
    step.add_argument(
        "--engine", choices=("auto", "zero", "plain"), default="auto", help="auto: zero where deepspeed is, else plain"
    )

    sample = commands.add_parser("sample", help="guided sampling")
    sample.add_argument("--method", choices=("heun", "euler"), default="heun", help="default: %(default)s")
    sample.add_argument("--sampler-steps", type=_positive, default=10, metavar="N", help="default: %(default)s")
    sample.add_argument("--guidance", type=float, default=3.0, metavar="W", help="scale; default: %(default)s")
    sample.add_argument("--repeats", type=_positive, default=1, metavar="N", help="default: %(default)s")

    attention = commands.add_parser("attention", help="attention kernels, forward and backward")
    attention.add_argument("--dropout", type=float, metavar="P", help="default: the configuration's")
    attention.add_argument("--repeats", type=_positive, default=20, metavar="N", help="default: %(default)s")

    data = commands.add_parser("data", help="reading shards: each codec beside stock webdataset, hand-off, resume")
    data.add_argument(
        "--resolutions", type=_positive, nargs="+", default=[256, 512], metavar="R", help="default: 256 512"
    )
    data.add_argument("--images", type=_positive, default=400, metavar="N", help="photographs; default: %(default)s")
    data.add_argument("--seconds", type=float, default=3.0, metavar="S", help="each reader runs at least so long")
    data.add_argument("--workers", type=_positive, default=2, metavar="N", help="of the hand-off; default: %(default)s")
    data.add_argument("--resume-samples", type=_positive, default=100_000_000, metavar="N", help="default: %(default)s")

    metrics = commands.add_parser("metrics", help="FID and the other numbers, from features")
    metrics.add_argument("--images", type=_positive, default=50_000, metavar="N", help="default: %(default)s")

    save = commands.add_parser("checkpoint", help="saving, verifying, loading; standing still for it; imports")
    save.set_defaults(batch=1)
    save.add_argument("--repeats", type=_positive, default=3, metavar="N", help="default: %(default)s")
    save.add_argument("--folder", metavar="DIR", help="on the disk to be measured; default: the temporary folder")

    memory = commands.add_parser("memory", help="bytes that ranks hold in each ZeRO stage; start it with torchrun")
    memory.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="default: all")

    rehearsal = commands.add_parser("rehearsal", help="the whole path at full shape with small counts")
    rehearsal.add_argument("--images", type=_positive, default=1000, metavar="N", help="crops; default: %(default)s")
    rehearsal.add_argument("--ranks", type=_positive, default=2, metavar="R", help="default: %(default)s")
    rehearsal.add_argument("--batch", type=_positive, default=8, metavar="B", help="images; default: %(default)s")
    rehearsal.add_argument("--folder", metavar="DIR", help="for all files; default: the temporary folder")

    for command in (step, sample, attention, save, memory, rehearsal):
        command.add_argument("--config", default="configs/jit_b_256.yaml", metavar="FILE", help="default: %(default)s")
    for command in (step, sample, attention):
        command.add_argument("--batch", type=_positive, default=4, metavar="B", help="images; default: %(default)s")
    for command in (step, sample):
        command.add_argument("--compare", choices=("reference",), help="the authors' way beside ours")
    for command in (step, sample, attention, data, metrics, save, memory, rehearsal):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    for command in (step, sample, attention, save, memory, rehearsal):
        command.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win over the file")
    options = parser.parse_args()

    # Only what is measured is imported: a machine need not have the packages of the others.
    measurement = importlib.import_module(f"benchmarks.{options.command}")
    conditions = environment()
    result = {**conditions, **measurement.measure(options)}
    print(json.dumps(result) if options.json else _table(measurement.describe(result), result))
    return ExitCode.DONE


CONDITIONS = (
    "device",
    "cuda",
    "cudnn",
    "torch",
    "deepspeed",
    "flash-attn",
    "flash-attn-4",
    "torchao",
    "threads",
    "load",
    "date",
)


def _table(lines: list[tuple[str, str]], result: dict[str, Any]) -> str:
    lines = [*lines, *((name, str(result[name])) for name in CONDITIONS if name in result)]
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in lines)])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
