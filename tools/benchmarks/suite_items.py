"""The items of the suite, the most important ones first; each is one command line of tools/benchmark.py."""

import importlib.util
from collections.abc import Collection, Iterator
from typing import NamedTuple

from jitscale.config import CHOICES, SETTINGS

PARTS = ("correct", "step", "profile", "sample", "attention", "multi")
CASES = (
    "attention",
    "network",
    "network-compiled",
    "norms",
    "gradients",
    "graphs",
    "training",
    "training-zero",
)  # checks of the command `correct`
CONFIGS = {name: f"configs/jit_{name}_256.yaml" for name in "blhg"} | {"h512": "configs/jit_h_512.yaml"}
# Settings that each switch changes in a step of H at 64 images. No switch sets a GPU's default. If this checkout does
# not know a setting, the item is skipped.
SWITCHES = {
    "compile-off": ["engine.compile=false"],
    "align-off": ["engine.align=false"],
    **{f"attention-{name}": [f"engine.attention={name}"] for name in CHOICES["engine.attention"] if name != "auto"},
    "kernels-torch": ["engine.fused_kernels=torch"],
    "graphs-off": ["engine.cuda_graphs=false"],
    "float8": ["engine.float8=true"],
    "stage-2": ["engine.zero_stage=2"],
    "bf16": ["engine.precision=bf16"],
    "bf16-stage-2": ["engine.precision=bf16", "engine.zero_stage=2"],
    "recompute": ["engine.activation_checkpointing=1"],
}
OF_ZERO = ("engine.zero_stage", "engine.precision")  # plain torch knows neither
# Packages that only the trainer needs.
TRAINER_NEEDS = ("deepspeed", "omegaconf", "fsspec", "PIL", "safetensors", "simplejpeg", "webdataset", "braceexpand")
# Tiny sizes: they show that an item runs.
SMALL_NETWORK = [
    *("model.image_size=16", "model.patch_size=4", "model.hidden_size=32", "model.depth=2", "model.num_heads=2"),
    *("model.bottleneck_dim=8", "model.in_context_len=4", "model.in_context_start=1", "model.num_classes=10"),
    "data.num_workers=0",
]
SMALL_COUNTS = {
    "step": ["--batch", "2", "--steps", "1", "--warmup", "1"],
    "profile": ["--batch", "2", "--steps", "1", "--warmup", "1"],
    "multi": ["--batch", "2", "--steps", "1"],
    "sample": ["--batch", "2", "--sampler-steps", "2", "--repeats", "1"],
    "attention": ["--batch", "2", "--repeats", "1"],
    "correct": ["--smoke"],
}
SMOKE_SECONDS = 60


class Item(NamedTuple):
    """One measurement, in a process of its own."""

    name: str
    part: str
    command: str  # command of tools/benchmark.py
    options: tuple[str, ...]
    settings: tuple[str, ...] = ()
    seconds: int = 60  # its longest time on a Hopper GPU, compilation included; after three times as long it has failed
    packages: tuple[str, ...] = ()  # if one of these modules is missing, the item is skipped
    gpus: int = 0  # on a machine with fewer the item is skipped

    def arguments(self, *, smoke: bool) -> list[str]:
        """The words after `tools/benchmark.py`."""
        options, settings = [*self.options], [*self.settings]
        if smoke:
            options += SMALL_COUNTS[self.command]
            settings += [] if self.command == "correct" else SMALL_NETWORK
        return [self.command, *options, "--json", *settings]

    @property
    def changes(self) -> tuple[str, ...]:
        """Its options and settings that differ from those of the plain item of the same size and batch."""
        return (*(("--engine plain",) if "plain" in self.options else ()), *self.settings)

    def obstacle(self, gpus: int, *, smoke: bool, carried: Collection[str] = ()) -> str | None:
        """Why it cannot run here, if the modules `carried` come as wheels; None if it can."""
        for word in self.settings:
            key, _, value = word.partition("=")
            if key not in SETTINGS:
                return f"this checkout has no setting {key}"
            if key in CHOICES and value not in map(str, CHOICES[key]):
                return f"this checkout has no {word}"
        missing = [name for name in self.packages if name not in carried and importlib.util.find_spec(name) is None]
        if missing:
            return f"this machine lacks {', '.join(missing)}"
        if gpus < self.gpus and not smoke:
            return f"this machine has {gpus} GPU{'s' if gpus != 1 else ''}, and {self.gpus} are needed"
        return None


def items() -> list[Item]:
    """All items in the order in which they run."""
    return [*_first(), *_switches(), *_rest()]


def chosen(parts: list[str]) -> list[Item]:
    """The items of `parts`, which are names of parts or of items; if there are no names, all items."""
    return [item for item in items() if not parts or item.part in parts or item.name in parts]


def names() -> list[str]:
    """The names that `chosen` accepts."""
    return [*PARTS, *(item.name for item in items())]


def _first() -> Iterator[Item]:
    yield _correct("attention", 60)
    yield _step("h", 64, seconds=170)
    # A kernel that a CUDA graph starts belongs to no operator, so its sizes are unknown: only times are measured then.
    yield _profile("h", 64, ["engine.cuda_graphs=false"])
    yield _profile("h", 64, [], "-graphs")
    yield _correct("network", 50)
    yield _correct("network-compiled", 200)
    yield _correct("training", 60, packages=("sklearn",))
    yield _correct("norms", 60)
    yield _correct("graphs", 200)
    yield _step("b", 64, seconds=90)
    yield _step("l", 64, seconds=120)


def _switches() -> Iterator[Item]:
    for name, settings in SWITCHES.items():
        packages: tuple[str, ...] = ("torchao",) if "float8" in name else ()
        if any(setting.startswith(OF_ZERO) for setting in settings):
            packages = TRAINER_NEEDS
        slow = name in ("compile-off", "attention-reference")
        yield _step("h", 64, settings, f"-{name}", compare=False, seconds=60 if slow else 90, packages=packages)
    # The host limits B, and H with few images.
    for size, batch in (("b", 64), ("h", 16)):
        yield _step(size, batch, SWITCHES["graphs-off"], "-graphs-off", compare=False, seconds=80)
    # The same step in plain torch shows the cost of ZeRO and of reading.
    for size in "bh":
        yield _step(size, 64, [], "-plain", compare=False, engine="plain", seconds=90, packages=TRAINER_NEEDS)


def _rest() -> Iterator[Item]:
    yield _correct("gradients", 90)
    for name, settings in (("", []), ("-graphs", ["evaluation.cuda_graphs=true"])):
        compare = () if name else ("--compare", "authors")
        options = ("--config", CONFIGS["h"], "--batch", "64", "--sampler-steps", "20", *compare)
        yield Item(f"sample-h-64{name}", "sample", "sample", options, tuple(settings), seconds=100)
    for size in "hblg":
        for dropout in ("0", "0.2"):
            options = ("--config", CONFIGS[size], "--batch", "64", "--dropout", dropout)
            yield Item(f"attention-{size}-{dropout}", "attention", "attention", options, seconds=25)
    yield _step("h", 16, seconds=120)
    yield _step("g", 16, seconds=170)
    yield _step("h512", 16, seconds=170)
    yield _correct("training-zero", 120, packages=("sklearn", *TRAINER_NEEDS))
    yield _step("h", 32, seconds=120)
    yield _step("h", 128, compare=False, seconds=90)
    for batch in (32, 64, 128):
        yield _step("g", batch, compare=False, seconds=120)
    for batch in (32, 64, 128):
        yield _step("h512", batch, compare=False, seconds=120)
    for size in "bl":
        for batch in (16, 32, 128):
            yield _step(size, batch, compare=size == "b" or batch < 128, seconds=110)
    for stage in ("1", "2", "3"):
        yield Item(
            f"multi-h-stage-{stage}",
            "multi",
            "multi",
            ("--config", CONFIGS["h"], "--batch", "32"),
            (f"engine.zero_stage={stage}",),
            seconds=120,
            packages=TRAINER_NEEDS,
            gpus=2,
        )


def _correct(case: str, seconds: int, packages: tuple[str, ...] = ()) -> Item:
    return Item(f"correct-{case}", "correct", "correct", ("--case", case), seconds=seconds, packages=packages)


def _profile(size: str, batch: int, settings: list[str], suffix: str = "") -> Item:
    options = ("--config", CONFIGS[size], "--batch", str(batch))
    return Item(f"profile-{size}-{batch}{suffix}", "profile", "profile", options, tuple(settings), seconds=100)


def _step(
    size: str,
    batch: int,
    settings: list[str] | None = None,
    suffix: str = "",
    *,
    compare: bool = True,
    engine: str = "auto",
    seconds: int,
    packages: tuple[str, ...] = (),
) -> Item:
    more = (*(("--compare", "authors") if compare else ()), *(("--engine", engine) if engine != "auto" else ()))
    options = ("--config", CONFIGS[size], "--batch", str(batch), "--steps", "6", "--warmup", "3", *more)
    own = tuple(settings or ())
    return Item(f"step-{size}-{batch}{suffix}", "step", "step", options, own, seconds=seconds, packages=packages)
