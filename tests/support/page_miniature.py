"""Makes the commands of any page small enough to be run: tiny networks, few images, shards and runs that lie ready.

A command keeps its program, its options and its own settings. `SMALL` has the change of each program. Other programs
are only parsed (page_commands.py).
"""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from jitscale.config import Config, load_config, to_yaml
from jitscale.preparation.array_shards import write_shards
from tests.support import ROOT
from tests.support.page_running import link_checkout, run_shell

SETTINGS = (
    *("model.hidden_size=32", "model.depth=4", "model.num_heads=2", "model.bottleneck_dim=8", "model.num_classes=1000"),
    *("model.in_context_len=4", "model.in_context_start=1", "data.num_workers=0", "data.batch_size=4"),
    *("data.window=16", "data.shards=shards/{resolution}", "optim.warmup_images=0", "engine.precision=fp32"),
    *("engine.micro_batch_size=4", "ema.power_widths=[0.05,0.1]", "ema.snapshot_every_images=4"),
    *("checkpoint.every_images=8", "tracking.wandb=off", "tracking.log_every_steps=1", "run.device=cpu"),
    *(
        "run.max_images=8",
        "evaluation.sweep=[guidance=1:2:1]",
        "evaluation.at_end=false",
        "evaluation.every_images=0",
        "evaluation.grid_every_images=0",
    ),
)
MEASURE = ("features=digits", "num_images=10", "sweep_images=10", "steps=2", "block_size=10")
MEASURING = tuple(f"evaluation.{setting}" for setting in MEASURE)
LOW, HIGH, PLUS = "configs/jit_b_256.yaml", "configs/finetune_b_512.yaml", "configs/jit_b_256_plus.yaml"
LONGER = "run.max_images=64"  # for snapshots from which averages of many widths can be made
AUTHORS = ("--to", "authors", "--ema1", "ema_0.9996", "--ema2", "ema_0.9998")
SIZES = (8, 16, 32, 64, 128)  # pixels per side of the shards
KINDS = {"plus": re.compile("plus|internal"), "high": re.compile("512|1024|64px")}  # by the names of runs; others: low


def small_sizes(config: Config) -> list[str]:
    """The settings that make a network of `configs/` tiny: fewer tokens and smaller patches, in the same proportion."""
    size, patch = config.model.image_size, config.model.patch_size
    if size // patch > 8:
        size, patch = size // 8, patch // 2
    settings = [*SETTINGS, f"model.image_size={size}", f"model.patch_size={patch}"]
    if config.model.middle_head:
        settings += ["model.middle_head=2"]
    if config.model.route_share:
        settings += ["model.route_blocks=[1,3]"]
    if config.progressive.resolutions:
        lower = [each // 8 for each in config.progressive.resolutions]
        settings += [f"progressive.resolutions={lower}", f"progressive.images={[4] * len(lower)}"]
    return settings


@dataclass(frozen=True)
class Templates:
    """Runs, weights, shards and pictures that pages' commands find instead of their reader's."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Templates":
        """Train and write everything into `folder`: runs at a low resolution, upgraded from it, with all additions."""
        link_checkout(folder)
        random = np.random.default_rng(0)
        labels = np.linspace(0, 999, 24).astype(np.int64)
        for size in SIZES:
            images = random.integers(0, 256, (24, size, size, 3), np.uint8)
            write_shards(images, labels, folder / f"shards/{size}", samples_per_shard=12)
        for number, label in enumerate(("a", "b", "c") * 4):
            path = folder / f"pictures/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(path)
        low, high, plus = (small_sizes(load_config(ROOT / config)) for config in (LOW, HIGH, PLUS))
        train, to_high = ["python", "-m", "jitscale.train", "--config"], ["--to", HIGH, "--output", "high"]
        for words in (
            [*train, LOW, *low, LONGER, "run.dir=low"],
            [*train, PLUS, *plus, "run.dir=plus"],
            ["python", "tools/upgrade_resolution.py", "--checkpoint", "low", *to_high, *high],
            [*train, HIGH, *high, "run.dir=high"],
            ["python", "tools/convert_checkpoint.py", "--checkpoint", "low", "--output", "low.pth", *AUTHORS],
        ):
            run_shell("templates", words, folder)
        return cls(folder)


class SmallPage:
    """A folder in which the commands of one page are run, after they were made small."""

    def __init__(self, folder: Path, templates: Templates) -> None:
        self.folder = folder
        self.templates = templates
        self.runs = 0  # number of runs in a folder that the page does not name
        link_checkout(folder)
        (folder / "shards").symlink_to(templates.folder / "shards")

    def small(self, words: Sequence[str]) -> list[str] | None:
        """The command of `words` in miniature; None if its program is not in `SMALL`.

        Fails if the program is in `SMALL`, and nothing says how this command becomes small.
        """
        words = _without_launcher(words)
        if words[:1] != ["python"]:
            return None
        program, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1], words[2:])
        if program not in SMALL:
            return None
        made = list(rest) if "--help" in rest else SMALL[program](self, _separate(rest))
        assert made is not None, "is not run: extend tests/support/page_miniature.py, or name it in NOT_SMALL"
        return [*words[: len(words) - len(rest)], *made]

    def small_python(self, code: str) -> str:
        """Python code with the runs and the shards that it names."""
        for path in re.findall(r'"(runs/[^"]+)"', code):
            self.stored(path)
        return re.sub(r"/data/\w+", lambda found: self.shards(found[0]), code)

    def local(self, path: str) -> str:
        """The path in this folder that stands for one of the page."""
        return path.removeprefix("~").removeprefix("/").rstrip("/")

    def stored(self, path: str) -> str:
        """The local path of stored weights, which are made if no command of the page has written them."""
        local = self.local(path)
        place = self.folder / local
        if not place.exists():
            assert place.suffix != ".safetensors", f"{path}: no earlier command has written this file"
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.suffix == ".pth":
                place.symlink_to(self.templates.folder / "low.pth")
            else:
                kind = next((kind for kind, names in KINDS.items() if names.search(local)), "low")
                shutil.copytree(self.templates.folder / kind, place)
        return local

    def config(self, path: str) -> str:
        """The local path of a configuration with a tiny network."""
        local = f"small_{Path(path).name}"
        small = load_config(ROOT / path, small_sizes(load_config(ROOT / path)))
        (self.folder / local).write_text(to_yaml(small))
        return local

    def shards(self, path: str) -> str:
        """The local path of shards, which are made if no command of the page has written them."""
        local = self.local(path)
        place = self.folder / local
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(self.templates.folder / "shards/32", place)
        return local


def _without_launcher(words: Sequence[str]) -> list[str]:
    """The command of one process of torchrun."""
    if words[0] != "torchrun":
        return list(words)
    for at, word in enumerate(words):
        if word == "-m" or word.endswith(".py"):
            return ["python", *words[at:]]
    return list(words)


def _separate(words: Sequence[str]) -> list[str]:
    """The words, with `--option=value` as two words."""
    pairs = [word.partition("=") if word.startswith("--") else (word, "", "") for word in words]
    return [word for option, equals, value in pairs for word in ((option, value) if equals else (option,))]


def _config_of(options: Sequence[str], name: str = "--config") -> str:
    """The value of an option that names a configuration."""
    return options[options.index(name) + 1]


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options with their values, and the overrides."""
    settings = [word for word in words if re.match(r"[a-z]+\.[a-z_0-9]+=", word)]
    return [word for word in words if word not in settings], settings


def _train(page: SmallPage, words: Sequence[str]) -> list[str] | None:
    options, settings = _split(words)
    if "--list-settings" in options:
        return list(words)
    if not (ROOT / _config_of(options)).is_file():
        return None
    config = load_config(ROOT / _config_of(options), settings)
    more = ["data.held_out=0.3", "evaluation.held_out_every_images=8"] if config.data.held_out else []
    if config.ema.snapshot_every_images:
        more += [LONGER]
    if config.run.init_from:
        more += [f"run.init_from={page.stored(config.run.init_from)}"]
    if not any(text.startswith("run.dir=") for text in settings):  # commands of a page need not go on with each other
        page.runs += 1
        more += [f"run.dir=runs/own_{page.runs}"]
    return [*options, *_smaller(settings, [*small_sizes(config), *more])]


def _evaluate(page: SmallPage, words: Sequence[str]) -> list[str]:
    options, settings = _split(words)
    found = _with_paths(options, {"--run": page.stored, "--run-dir": page.stored, "--checkpoint": page.stored})
    more = list(MEASURING)
    if "--config" in options:
        more = [*small_sizes(load_config(ROOT / _config_of(options))), *more]
    guides = [text.partition("=")[2] for text in settings if text.startswith("evaluation.guide=")]
    more += [f"evaluation.guide={page.stored(guide)}" for guide in guides]
    return [*found, *_smaller(settings, more)]


def _evaluate_fid(page: SmallPage, words: Sequence[str]) -> list[str]:
    found = _with_paths(words, {"--checkpoint": page.stored, "--coarse": _ten, "--fine": _ten})
    found = [re.sub(r"=([\d.]+):([\d.]+):[\d.]+$", r"=\1,\2", word) for word in found]  # the ends of each axis
    return [*found, *([] if "--" in found else ["--"]), *MEASURING]


def _sample(page: SmallPage, words: Sequence[str]) -> list[str]:
    found = _with_paths(words, {"--checkpoint": page.stored, "--output": page.local, "--guide": page.stored})
    return [*found, "--steps", "2", "--per-class", "1"]


def _convert(page: SmallPage, words: Sequence[str]) -> list[str]:
    paths = {"--checkpoint": page.stored, "--output": page.local, "--config": page.config}
    found = _with_paths(words, {**paths, "--samples": lambda _: "1", "--images": lambda _: "4"})
    return [*found, *(AUTHORS if "authors" in words else ())]


def _upgrade(page: SmallPage, words: Sequence[str]) -> list[str]:
    options, settings = _split(words)
    paths = {"--checkpoint": page.stored, "--output": page.local, "--preview": page.local}
    target = load_config(ROOT / _config_of(options, "--to"), settings)
    return [*_with_paths(options, paths), *_smaller(settings, small_sizes(target))]


def _reference(page: SmallPage, words: Sequence[str]) -> list[str]:
    options, settings = _split(words)
    config = load_config(ROOT / _config_of(options), settings)
    return [*_with_paths(options, {"--output": page.local}), *_smaller(settings, [*small_sizes(config), *MEASURING])]


def _subspace(page: SmallPage, words: Sequence[str]) -> list[str]:
    sizes = {"--image-size": lambda _: "32", "--patch-size": lambda _: "8"}
    return _with_paths(words, {"--shards": page.shards, "--output": page.local, **sizes})


def _gallery(page: SmallPage, words: Sequence[str]) -> list[str]:
    return [word if word.startswith("--") or word.endswith(".html") else page.stored(word) for word in words]


def _posthoc(page: SmallPage, words: Sequence[str]) -> list[str]:
    return _with_paths(words, {"--run": page.stored, "--output": page.local})


def _inspect(page: SmallPage, words: Sequence[str]) -> list[str]:
    found = _with_paths(words, {"--contact-sheet": page.local, "--report": page.local})
    return [page.shards(found[0]), *found[1:]]


def _make_shards(page: SmallPage, words: Sequence[str]) -> list[str] | None:
    options = {word for word in words if word.startswith("--")}
    if options - {"--input", "--output", "--resolution", "--codec", "--workers", "--background", "--channels"}:
        return None
    pictures = str(page.templates.folder / "pictures")
    small = _with_paths(words, {"--input": lambda _: pictures, "--output": page.local, "--resolution": lambda _: "32"})
    return None if (page.folder / small[small.index("--output") + 1]).exists() else small


def _new_config(page: SmallPage, words: Sequence[str]) -> list[str]:
    return _with_paths(words, {"--shards": page.shards, "--output": page.local})


def _plan(_: SmallPage, words: Sequence[str]) -> list[str]:
    return list(words)


def _smaller(settings: Sequence[str], small: Sequence[str]) -> list[str]:
    """The settings of a command; the small ones replace those that would be large."""
    keys = {text.partition("=")[0] for text in small}
    classes = [text for text in settings if text.startswith("model.num_classes=")]  # which may be 0
    return [*(text for text in settings if text.partition("=")[0] not in keys), *small, *classes]


def _with_paths(words: Sequence[str], change: dict[str, Callable[[str], str]]) -> list[str]:
    """The words, with another value for each of the options of `change`."""
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        found.append(change[before](word) if before in change else word)
    return found


def _ten(_: str) -> str:
    return "10"


SMALL: dict[str, Callable[[SmallPage, Sequence[str]], list[str] | None]] = {
    "jitscale.train": _train,
    "jitscale.evaluate": _evaluate,
    "tools/evaluate_fid.py": _evaluate_fid,
    "tools/sample.py": _sample,
    "tools/convert_checkpoint.py": _convert,
    "tools/upgrade_resolution.py": _upgrade,
    "tools/gallery.py": _gallery,
    "tools/posthoc_ema.py": _posthoc,
    "tools/inspect_shards.py": _inspect,
    "tools/index_shards.py": _inspect,
    "tools/make_shards.py": _make_shards,
    "tools/new_config.py": _new_config,
    "tools/make_reference.py": _reference,
    "tools/fit_subspace.py": _subspace,
    "tools/plan.py": _plan,
}
