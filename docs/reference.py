"""Print docs/reference.md: python docs/reference.py > docs/reference.md.

The page describes the code and the commands of this checkout, so it is made from them.
"""

import ast
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill

from jitscale.errors import ExitCode
from jitscale.recorded import (
    EVALUATION_METRICS,
    FILES,
    HELD_OUT_METRICS,
    PLACEHOLDERS,
    RESULT_ENTRIES,
    STEP_METRICS,
    WANDB_RECORDS,
    Metric,
)

ROOT = Path(__file__).parents[1]
WIDTH = 100  # columns of the page; tables are wider

# Every command, by the job that it does.
COMMANDS = {
    "Prepare images": (
        *("tools/make_shards.py", "slurm/pack_shards.sh", "tools/index_shards.py", "tools/inspect_shards.py"),
        *("tools/make_digits.py", "tools/make_glyphs.py", "tools/make_pictures.py"),
    ),
    "Choose settings": ("tools/new_config.py", "tools/plan.py", "tools/fit_subspace.py"),
    "Train": (
        *("jitscale/train.py", "slurm/train_jit_b.sh", "slurm/train_jit_l.sh", "slurm/train_jit_h.sh"),
        *("slurm/train_jit_g.sh", "slurm/train_jit_h_512.sh", "tools/submit.py", "tools/demo.py"),
    ),
    "Raise the resolution": ("tools/upgrade_resolution.py", "slurm/upgrade_and_finetune.sh"),
    "Look at a run and measure it": (
        *("tools/gallery.py", "tools/sample.py", "jitscale/evaluate.py", "slurm/evaluate.sh"),
        *("tools/evaluate_fid.py", "tools/posthoc_ema.py", "tools/make_reference.py", "tools/fetch_weights.py"),
    ),
    "Use weights elsewhere": ("tools/convert_checkpoint.py",),
    "Repeat the project's measurements": ("tools/benchmark.py", "tools/experiments.py", "tools/train_features.py"),
    "Inside a Slurm job (the job scripts start these)": (
        "jitscale/launch/supervisor.py",
        "jitscale/launch/preflight.py",
    ),
}

HEAD = """
After this page you know every exit code, every number that a run records, every file of a run's
folder, and every command. The page is made from the code: `make docs` writes it, and a test
compares them. [settings.md](settings.md) lists every setting in the same way.
"""
EXIT_CODES = """
`torchrun` itself ends with code 1 if a rank ends with any code but 0. If a signal kills a process,
the shell shows 128 plus the number of the signal: 137 is SIGKILL, often because memory was full.
"""
STEPS = """
Every `tracking.log_every_steps` steps, and after the last one, the run writes a line into
`metrics.jsonl` and to W&B. A line is one JSON object. W&B does not get `null`.
"""
HELD_OUT = """
After each multiple of `evaluation.held_out_every_images` images, the run writes one more line into
`metrics.jsonl` and to W&B.
"""
EVALUATIONS = """
`evaluations.jsonl` gets a line for each measurement while training (`evaluation.every_images`), and
one for the final evaluation. `RUN/result.json` and `RUN/results/*.json` hold these numbers without
`step`, `images` and `weights`; the second table has their further entries.
"""
WANDB = """
W&B also gets the configuration of the run, and these records.
"""
FOLDER = """
RUN is `run.dir`. Paths are globs below it: `*` stands for any name, `**` for any number of folders.
The outputs of tools that ask for an `--output` are not listed. "Removable" says whether you may
delete the file.
"""
START = """
A file of tools/ runs as `python tools/NAME.py`, a module of the package as `python -m NAME`, a job
script as `sbatch slurm/NAME.sh`. Every command but the job scripts has `--help`.
"""


def page() -> str:
    """The page as Markdown. Raises a ValueError if a command has no place in COMMANDS, or is gone."""
    placed = sorted(path for paths in COMMANDS.values() for path in paths)
    if placed != (there := sorted(commands())):
        raise ValueError(f"docs/reference.py: COMMANDS differs from the files: {sorted({*placed} ^ {*there})}")
    words = [fill(f"- `{word}`: {meaning}", WIDTH, subsequent_indent="  ") for word, meaning in PLACEHOLDERS.items()]
    parts = [
        *("# Reference", HEAD, "## Exit codes", _table(("code", "name", "meaning", "what to do"), _codes())),
        *(EXIT_CODES, "## Metrics", "Words in capitals stand for other text:", "\n".join(words)),
        *("### Steps", STEPS, _metrics(STEP_METRICS), "### Held-out loss", HELD_OUT, _metrics(HELD_OUT_METRICS)),
        *("### Evaluations", EVALUATIONS, _metrics(EVALUATION_METRICS)),
        _table(("key", "form", "meaning"), ([f"`{one.name}`", one.unit, one.meaning] for one in RESULT_ENTRIES)),
        *("### Only in W&B", WANDB, _metrics(WANDB_RECORDS, "form")),
        *("## Files of a run", FOLDER, _table(("path", "written by", "content", "removable"), _files())),
        *("## Commands", START),
    ]
    for job, paths in COMMANDS.items():
        parts += [f"### {job}", _table(("command", "what it does"), ([f"`{_name(p)}`", said(p)] for p in paths))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def commands() -> list[str]:
    """The files that a user can start, below the root of the checkout."""
    python = [path for folder in ("jitscale", "tools") for path in (ROOT / folder).rglob("*.py")]
    found = [path for path in python if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE)]
    found += [path for path in (ROOT / "slurm").glob("*.sh") if path.read_text().startswith("#!")]
    return [path.relative_to(ROOT).as_posix() for path in found]


def said(path: str) -> str:
    """The first sentence of a command's docstring, or of a job script's comment, without an example after a colon."""
    text = (ROOT / path).read_text()
    if path.endswith(".sh"):
        lines = text.splitlines()[1:]
        comment = "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    else:
        comment = ast.get_docstring(ast.parse(text)) or ""
    sentence = re.split(r"(?<=[.?])\s|:\s+(?=`?(?:python|sbatch) )|\n\n", comment, maxsplit=1)[0]
    return " ".join(sentence.split()).rstrip(".:") + ("" if sentence.endswith("?") else ".")


def _name(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".") if path.startswith("jitscale/") else path


def _codes() -> Iterable[Sequence[str]]:
    return ([str(int(code)), code.name, code.meaning, code.remedy] for code in ExitCode)


def _files() -> Iterable[Sequence[str]]:
    return ([f"`{one.path}`", one.writer, one.content, one.removable] for one in FILES)


def _metrics(metrics: Sequence[Metric], unit: str = "unit") -> str:
    return _table(("key", unit, "meaning", "when"), ([f"`{m.name}`", m.unit, m.meaning, m.when] for m in metrics))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |".replace("  ", " ") for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    sys.stdout.write(page())
