"""Every command on every page is right: the real parsers accept it. All pages are found, none is named here."""

import re
import shlex
from collections.abc import Callable

import pytest

from jitscale.config.schema import SETTINGS
from tests.support import ROOT
from tests.support.page_commands import check_command, check_override, check_piece, check_python
from tests.support.page_context import Context, Run, WrongCommandError
from tests.support.page_options import VARIABLE, check_options_in, check_variable
from tests.support.pages import (
    LANGUAGES,
    blocks_of,
    commands_of,
    holds_commands,
    indented_commands,
    inline_code,
    page_names,
    page_path,
)

# Names that are on a page and no longer in the code. Only CHANGELOG.md speaks of the past.
PAST_SETTINGS: dict[str, str] = {}  # a name, and its new name or the reason of its end
PAST_FILES: dict[str, str] = {}
PAST_COMMANDS = {"tools/benchmark.py --compare reference": "now --compare authors"}
PAGE_OF_THE_PAST = "CHANGELOG.md"
NOT_SETTINGS = {  # names on any page that look like settings
    "model.weights_name": "an attribute of what jitscale.load_model returns",
    "optim.learning_rate": "a wrong name, whose refusal docs/configuration.md shows",
}

WRONG_VALUES = {  # values on a page that the loader refuses, and why the page has them
    "evaluation.time_shift=s": "s is a number of a formula",
    "data.batch_size=0064": "docs/configuration.md says that it is refused",
}
# Commands whose program is a placeholder. docs/reference.md lists the programs.
OPEN_COMMANDS = {"python tools/NAME.py", "python -m NAME", "sbatch slurm/NAME.sh", "make TARGET"}
# Values that stand for the placeholders of other commands in prose.
DUMMIES = {
    "RUN": "runs/jit_h_256",
    "DIR": "runs/jit_h_256",
    "FILE": "checkpoint-last.pth",
    "N": "8",
    "CONFIG": "configs/jit_h_256.yaml",
}
DUMMIES |= {"...": "guidance=2"}

GROUPS = "|".join(sorted({key.partition(".")[0] for key in SETTINGS}))
SETTING = re.compile(rf"(?P<key>(?:{GROUPS})\.[a-z_][a-z0-9_]*)(?P<value>=.*)?")
FILE_TYPES = {"html", "json", "jsonl", "md", "png", "py", "safetensors", "sh", "yaml"}  # `model.safetensors` is a file
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python3?|sbatch|torchrun|make|pip|tools/\w+\.py) ")
PLACEHOLDER = re.compile(r"(?<![\w-])(?:[A-Z][A-Z_]*)(?!\w)|\.\.\.|…")
WORD = re.compile(r"(?<![^\s=])(?:[A-Z][A-Z_]*|\.\.\.|…)(?![^\s,])")  # a placeholder of a command
FILE = re.compile(r"(?:configs|jitscale|slurm|tests|tools)/[\w./*-]*(?:\.(?:py|yaml|sh|md|json|def)|/)")


def problems_of(name: str, page: str) -> list[str]:
    """Return the faults of a page's blocks, and of the commands, settings, options and files that its prose names."""
    found: list[str] = []
    written: set[str] = set()
    runs: dict[str, Run | None] = {}

    def check(number: int, text: str, do: Callable[[], None]) -> None:
        try:
            do()
        except WrongCommandError as error:
            found.append(f"{name}:{number}: {text.strip()}\n    {error}")

    for block in blocks_of(page):
        first = block.text.partition("\n")[0]
        if block.language not in LANGUAGES:
            found.append(f"{name}:{block.line}: a block of {block.language}; the languages are {LANGUAGES}")
        elif block.language == "python":
            check(block.line, first, lambda text=block.text: check_python(text, Context(written, runs)))
        elif block.language == "yaml":
            check(block.line, first, lambda text=block.text: check_piece(text))
            if named := re.match(r"# (\S+\.yaml)\b", block.text):  # the block is this file
                written.add(named[1])
        elif block.language == "text":
            if holds_commands(block.text):
                found.append(f"{name}:{block.line}: a command in a block of text, which nothing checks")
        else:
            for line in commands_of(block):
                check(line.number, line.text, lambda text=line.text: check_command(text, Context(written, runs)))
    for line in indented_commands(page):
        found.append(f"{name}:{line.number}: {line.text}\n    is indented; write a fence around it")
    past = name == PAGE_OF_THE_PAST
    context = Context(written, runs, inline=True)
    for line in inline_code(page):
        check(line.number, line.text, lambda text=line.text: _check_inline(text, context, past=past))
    for number, text in enumerate(page.splitlines(), 1):
        for variable in VARIABLE.findall(text):
            check(number, variable, lambda name=variable: check_variable(name))
    return found


def _check_inline(text: str, context: Context, *, past: bool) -> None:
    """Check code in prose: a command as such, else its words. Raises a WrongCommandError."""
    if COMMAND.match(text):
        if text not in OPEN_COMMANDS and not (past and text in PAST_COMMANDS):
            command = WORD.sub(_dummy, text)
            check_command(f"python {command}" if command.startswith("tools/") else command, context)
        return
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        words = text.split()
    check_options_in(words)
    for word in words:
        _check_name(word.rstrip(",;"), past)


def _dummy(found: re.Match[str]) -> str:
    if found[0] not in DUMMIES:
        raise WrongCommandError(f"{found[0]}: has no value in DUMMIES")
    return DUMMIES[found[0]]


def _check_name(word: str, past: bool) -> None:
    """Check a setting or a file that prose names. Raises a WrongCommandError."""
    setting = SETTING.fullmatch(word)
    if setting and setting["key"].rpartition(".")[2] not in FILE_TYPES:
        key = setting["key"]
        if key not in SETTINGS.keys() | NOT_SETTINGS.keys() and not (past and key in PAST_SETTINGS):
            raise WrongCommandError(f"{key}: is not a setting")
        if setting["value"] not in (None, "=") and key in SETTINGS and word not in WRONG_VALUES:
            check_override(word)
        return
    file = FILE.fullmatch(word.partition("::")[0])
    if file and not PLACEHOLDER.search(word) and not (past and file[0] in PAST_FILES) and not any(ROOT.glob(file[0])):
        raise WrongCommandError(f"{word}: is not in the checkout")


@pytest.mark.parametrize("name", page_names())
def test_the_parsers_accept_every_command(name: str) -> None:
    problems = problems_of(name, page_path(name).read_text())
    assert not problems, "\n".join(["", *problems])


def test_what_is_past_is_named_on_the_page_of_the_past() -> None:
    page = page_path(PAGE_OF_THE_PAST).read_text()
    assert [name for name in (*PAST_SETTINGS, *PAST_FILES, *PAST_COMMANDS) if f"`{name}" not in page] == []


def test_exceptions_are_still_on_a_page() -> None:
    code = {line.text for name in page_names() for line in inline_code(page_path(name).read_text())}
    assert sorted({*WRONG_VALUES, *OPEN_COMMANDS} - code) == []


TRAIN = "python -m jitscale.train --config configs/jit_b_256.yaml"
UPGRADE = "python tools/upgrade_resolution.py --checkpoint runs/jit_h_256 --to"
CONVERT = "python tools/convert_checkpoint.py --checkpoint runs/jit_h_256 --to"
PACK = "slurm/pack_shards.sh --input a --output b --resolution 64 --codec png"
WRONG_COMMANDS = {  # a command, and its refusal
    TRAIN: "data.shards=.* is not set",
    f"{TRAIN} data.shards=/d optim.rl=1": "optim.rl: is not a setting",
    f"{TRAIN} data.shards=/d model.depth=0": "model.depth=0: must be in",
    f"{TRAIN} data.shards=/d optim.lr": "optim.lr: has no '='",
    "python -m jitscale.train --config mine.yaml data.shards=/d": "mine.yaml: is not in the checkout",
    f"torchrun --nproc-per-node 7 {TRAIN.removeprefix('python ')} data.shards=/d": "data.batch_size=1024",
    "torchrun --nproc-per-node 8 -m jitscale.evaluate --run runs/a": "one of its own",
    "torchrun --processes 8 -m jitscale.evaluate --run-dir runs/a": "processes",
    "python -m jitscale.evaluate --checkpoint a.pth": "or --checkpoint FILE with --config",
    "sbatch slurm/train_jit_b.sh data.shards=/d optim.rl=1": "optim.rl: is not a setting",
    "sbatch -N 3 slurm/train_jit_b.sh data.shards=/d": "data.batch_size=1024",
    "sbatch slurm/train_jit_c.sh data.shards=/d": "train_jit_c.sh: is not in the checkout",
    "sbatch slurm/evaluate.sh runs/h": "evaluate needs --run",
    "sbatch --time=twelve slurm/train_jit_h.sh data.shards=/d": "--time=twelve: is no value",
    f"sbatch --arrays=1-4 {PACK}": "--arrays: not an option",
    f"sbatch {PACK}": "--array=1-N",
    "sbatch slurm/upgrade_and_finetune.sh runs/a configs/finetune_h_512.yaml": "needs LOW_RUN",
    "sbatch slurm/upgrade_and_finetune.sh runs/jit_h_256 configs/finetune_b_512.yaml runs/b data.shards=/d": "sizes",
    f"{UPGRADE} configs/finetune_b_512.yaml --output runs/upgraded": "runs/jit_h_256 a network of size H",
    f"{UPGRADE} configs/finetune_h_512.yaml --output runs/b_512": "runs/b_512 a network of size B",
    f"{UPGRADE} configs/jit_h_256_plus.yaml --output runs/upgraded": "target also differs in",
    f"{TRAIN} data.shards=/d run.dir=runs/h_256": "runs/h_256 a network of size H",
    "python -m jitscale.evaluate --run runs/jith_256": "runs/jith_256: no earlier command",
    "python -m jitscale.evaluate --run runs/jit_h_256 evaluation.guide=runs/jitb_256": "runs/jitb_256: no earlier",
    "python -m jitscale.evaluate --run runs/jit_h_256 --weights ema_0.995": "no weight set ema_0.995; the run has",
    "python -m jitscale.evaluate --run runs/jit_h_256 evaluation.weights=ema_0.995": "is not a weight set of this run",
    "python -m jitscale.evaluate --run runs/jit_h_256 evaluation.internal_guidance=2": "middle_head",
    "python tools/evaluate_fid.py --checkpoint runs/jit_h_256 --sweep ema=ema_0.995": "ema_0.995",
    "python tools/gallery.py runs/jit_h_256 runs/jith_256": "runs/jith_256: no earlier command",
    "python tools/posthoc_ema.py --run runs/none --widths 0.1 --output a": "runs/none: no earlier command",
    "python tools/sample.py --checkpoint runs/a": "required: --output",
    "python tools/sample.py --checkpoint runs/a --out b": "required: --output",
    "python tools/sample.py --checkpoint runs/jit_h_256 --weights ema_0.995 --output b": "no weight set ema_0.995",
    "python tools/sample.py --checkpoint runs/jit_h_256 --guide last.pth --output b": "last.pth: no earlier command",
    f"{CONVERT} authors --output a.pth --ema1 ema_0.995": "no weight set ema_0.995",
    f"{CONVERT} run --output runs/l_256 --config configs/jit_h_256.yaml": "runs/l_256 a network of size L",
    "python tools/plan.py --config configs/jit_b_256.yaml --gpus 7 --gpu-memory 80GB": "data.batch_size=1024",
    "python tools/submit.py --config configs/jit_h_256.yaml --set optim.rl=1,2 data.shards=/d": "optim.rl: is not a",
    "python tools/submit.py status --look": "unrecognized arguments: --look",
    "python tools/benchmark.py steps": "invalid choice: 'steps'",
    "python tools/none.py": "tools/none.py: is not in the checkout",
    f"JITSCALE_FAULTS=nan:stop=5 {TRAIN} data.shards=/d": "'nan:stop=5' is not a fault",
    f"JITSCALE_FAULT=nan:step=5 {TRAIN} data.shards=/d": "JITSCALE_FAULT: nothing in the code reads this variable",
    "tests/nullcuda/run.sh python -m tests.nullcuda.check waits full_x": "no such check: full_x",
    "tests/nullcuda/run.sh python -m tests.nullcuda.check --lists": "unrecognized arguments: --lists",
    "make testing": "make testing: is no target",
    "pip install 'jitscale[gpu]'": "has no extra gpu",
    "fc -l": "fc: is no program",
    "cd docs && make testing": "make testing: is no target",
    "ls | make testing": "make testing: is no target",
}
WRONG_PIECES = {
    "```text\npython x.py\n```": "a command in a block of text",
    "```json\n{}\n```": "a block of json",
    "```python\nimport 3\n```": "is no Python",
    "```yaml\noptim: {rl: 1}\n```": "optim.rl: is not a setting",
    "```yaml\noptim: {betas: {a: 1}}\n```": "optim.betas: is not a setting",
    "```yaml\nengine: {zero_stage: 5}\n```": "engine.zero_stage=5: must be",
    "```yaml\nengine: {zero_stage: two}\n```": "has the wrong type",
    '```python\njitscale.load_model("runs/jith_256")\n```': "runs/jith_256: no earlier command",
    "```yaml\nrun: {device: {a: 1}}\n```": "has the wrong type",
    "```yaml\ndefaults: [size/none]\n```": "no configs/size/none.yaml",
    "Text\n\n    make test\n": "is indented",
    "Say `make testing` to it": "make testing: is no target",
    "Say `make\ntesting` to it": "make testing: is no target",
    "Set `optim.rl=2`": "is not a setting",
    "Set `optim.rl`": "is not a setting",
    "Set `engine.zero_stage=5`": "engine.zero_stage=5: must be",
    "Set `'engine.zero_stage=5'`": "engine.zero_stage=5: must be",
    "Set `optim.lr=fast`": "has the wrong type",
    "Say `python tools/sample.py --chekpoint RUN`": "--chekpoint",
    "Say `tools/evaluate_fid.py --checkpoint RUN --sweeep ...`": "--sweeep",
    "Say `python tools/sample.py --checkpoint PLACE`": "PLACE: has no value in DUMMIES",
    "Give `--reset-momentz`": "--reset-momentz: is no option",
    "Give `--kernel smoth`": "--kernel smoth: is no choice",
    "Give `--signal=B:USR1@now`": "is no value of this option of sbatch",
    "Set `JITSCALE_FAULT`": "nothing in the code reads this variable",
    "Read `tools/none.py`": "is not in the checkout",
}
WRONG = {**{f"```\n{command}\n```": refusal for command, refusal in WRONG_COMMANDS.items()}, **WRONG_PIECES}
RIGHT = """
`make test` and `python -m jitscale.evaluate` and `sbatch slurm/train_jit_h.sh` and `torchrun --nproc-per-node 4`
and `python tools/sample.py --checkpoint RUN` and `tools/evaluate_fid.py --sweep` and `--kernel smooth` and
`python tools/convert_checkpoint.py --checkpoint FILE --to safetensors --output DIR` and `model.safetensors`
and `ema.decays=[0.9]` and `tests/*/test_fused.py` and `--signal=B:USR1@300` and `JITSCALE_FAULTS=kill:step=3:rank=0`

```yaml
# runs/mine.yaml
defaults: [size/b, resolution/256, recipe/imagenet]
optim: {lr: 1.0e-4}
```

```
export HEAD=node1 && cd jitscale   # two commands
python tools/new_config.py --shards runs/shards/mine --output runs/other.yaml
python -m jitscale.train --config runs/mine.yaml optim.lr=1e-4
python -m jitscale.train --config runs/other.yaml \\
    optim.lr=1e-4
OMP_NUM_THREADS=1 torchrun --nnodes 8 --nproc-per-node 8 \\
    -m jitscale.train --config configs/jit_h_256.yaml data.shards=/d
python -m jitscale.train --config configs/jit_h_256.yaml data.shards=/d run.dir=runs/h_low ema.decays=[0.99] \\
    evaluation.weights=ema_0.99
python -m jitscale.evaluate --run runs/h_low --weights ema_0.99
python tools/upgrade_resolution.py --checkpoint runs/h_low --to configs/finetune_h_512.yaml --output runs/h_high
python tools/sample.py --checkpoint runs/h_high --guide runs/jit_b_512 --output drawn
python -m jitscale.evaluate --run runs/other
python -m jitscale.train --list-settings > settings.md
python tools/sample.py --help
pip install '.[dev,hub]'
```
"""


@pytest.mark.parametrize("page", WRONG)
def test_a_wrong_command_is_found(page: str) -> None:
    problems = problems_of("page.md", f"# Title\n\n{page}\n")
    assert len(problems) == 1, problems
    assert re.search(WRONG[page], problems[0]), problems[0]


def test_right_commands_are_accepted() -> None:
    assert problems_of("page.md", RIGHT) == []
