"""What training, sampling and reading cost on this machine, and where the time goes.

    python tools/benchmark.py step --config configs/jit_b_256.yaml --batch 4
    python tools/benchmark.py sample --config configs/jit_b_256.yaml --batch 4
    python tools/benchmark.py data
    python tools/benchmark.py checkpoint --config configs/jit_b_256.yaml
    torchrun --nproc-per-node 4 tools/benchmark.py memory --config configs/jit_b_256.yaml

`step` and `sample` run one process with freshly initialised weights and random images; OMP_NUM_THREADS sets the
threads.
`data` reads shards of synthetic photographs that it makes in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from jitscale.benchmarks import checkpoint as saving
from jitscale.benchmarks import data as reading
from jitscale.benchmarks import memory as rank_memory
from jitscale.benchmarks import sample as sampling
from jitscale.benchmarks import step as training_step
from jitscale.benchmarks.conditions import environment
from jitscale.errors import ExitCode, exit_with_message


def main() -> int:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    step = commands.add_parser("step", help="training steps through the ZeRO engine")
    step.set_defaults(measure=training_step.measure, describe=training_step.describe)
    step.add_argument("--steps", type=_positive, default=10, metavar="N", help="measured steps (default: %(default)s)")
    step.add_argument("--warmup", type=_positive, default=2, metavar="N", help="steps before (default: %(default)s)")

    sample = commands.add_parser("sample", help="guided Heun sampling")
    sample.set_defaults(measure=sampling.measure, describe=sampling.describe)
    sample.add_argument("--sampler-steps", type=_positive, default=10, metavar="N", help="default: %(default)s")
    sample.add_argument("--guidance", type=float, default=3.0, metavar="W", help="scale; default: %(default)s")

    data = commands.add_parser("data", help="reading shards: each codec beside stock webdataset, hand-off, resume")
    data.set_defaults(measure=reading.measure, describe=reading.describe)
    data.add_argument(
        "--resolutions", type=_positive, nargs="+", default=[256, 512], metavar="R", help="default: 256 512"
    )
    data.add_argument("--images", type=_positive, default=400, metavar="N", help="photographs; default: %(default)s")
    data.add_argument("--seconds", type=float, default=3.0, metavar="S", help="each reader runs at least so long")
    data.add_argument("--workers", type=_positive, default=2, metavar="N", help="of the hand-off; default: %(default)s")
    data.add_argument("--resume-samples", type=_positive, default=100_000_000, metavar="N", help="default: %(default)s")

    save = commands.add_parser("checkpoint", help="saving, verifying, loading; standing still for it; imports")
    save.set_defaults(measure=saving.measure, describe=saving.describe, batch=1)
    save.add_argument("--repeats", type=_positive, default=3, metavar="N", help="default: %(default)s")
    save.add_argument("--folder", metavar="DIR", help="on the disk to be measured; default: the temporary folder")

    memory = commands.add_parser("memory", help="bytes that ranks hold in each ZeRO stage; start it with torchrun")
    memory.set_defaults(measure=rank_memory.measure, describe=rank_memory.describe)
    memory.add_argument("--stages", type=int, nargs="+", choices=range(4), default=[0, 1, 2, 3], help="default: all")

    for command in (step, sample, save, memory):
        command.add_argument("--config", default="configs/jit_b_256.yaml", metavar="FILE", help="default: %(default)s")
    for command in (step, sample):
        command.add_argument("--batch", type=_positive, default=4, metavar="B", help="images; default: %(default)s")
    for command in (step, sample, data, save, memory):
        command.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    for command in (step, sample, save, memory):
        command.add_argument("overrides", nargs="*", metavar="group.key=value", help="settings that win over the file")
    options = parser.parse_args()

    conditions = environment()
    result = {**options.measure(options), **conditions}
    print(json.dumps(result) if options.json else _table(options.describe(result), conditions))
    return ExitCode.DONE


def _table(lines: list[tuple[str, str]], environment: dict[str, Any]) -> str:
    lines = [*lines, *((name, str(value)) for name, value in environment.items())]
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in lines)])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    exit_with_message(main)
