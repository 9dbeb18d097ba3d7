"""A first configuration for a user's own pictures. Each setting has the reason for its value.

For large data and networks, the rules come from the paper's recipe (arXiv 2511.13720, table 9). For small ones, they
come from the small runs of docs/experiments.md and docs/own-images.md. The aim is a first result in minutes on a CPU
and in hours on a GPU, not the best result. The rules for CPUs were tested; the rules for GPUs were not.
"""

import json
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from jitscale.config import RGB, Config, DataConfig, EmaConfig, ModelConfig, ema_name
from jitscale.errors import ConfigError
from jitscale.planner.choice import Candidate, recommend
from jitscale.planner.timing import Cluster

GPU_TOKENS, CPU_TOKENS = 16, 8  # per side of an image: the paper's 16; 8 on CPUs, a quarter of the tokens
# Pixels per side up to which the noise scale is 1: that of the paper's recipe, and that of the CPU runs in
# docs/experiments.md. On a CPU at 128 px, patches of a letter fit together badly with noise scale 1, and well with 4.
GPU_RESOLUTION, CPU_RESOLUTION = 256, 32
FEWEST_TOKENS, MOST_TOKENS = 4, 32  # per side, the range in which a patch size is searched
LARGE_DATA = 500_000  # from so many pictures on, the paper's batch is worth it
LEARNED_BY_HEART = 1000  # with fewer pictures, samples are mostly copies of them
MOST_EPOCHS = 2000
FEWEST_TO_HOLD_OUT = 200  # with fewer pictures, all are needed for training
PARTS = 10  # parts of the run; after each, it saves, draws samples and measures
LENGTHS = (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)  # averages' lengths in steps; the last is the paper's
LEAST_SHARE = 16  # pictures per GPU and step, as in the paper on 64 GPUs; with fewer, a GPU waits for its host

NO_CLASSES = "guidance needs at least two classes"


@dataclass(frozen=True)
class Machine:
    """The machine of the run."""

    gpus: int  # 0: the run computes on the CPU
    gpu_memory: float = 0.0  # bytes of one GPU


@dataclass(frozen=True)
class Pictures:
    """The content of the shards."""

    shards: str  # the value of `data.shards`
    count: int
    classes: int  # 0: they have no labels
    image_size: int  # pixels per side
    channels: int = RGB


class Line(NamedTuple):
    """One setting of the configuration."""

    key: str
    value: Any
    reason: str


@dataclass(frozen=True)
class _Size:
    """A network and how it is trained."""

    model: ModelConfig
    fewest: int  # pictures that a GPU run needs for this network
    batch: int
    lr: float  # at this batch
    steps: int  # at this batch
    guidance: float
    source: str  # source of these numbers


def _network(width: int, depth: int, heads: int, bottleneck: int, class_tokens: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=width,
        depth=depth,
        num_heads=heads,
        bottleneck_dim=bottleneck,
        in_context_len=class_tokens,
        in_context_start=depth // 3,
    )


SIZES = {
    "tiny": _Size(_network(128, 6, 4, 48, 4), 0, 64, 2e-3, 2000, 2.0, "the small runs of docs/experiments.md"),
    "small": _Size(_network(256, 8, 4, 64, 8), 0, 64, 5e-4, 20_000, 2.0, "between tiny and medium"),
    "medium": _Size(_network(384, 12, 6, 128, 32), 5000, 256, 3e-4, 50_000, 2.0, "half of JiT-B's width"),
    "b": _Size(ModelConfig(), 100_000, 256, 5e-5, 200_000, 3.0, "JiT-B (arXiv 2511.13720, table 9)"),
}


def starting_lines(pictures: Pictures, machine: Machine, run_dir: str, size: str | None = None) -> list[Line]:
    """The settings of a first run, in the order of the schema's groups.

    `size` is a name in `SIZES`; None: chosen by the machine and the number of pictures. Raises a ConfigError if no
    patch size divides the pictures, or if the network does not fit into the GPU's memory.
    """
    on_gpu = machine.gpus > 0
    name = size or _size_for(pictures.count, on_gpu)
    chosen = SIZES[name]
    model = _model_of(chosen.model, pictures, GPU_TOKENS if on_gpu else CPU_TOKENS)
    batch = _batch(chosen, pictures, machine)
    images = _images(chosen, batch, pictures)
    steps = images // batch
    decays = _decays(steps)
    part = images // PARTS // batch * batch
    held_out = _held_out(pictures.count, on_gpu)
    return [
        *_model_lines(model, name, chosen, pictures, on_gpu),
        *_diffusion_lines(pictures, on_gpu),
        Line("data.shards", pictures.shards, f"{pictures.count:,} pictures"),
        Line("data.batch_size", batch, _batch_reason(chosen, batch, machine)),
        Line("data.flip", False, "true doubles the pictures, if mirrored ones are valid: photos yes, letters no"),
        Line("data.num_workers", 4 if on_gpu else 0, "processes that decode" if on_gpu else "training uses all cores"),
        Line("data.held_out", held_out, _held_out_reason(held_out, pictures.count)),
        Line("optim.lr", _rounded(chosen.lr * batch / chosen.batch), f"{chosen.source}; in proportion to the batch"),
        Line("optim.warmup_images", images // 20 // batch * batch, "5% of the run, with smaller steps"),
        *_engine_lines(model, batch, decays, machine),
        Line("ema.decays", decays, f"averages over {_lengths(decays)} of the run's {steps:,} steps"),
        Line("ema.warmup", True, "without it early grids are grey: the average still holds the random start"),
        Line("checkpoint.every_images", part, f"{PARTS} times in the run; the same command resumes it"),
        *_evaluation_lines(chosen, pictures, on_gpu, weights=ema_name(decays[-1]), every=part, held_out=held_out),
        Line("tracking.log_every_steps", min(100, max(1, steps // 100)), "at least a hundred points of the loss"),
        Line("run.dir", run_dir, "checkpoints, samples and numbers"),
        Line("run.max_images", images, f"{steps:,} steps, {images / pictures.count:,.0f} epochs; raise it to go on"),
        Line("run.device", "cuda" if on_gpu else "cpu", _device_reason(machine)),
    ]


def as_yaml(lines: list[Line], head: str) -> str:
    """The settings as YAML text, each with its reason as a comment."""
    text, group = "".join(f"# {line}\n" for line in head.splitlines()), ""
    for key, value, reason in lines:
        before, group = group, key.partition(".")[0]
        text += "" if group == before else f"{group}:\n"
        text += f"  {key.partition('.')[2]}: {json.dumps(value)} # {reason}\n"
    return text


def start_command(config: str, machine: Machine) -> str:
    """The command that starts the run, on one machine."""
    launcher = f"torchrun --nproc-per-node {machine.gpus}" if machine.gpus > 1 else "python"
    return f"{launcher} -m jitscale.train --config {config}"


def _device_reason(machine: Machine) -> str:
    if not machine.gpus:
        return "no GPU is used"
    return "one GPU" if machine.gpus == 1 else f"{machine.gpus} GPUs"


def _size_for(count: int, on_gpu: bool) -> str:
    if not on_gpu:
        return "tiny"
    return max((name for name in SIZES if name != "tiny" and SIZES[name].fewest <= count), key=list(SIZES).index)


def _model_of(model: ModelConfig, pictures: Pictures, tokens: int) -> ModelConfig:
    """`model` for these pictures; the tokens per side divide the image size and are nearest to `tokens`."""
    size = pictures.image_size
    dividing = [n for n in range(FEWEST_TOKENS, min(size, MOST_TOKENS) + 1) if size % n == 0]
    if not dividing:
        fault = f"no number of patches from {FEWEST_TOKENS} to {MOST_TOKENS} per side divides it"
        nearest = max(1, round(size / GPU_TOKENS)) * GPU_TOKENS
        raise ConfigError(f"{pictures.shards}: {size} pixels per side: {fault}; pack with --resolution {nearest}")
    side = min(dividing, key=lambda n: (abs(n - tokens), n))
    patch, channels = size // side, pictures.channels
    return replace(model, image_size=size, patch_size=patch, in_channels=channels, num_classes=pictures.classes)


def _batch(chosen: _Size, pictures: Pictures, machine: Machine) -> int:
    wanted = 1024 if chosen is SIZES["b"] and pictures.count >= LARGE_DATA else chosen.batch
    share = max(LEAST_SHARE, -(-wanted // max(1, machine.gpus)))
    return share * machine.gpus if machine.gpus else wanted


def _batch_reason(chosen: _Size, batch: int, machine: Machine) -> str:
    if batch == 1024:
        return "the paper's"
    if batch != chosen.batch:
        return f"{batch // machine.gpus} on each of {machine.gpus} GPUs"
    return "small data and networks learn from many small steps" if batch < 256 else "many steps; the paper's is 1024"


def _images(chosen: _Size, batch: int, pictures: Pictures) -> int:
    """Images of the run, a multiple of `PARTS` steps."""
    wanted = min(chosen.steps * chosen.batch, MOST_EPOCHS * pictures.count)
    return max(1, wanted // (PARTS * batch)) * PARTS * batch


def _decays(steps: int) -> list[float]:
    """The decays of a short and a long average: at most a thirtieth and a tenth of the run."""
    longest = [max((n for n in LENGTHS if n <= steps / part), default=LENGTHS[0]) for part in (30, 10)]
    return [1 - 1 / length for length in sorted(set(longest))]


def _lengths(decays: list[float]) -> str:
    return " and ".join(f"{1 / (1 - decay):.0f}" for decay in decays)


def _held_out(count: int, on_gpu: bool) -> float | None:
    """The fraction that is never trained on: a twentieth, or as many pictures as can be measured in seconds."""
    return None if count < FEWEST_TO_HOLD_OUT else _rounded(min(0.05, (1000 if on_gpu else 64) / count))


def _held_out_reason(held_out: float | None, count: int) -> str:
    if held_out is None:
        return "there are too few pictures to hold any out"
    few = "; with so few pictures, expect copies of them" if count < LEARNED_BY_HEART else ""
    return f"about {held_out * count:.0f} pictures that are never trained on{few}"


def _measured(count: int, on_gpu: bool) -> int:
    return 1000 if not on_gpu else 10_000 if count < LARGE_DATA else 50_000


def _rounded(value: float) -> float:
    """`value` with two significant digits."""
    return float(f"{value:.2g}")


def _model_lines(model: ModelConfig, name: str, chosen: _Size, pictures: Pictures, on_gpu: bool) -> list[Line]:
    side = model.image_size // model.patch_size
    tokens = f"{side} x {side} tokens" + ("" if on_gpu else ", few enough for a CPU")
    fitting = f"{name}: {chosen.source}"
    why = f"for {pictures.count:,} pictures" if on_gpu else "a CPU trains it in minutes"
    classes = "as in the shards" if pictures.classes else "the shards have no labels"
    return [
        Line("model.image_size", model.image_size, "pixels per side, as in the shards"),
        Line("model.patch_size", model.patch_size, tokens),
        *([Line("model.in_channels", model.in_channels, "the shards are grey")] if model.in_channels != RGB else []),
        Line("model.hidden_size", model.hidden_size, f"{fitting}; {why}"),
        Line("model.depth", model.depth, "transformer blocks"),
        Line("model.num_heads", model.num_heads, f"attention heads of width {model.hidden_size // model.num_heads}"),
        Line("model.bottleneck_dim", model.bottleneck_dim, "bottleneck of the patch embedding"),
        Line("model.in_context_len", model.in_context_len, "class tokens"),
        Line("model.in_context_start", model.in_context_start, "a third of the depth, as in the paper"),
        Line("model.num_classes", model.num_classes, classes),
    ]


def _diffusion_lines(pictures: Pictures, on_gpu: bool) -> list[Line]:
    resolution = GPU_RESOLUTION if on_gpu else CPU_RESOLUTION
    scale = max(1.0, pictures.image_size / resolution)
    guides = pictures.classes > 1
    drop = "share of samples without their class, for guidance" if guides else NO_CLASSES
    return [
        Line("diffusion.noise_scale", scale, f"side / {resolution}, at least 1; raise it if parts do not fit together"),
        Line("diffusion.label_drop", 0.1 if guides else 0.0, drop),
    ]


def _engine_lines(model: ModelConfig, batch: int, decays: list[float], machine: Machine) -> list[Line]:
    if not machine.gpus:
        return [Line("engine.precision", "fp32", "fastest on CPUs")]
    option = _fitting(model, batch, decays, machine)
    memory = f"{option.memory.total / 1e9:.1f} of {machine.gpu_memory / 1e9:.0f} GB, counted from shapes"
    again = "none: memory suffices" if not option.activation_checkpointing else "recomputes blocks to save memory"
    return [
        Line("engine.precision", "autocast", "the paper's: bf16 arithmetic, fp32 weights"),
        Line("engine.zero_stage", option.stage, "how ranks share memory; tools/plan.py compares the stages"),
        Line("engine.micro_batch_size", option.micro_batch_size, f"pictures of a GPU in one pass: {memory}"),
        Line("engine.activation_checkpointing", option.activation_checkpointing, again),
    ]


def _evaluation_lines(
    chosen: _Size, pictures: Pictures, on_gpu: bool, *, weights: str, every: int, held_out: float | None
) -> list[Line]:
    steps = (50, "the paper's") if on_gpu else (20, "the paper's 50 steps take more than twice as long")
    guidance = (chosen.guidance, "clearer classes, less variety; 1: no guidance")
    if pictures.classes < 2:
        guidance = (1.0, NO_CLASSES)
    learning = "the loss rises when the network memorises the pictures" if held_out else "no pictures are held out"
    return [
        Line("evaluation.weights", weights, "the longest average; tools/sample.py --weights tries others"),
        Line("evaluation.steps", *steps),
        Line("evaluation.guidance_scale", *guidance),
        Line("evaluation.features", "auto", "Inception or DINOv2 if its weights are at hand; docs/own-images.md"),
        Line(
            "evaluation.num_images", _measured(pictures.count, on_gpu), "of a FID; compare only FIDs of equal numbers"
        ),
        Line("evaluation.grid_every_images", every, "see RUN/samples/ while it trains"),
        Line("evaluation.held_out_every_images", every if held_out else 0, learning),
    ]


def _fitting(model: ModelConfig, batch: int, decays: list[float], machine: Machine) -> Candidate:
    config = Config(model, data=DataConfig(batch_size=batch), ema=EmaConfig(decays=decays))
    config.run.max_images = batch
    option = recommend(config, Cluster(machine.gpus, machine.gpu_memory, gpus_per_node=max(8, machine.gpus)))
    if option is None:
        room = f"{machine.gpu_memory / 1e9:.0f} GB"
        raise ConfigError(f"a network of width {model.hidden_size} does not fit in {room}; give a smaller --size")
    return option
