"""Every command on every page is right: the real parsers accept it. A page that is not named here is parsed too."""

import re
from collections.abc import Callable

import pytest

from jitscale.config.schema import SETTINGS
from tests.support import ROOT
from tests.support.page_commands import Context, WrongCommandError, check_command, check_piece, check_python
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

# What is on a page and no longer in the code. Only CHANGELOG.md speaks of the past.
PAST_SETTINGS: dict[str, str] = {}  # a name, and what became of it
PAST_FILES: dict[str, str] = {}
PAST_COMMANDS: dict[str, str] = {}
PAGE_OF_THE_PAST = "CHANGELOG.md"
NOT_SETTINGS = {  # names on any page that look like settings
    "model.weights_name": "an attribute of what jitscale.load_model returns",
    "optim.learning_rate": "a wrong name, whose refusal docs/configuration.md shows",
}

GROUPS = "|".join(sorted({key.partition(".")[0] for key in SETTINGS}))
SETTING = re.compile(rf"(?P<key>(?:{GROUPS})\.[a-z_][a-z0-9_]*)(?P<value>=.*)?")
FILE_TYPES = {"html", "json", "jsonl", "md", "png", "py", "safetensors", "sh", "yaml"}  # `model.safetensors` is a file
COMMAND = re.compile(r"(?:python|sbatch|torchrun|make|pip) ")
PLACEHOLDER = re.compile(r"(?<![\w-])(?:[A-Z][A-Z_]*)(?!\w)|\.\.\.|…")
FILE = re.compile(r"(?:configs|jitscale|slurm|tests|tools)/[\w./*-]*(?:\.(?:py|yaml|sh|md|json|def)|/)")


def problems_of(name: str, page: str) -> list[str]:
    """What is wrong with a page's blocks and with the commands, settings and files that its prose names."""
    found: list[str] = []
    written: set[str] = set()

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
            check(block.line, first, lambda text=block.text: check_python(text))
        elif block.language == "yaml":
            check(block.line, first, lambda text=block.text: check_piece(text))
            if named := re.match(r"# (\S+\.yaml)\b", block.text):  # the file that this block is
                written.add(named[1])
        elif block.language == "text":
            if holds_commands(block.text):
                found.append(f"{name}:{block.line}: a command in a block of text, which nothing checks")
        else:
            for line in commands_of(block):
                check(line.number, line.text, lambda text=line.text: check_command(text, Context(written)))
    for line in indented_commands(page):
        found.append(f"{name}:{line.number}: {line.text}\n    is indented; write a fence around it")
    past = name == PAGE_OF_THE_PAST
    for line in inline_code(page):
        if COMMAND.match(line.text) and not PLACEHOLDER.search(line.text):
            if not (past and line.text in PAST_COMMANDS):
                context = Context(written, inline=True)
                check(line.number, line.text, lambda text=line.text, of=context: check_command(text, of))
            continue
        for word in line.text.split():
            if problem := _problem_of(word, past):
                found.append(f"{name}:{line.number}: {word}\n    {problem}")
    return found


def _problem_of(word: str, past: bool) -> str | None:
    """What is wrong with a setting or a file that prose names."""
    word = word.rstrip(",;")
    setting = SETTING.fullmatch(word)
    if setting and setting["key"].rpartition(".")[2] not in FILE_TYPES:
        known = setting["key"] in SETTINGS.keys() | NOT_SETTINGS.keys() or (past and setting["key"] in PAST_SETTINGS)
        return None if known else "is not a setting"
    file = FILE.fullmatch(word.partition("::")[0])
    if file and not PLACEHOLDER.search(word) and not (past and file[0] in PAST_FILES):
        return None if any(ROOT.glob(file[0])) else "is not in the checkout"
    return None


@pytest.mark.parametrize("name", page_names())
def test_the_parsers_accept_every_command(name: str) -> None:
    problems = problems_of(name, page_path(name).read_text())
    assert not problems, "\n".join(["", *problems])


def test_what_is_past_is_named_on_the_page_of_the_past() -> None:
    page = page_path(PAGE_OF_THE_PAST).read_text()
    assert [name for name in (*PAST_SETTINGS, *PAST_FILES, *PAST_COMMANDS) if f"`{name}" not in page] == []


TRAIN = "python -m jitscale.train --config configs/jit_b_256.yaml"
PACK = "slurm/pack_shards.sh --input a --output b --resolution 64 --codec png"
WRONG_COMMANDS = {  # and the refusal
    TRAIN: "data.shards=.* is not set",
    f"{TRAIN} data.shards=/d optim.rl=1": "optim.rl: is not a setting",
    f"{TRAIN} data.shards=/d model.depth=0": "model.depth=0 ",
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
    f"sbatch --arrays=1-4 {PACK}": "--arrays: not an option",
    f"sbatch {PACK}": "--array=1-N",
    "sbatch slurm/upgrade_and_finetune.sh runs/a configs/finetune_h_512.yaml": "needs LOW_RUN",
    "python tools/sample.py --checkpoint runs/a": "required: --output",
    "python tools/sample.py --checkpoint runs/a --out b": "required: --output",
    "python tools/plan.py --config configs/jit_b_256.yaml --gpus 7 --gpu-memory 80GB": "data.batch_size=1024",
    "python tools/submit.py --config configs/jit_h_256.yaml --set optim.rl=1,2 data.shards=/d": "optim.rl: is not a",
    "python tools/submit.py status --look": "unrecognized arguments: --look",
    "python tools/benchmark.py steps": "invalid choice: 'steps'",
    "python tools/none.py": "tools/none.py: is not in the checkout",
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
    "```yaml\nrun: {device: {a: 1}}\n```": "has the wrong type",
    "```yaml\ndefaults: [size/none]\n```": "no configs/size/none.yaml",
    "Text\n\n    make test\n": "is indented",
    "Say `make testing` to it": "make testing: is no target",
    "Say `make\ntesting` to it": "make testing: is no target",
    "Set `optim.rl=2`": "is not a setting",
    "Set `optim.rl`": "is not a setting",
    "Read `tools/none.py`": "is not in the checkout",
}
WRONG = {**{f"```\n{command}\n```": refusal for command, refusal in WRONG_COMMANDS.items()}, **WRONG_PIECES}
RIGHT = """
`make test` and `python -m jitscale.evaluate` and `sbatch slurm/train_jit_h.sh` and `torchrun --nproc-per-node 4`
and `python tools/sample.py --checkpoint RUN` and `model.safetensors` and `ema.decays=[0.9]` and `tests/*/test_fused.py`

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
