"""Parses a command of a page with the real parsers. It needs no data, no cluster and no GPU.

A run's command composes its whole configuration: names, types, limits and the rules that span several settings. Tools
stop after their command line is parsed. Of other programs, a page may use those of a short list.
"""

import importlib
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from jitscale.config import Config, load_config
from jitscale.config.hints import remedy_of_unknown
from jitscale.config.loading import from_dict
from jitscale.config.schema import SETTINGS
from jitscale.config.values import WrongValueError, checked, from_text, has_interpolation
from jitscale.errors import UserError
from tests.support import ROOT
from tests.support.page_context import Context, Run, WrongCommandError
from tests.support.page_options import SBATCH, check_faults, check_null_gpu, check_options_of, check_sbatch_option
from tests.support.page_runs import check_runs_of_python, check_sizes, check_upgrade, check_weights, run_of
from tests.support.stopped_parsers import RefusedError, parsed_by, torchrun_parser

# Programs that are not ours. Files of the checkout that they name must exist.
ALLOWED = {
    ".",
    "apptainer",
    "cat",
    "cd",
    "conda",
    "curl",
    "docker",
    "echo",
    "export",
    "git",
    "hf",
    "ls",
    "mkdir",
    "module",
}
ALLOWED |= {"nvidia-smi", "rsync", "sacct", "scancel", "scontrol", "source", "squeue", "tail", "wandb"}
LAUNCHERS = {"srun", "mpirun"}  # they start the command that begins with `python`
# Refusals of a command that is named in part.
MISSING = re.compile(
    "the following arguments are required|one of the arguments|argument .*: expected (?:at least )?one "
)
IN_CHECKOUT = re.compile(r"(?:configs|docs|jitscale|slurm|tests|tools)/\S+")
CONFIG_OF_A_RUN = "config.yaml"


def check_command(text: str, context: Context) -> None:
    """Parse a line of a shell. Raises a WrongCommandError."""
    words = _words(text)
    for end in (";", "&&", "||", "|", "&"):
        if end in words:
            at = words.index(end)
            check_command(shlex.join(words[:at]), context)
            if words[at + 1 :]:
                check_command(shlex.join(words[at + 1 :]), context)
            return
    words = words[: min((i for i, word in enumerate(words) if word in (">", ">>", "<")), default=len(words))]
    while words and re.match(r"[A-Za-z_][A-Za-z0-9_]*=", words[0]):
        name, _, value = words[0].partition("=")
        if name == "JITSCALE_FAULTS":
            check_faults(value)
        words = words[1:]
    if words:
        _check(words, context)


def check_python(code: str, context: Context) -> None:
    """Compile Python code, and check the runs that it names. Raises a WrongCommandError."""
    try:
        compile(code, "page", "exec")
    except SyntaxError as error:
        raise WrongCommandError(f"is no Python: {error}") from error
    check_runs_of_python(code, context)


def check_piece(text: str) -> None:
    """Check the names and the types of a piece of a configuration, in YAML. Raises a WrongCommandError."""
    try:
        piece = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise WrongCommandError(f"is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(piece, dict):
        raise WrongCommandError("holds no groups of settings")
    for name in piece.pop("defaults", []):
        if not (ROOT / "configs" / f"{name}.yaml").is_file():
            raise WrongCommandError(f"defaults: there is no configs/{name}.yaml")
    for group, content in piece.items():
        if not isinstance(content, dict):
            raise WrongCommandError(f"{group}: is no group of settings")
        for name, value in content.items():
            check_setting(f"{group}.{name}", value)


def check_setting(key: str, value: Any) -> None:
    """Check the name, the type and the limits of a setting, as the loader does. Raises a WrongCommandError."""
    if key not in SETTINGS:
        raise WrongCommandError(f"{key}: is not a setting; {remedy_of_unknown(key)}")
    if has_interpolation(value):
        return
    group, _, name = key.partition(".")
    try:
        config = from_dict({group: {name: checked(key, value)}}, "page")
    except WrongValueError as error:
        raise WrongCommandError(f"{key}={value}: {error.limit}; {error.remedy}") from error
    except UserError as error:
        raise WrongCommandError(str(error)) from error
    for problem in SETTINGS[key].problems(key, getattr(getattr(config, group), name)):
        raise WrongCommandError(f"{key}={value}: {problem.limit}; {problem.remedy}")


def check_override(text: str) -> None:
    """Check a setting with its value, as on a command line. Raises a WrongCommandError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise WrongCommandError(f"{text}: has no '='")
    if key not in SETTINGS:
        raise WrongCommandError(f"{key}: is not a setting; {remedy_of_unknown(key)}")
    try:
        read = from_text(key, value)
    except WrongValueError as error:
        raise WrongCommandError(f"{text}: {error.limit}; {error.remedy}") from error
    check_setting(key, read)


def _words(text: str) -> list[str]:
    reader = shlex.shlex(text, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    try:
        return list(reader)
    except ValueError as error:
        raise WrongCommandError(f"is no line of a shell: {error}") from error


def _check(words: Sequence[str], context: Context) -> None:
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        _python(words[1:], context)
    elif program == "torchrun":
        _torchrun(words[1:], context)
    elif program == "sbatch":
        _sbatch(words[1:], context)
    elif program == "make":
        _make(words[1:])
    elif program == "pip" or words[:2] == ["uv", "pip"]:
        _pip(words[words.index("pip") + 1 :] if "pip" in words else words[1:])
    elif program in LAUNCHERS:
        if "python" in words:
            _python(words[words.index("python") + 1 :], context)
    elif (ROOT / program).is_file():  # a script of the checkout that runs a command
        if words[1:2] == ["python"]:
            _python(words[2:], context)
    elif program in ALLOWED:
        _exist(words[1:])
    else:
        raise WrongCommandError(f"{program}: is no program that pages use; output belongs into a block of `text`")


def _exist(words: Iterable[str]) -> None:
    for word in words:
        if IN_CHECKOUT.fullmatch(word) and not (ROOT / word).exists():
            raise WrongCommandError(f"{word}: is not in the checkout")


def _python(words: Sequence[str], context: Context) -> None:
    if not words:
        return
    if words[0] == "-c":
        check_python(words[1], context)
    elif words[0] == "-m":
        _module(words[1], words[2:], context)
    elif not (ROOT / words[0]).is_file():
        raise WrongCommandError(f"{words[0]}: is not in the checkout")
    elif re.fullmatch(r"tools/\w+\.py", words[0]):
        _tool(Path(words[0]).stem, words[1:], context)
    else:
        check_python((ROOT / words[0]).read_text(), context)


def _module(name: str, words: Sequence[str], context: Context) -> None:
    if name == "jitscale.train":
        _train(words, context)
    elif name == "jitscale.evaluate":
        _evaluate(words, context)
    elif name == "pip":
        _pip(words)
    elif name == "tests.nullcuda.check":
        check_null_gpu(list(words))
    elif importlib.util.find_spec(name) is None:
        raise WrongCommandError(f"-m {name}: there is no such module")
    else:
        _exist(word.partition("::")[0] for word in words)


def _parse(main: Callable[[], object], words: Sequence[str], context: Context) -> Any:
    """The options that `main` parses; None if it ends before, as at --help, or if `context` allows a part."""
    try:
        return parsed_by(main, words)
    except (RefusedError, UserError) as error:
        if context.inline and MISSING.match(str(error)):
            check_options_of(main, words)
            return None
        raise WrongCommandError(str(error)) from error


def _train(words: Sequence[str], context: Context) -> None:
    options = _parse(_main_of("jitscale.train"), words, context)
    if options is None:
        return
    overrides = [*options.overrides, *(["run.profile=true"] if options.profile else [])]
    needs_shards = not (options.print_config or context.inline)
    config = _configuration(options.config, overrides, context, needs_shards=needs_shards)
    given = dict(text.split("=", 1) for text in overrides)
    folder = given.get("run.dir", _folder_of(options.config) if config is None else config.run.dir)
    check_sizes(options.config, folder, given.get("run.init_from", ""))
    if "run.init_from" in given:
        run_of(given["run.init_from"], context)
    _writes(folder, options.config, overrides, context)


def _evaluate(words: Sequence[str], context: Context) -> None:
    options = _parse(_main_of("jitscale.evaluate"), words, context)
    if options is None:
        return
    source = options.run or options.checkpoint
    if (options.run is None and (options.checkpoint is None or options.config is None)) and not context.inline:
        raise WrongCommandError("evaluate needs --run RUN, or --checkpoint FILE with --config FILE")
    if source is not None:
        _measure(source, options.config, options.overrides, [options.weights], context)


def _measure(
    source: Path, path: Path | None, overrides: Sequence[str], weights: Sequence[str | None], context: Context
) -> None:
    """Check the evaluation of the run or the weights `source`, under a configuration or the run's own."""
    run = run_of(source, context)
    config = _configuration(path, overrides, context)
    if path is None and run is not None:
        config = run.configured(overrides)
    given = dict(text.split("=", 1) for text in overrides)
    check_sizes(source, path or "", given.get("run.dir", ""))
    if "evaluation.guide" in given:
        run_of(given["evaluation.guide"], context)
    if config is not None:
        check_weights(config, [*weights, given.get("evaluation.weights")])
    if "run.dir" in given and path is not None:
        _writes(given["run.dir"], path, overrides, context)


def _configuration(
    path: Path | None, overrides: Sequence[str], context: Context, *, needs_shards: bool = False
) -> Config | None:
    """Compose a configuration of the checkout with its overrides.

    If a command of the page writes the configuration, only the overrides are checked, and the result is None.
    """
    for text in overrides:
        check_override(text)
    if path is None or str(path) in context.written or path.name == CONFIG_OF_A_RUN:
        return None
    if not (ROOT / path).is_file():
        raise WrongCommandError(f"{path}: is not in the checkout, and no earlier command of the page writes it")
    try:
        return load_config(ROOT / path, overrides, world_size=context.ranks, needs_shards=needs_shards)
    except UserError as error:
        raise WrongCommandError(str(error)) from error


def _folder_of(config: Path) -> str:
    """The run's folder in the configurations that tools/new_config.py writes."""
    return f"runs/{config.stem}"


def _writes(folder: object, config: Path, overrides: Sequence[str], context: Context) -> None:
    """Remember that a command writes a run, with its network if the configuration is in the checkout."""
    known = (ROOT / config).is_file() and str(config) not in context.written
    context.runs[str(folder).rstrip("/")] = Run(config, tuple(overrides)) if known else None


def _tool(name: str, words: Sequence[str], context: Context) -> None:
    options = _parse(_main_of(name), words, context)
    if options is None:
        return
    if name == "submit" and words[0] != "status":
        _submit(options, context)
    elif name == "upgrade_resolution":
        target = _configuration(options.to, options.overrides, context)
        _configuration(options.config, [], context)
        check_sizes(options.checkpoint, options.to, options.output)
        check_upgrade(run_of(options.checkpoint, context), target, options.kernel, options.mode)
        _writes(options.output, options.to, options.overrides, context)
    elif name == "evaluate_fid":
        axes = [text for text in options.sweep if "." not in text.partition("=")[0]]
        overrides = [*options.overrides, *(text for text in options.sweep if text not in axes)]
        overrides += [f"evaluation.sweep={json.dumps(axes)}"] if axes else []
        _measure(options.checkpoint, options.config, overrides, [], context)
    elif name == "gallery":
        for run in options.runs:
            run_of(run, context)
    elif name in ("sample", "convert_checkpoint", "posthoc_ema"):
        _use(options, context)
    else:
        ranks = options.gpus if name == "plan" else context.ranks
        config = getattr(options, "config", None)
        path = None if config is None else Path(config)
        _configuration(path, getattr(options, "overrides", []), replace(context, ranks=ranks))
        if name == "new_config":
            context.written.add(str(options.output))


def _use(options: Any, context: Context) -> None:
    """Check a tool that reads the weights of a run, and perhaps writes others."""
    source = getattr(options, "checkpoint", None) or options.run
    run, path, guide = run_of(source, context), getattr(options, "config", None), getattr(options, "guide", None)
    if guide is not None:
        run_of(guide, context)
    _configuration(path, [], context)
    to = getattr(options, "to", None)
    check_sizes(source, path or "", options.output)
    named = getattr(options, "weights", None)
    names = named if isinstance(named, list) else [named]
    names = [*names, options.ema1, options.ema2] if to == "authors" else names
    if run is not None:
        check_weights(run.configured(), names)
    if to == "run":
        _writes(options.output, path, [], context)
    elif to is not None:
        context.runs[str(options.output)] = run


def _submit(options: Any, context: Context) -> None:
    """The stages of all chains, each with its configuration."""
    ranks = options.nodes * options.tasks_per_node
    options.config = ROOT / options.config
    try:
        chains = importlib.import_module("submit").plan(options)
    except UserError as error:
        raise WrongCommandError(str(error)) from error
    for stage in (stage for chain in chains for stage in chain):
        if Path(stage.config).is_relative_to(ROOT):
            needs_shards = stage.kind == "train"
            _configuration(stage.config, stage.settings, replace(context, ranks=ranks), needs_shards=needs_shards)
            folder = stage.run_dir.relative_to(Path.cwd())
            check_sizes(stage.config.relative_to(ROOT), folder)
            _writes(folder, stage.config, stage.overrides, context)


def _torchrun(words: Sequence[str], context: Context) -> None:
    """Parse with torchrun's own parser. It takes abbreviations of its options also from the command that it starts."""
    with redirect_stderr(io.StringIO()) as said:
        try:
            options = torchrun_parser().parse_args([*words, *([] if _starts_something(words) else ["train.py"])])
        except SystemExit as error:
            last = said.getvalue().strip().splitlines()[-1]
            raise WrongCommandError(f"{last} (torchrun takes an option that begins as one of its own)") from error
    if not _starts_something(words):
        if not context.inline:
            raise WrongCommandError("torchrun starts nothing")
        return
    nodes, processes = str(options.nnodes).partition(":")[0], str(options.nproc_per_node)
    ranks = int(nodes) * (int(processes) if processes.isdecimal() else 1)
    started = [*(["-m"] if options.module else []), options.training_script, *options.training_script_args]
    _python(started, replace(context, ranks=ranks))


def _starts_something(words: Sequence[str]) -> bool:
    return "-m" in words or any(word.endswith(".py") for word in words)


def _sbatch(words: Sequence[str], context: Context) -> None:
    given: dict[str, str] = {}
    rest = list(words)
    while rest and rest[0].startswith("-"):
        option, equals, value = rest.pop(0).partition("=")
        if SBATCH.get(option) and not equals:
            value = rest.pop(0) if rest else ""
        check_sbatch_option(option, value)
        given[option] = value
    if not rest:
        if not context.inline:
            raise WrongCommandError("sbatch names no script")
        return
    script, rest = rest[0], rest[1:]
    if not (ROOT / script).is_file():
        raise WrongCommandError(f"{script}: is not in the checkout")
    text = (ROOT / script).read_text()
    asked = {**dict(re.findall(r"^#SBATCH (--[\w-]+)=(\S+)$", text, re.MULTILINE)), **given}
    nodes = int(str(asked.get("-N", asked.get("--nodes", 1))).partition("-")[0])
    context = replace(context, ranks=nodes * int(asked.get("--ntasks-per-node", 1)))
    if context.inline and not rest:
        return
    if "$low" in text:
        if len(rest) < 3:
            raise WrongCommandError(f"{script}: needs LOW_RUN CONFIG NEW_RUN")
        low, config, new, *overrides = rest
        upgrade = ["--checkpoint", low, "--to", config, "--output", new, *overrides]
        _tool("upgrade_resolution", upgrade, context)
        _train(["--config", config, f"run.dir={new}", *overrides], context)
    elif "$SLURM_ARRAY_TASK_ID/" in text:
        if "--array" not in given:
            raise WrongCommandError(f"{script}: needs --array=1-N")
        _tool("make_shards", ["--part", "1/2", *rest], context)
    elif started := re.search(r"^supervise (\w+)(.*) \"\$@\"$", text, re.MULTILINE):
        _module(f"jitscale.{started[1]}", [*started[2].split(), *rest], context)
    else:
        raise WrongCommandError(f"{script}: the command that it starts is unknown; add it to `_sbatch`")


def _make(words: Sequence[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word in words:
        if "=" not in word and word not in targets:
            raise WrongCommandError(f"make {word}: is no target of the Makefile")


def _pip(words: Sequence[str]) -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^(\w+) = ", section, re.MULTILINE)
    for word in words:
        named = re.fullmatch(r"(?:jitscale|\.)\[(.*)\].*", word)
        for extra in named[1].split(",") if named else []:
            if extra.strip() not in extras:
                raise WrongCommandError(f"{word}: pyproject.toml has no extra {extra}")
    _exist(words)


@cache
def _main_of(module: str) -> Callable[[], object]:
    with redirect_stdout(io.StringIO()):
        main: Callable[[], object] = importlib.import_module(module).main
    return main
