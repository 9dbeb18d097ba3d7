"""Every setting of a run: typed defaults, composition of YAML files, dotted overrides, and what is refused.

A value is looked up in this order, the last one wins: the dataclass default, the files named under `defaults:` of the
YAML file (relative to it, in order, recursively), the YAML file itself, the dotted overrides of the command line.
Importing this file does not import torch, so that a mistake is reported at once.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from jitscale.errors import ConfigError

FEWEST_SAMPLES = 10  # of an evaluation
WIDEST_POWER = 12**-0.5  # relative standard deviation of a plain mean over the whole run, where gamma is 0

CHOICES: dict[str, tuple[str, ...]] = {
    "diffusion.prediction": ("x", "e", "v"),
    "diffusion.loss": ("x", "e", "v"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("constant", "cosine"),
    "engine.attention": ("auto", "flash-attn-4", "flash-attn", "sdpa", "reference"),
    "engine.precision": ("fp32", "autocast", "bf16"),
    "evaluation.features": ("digits", "glyphs", "inception"),  # with logits, for the Inception Score
    "evaluation.more_features": ("digits", "dinov2", "glyphs", "inception"),
    "evaluation.method": ("euler", "heun"),
    "evaluation.labels": ("balanced", "random", "data"),
    "tracking.wandb": ("online", "offline", "off"),
    "run.device": ("auto", "cpu", "cuda"),
}


@dataclass
class ModelConfig:
    """The network (arXiv 2511.13720, table 9 and appendix A). The defaults are JiT-B/16 at 256 px."""

    image_size: int = 256  # pixels a side
    patch_size: int = 16  # pixels a side
    hidden_size: int = 768
    depth: int = 12  # transformer blocks
    num_heads: int = 12
    bottleneck_dim: int = 128  # rank of the patch embedding
    in_context_len: int = 32  # class tokens prepended before block `in_context_start`; 0 for none
    in_context_start: int = 4
    num_classes: int = 1000  # 0: unconditional
    position_grid: int | None = None  # tokens a side over which positions were trained; null: those there are
    attn_dropout: float = 0.0  # in the middle half of the depth
    proj_dropout: float = 0.0  # in the middle half of the depth


@dataclass
class DiffusionConfig:
    """z_t = t x + (1 - t) noise_scale e, with t = 1 clean; what the network predicts and where the loss is taken."""

    prediction: str = "x"
    loss: str = "v"
    noise_scale: float = 1.0  # relative to the resolution at which the recipe was tuned
    mu: float = -0.8  # t = sigmoid(n), n ~ N(mu, sigma^2)
    sigma: float = 0.8
    label_drop: float = 0.1  # probability of training a sample without its class
    t_eps: float = 0.05  # smallest denominator in 1 / (1 - t) and 1 / t


@dataclass
class DataConfig:
    """Where the images come from and in which order."""

    # A folder, a glob or a brace pattern of tar shards; s3://, gs:// and https:// too; {resolution} is the image size.
    shards: str = ""
    batch_size: int = 1024  # global: images of one optimizer step over all ranks
    flip: bool = True  # mirror half of the images
    num_workers: int = 4  # loader processes a rank; 0 reads in the training process
    streams: int = 512  # contiguous streams read side by side; part of the order, see data/order.py
    window: int = 512  # samples shuffled together inside a stream
    accept_new_shards: bool = False  # resume with other shards than before: a new epoch of them begins
    # Never trained on: shards, named as in `shards`, or a fraction in (0, 1) chosen by the keys; null: train on all.
    held_out: str | None = None
    max_bad_fraction: float = 1e-4  # of the images may be undecodable, 10 in any case; others stand in for them
    cache_dir: str | None = None  # node-local folder for remote shards; null: a folder of the user in $TMPDIR
    cache_gb: float = 100.0  # 10^9 bytes of it at most


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = "adamw"  # or muon: hidden matrices by Muon, the rest by AdamW, at the same learning rate
    muon_momentum: float = 0.95
    lr: float = 2e-4
    lr_factor_patch_embedding: float = 1.0  # times lr, for the patch embedding
    lr_factor_embeddings: float = 1.0  # for labels, times and in-context tokens
    lr_factor_output: float = 1.0  # for the output layer
    lr_factor_vectors: float = 1.0  # for biases and norms elsewhere
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    schedule: str = "constant"  # after the warm-up: constant, or cosine to zero at the end of the run
    warmup_images: int = 0  # linear from zero
    grad_clip: float = 0.0  # largest global gradient norm; 0 for no clipping


@dataclass
class EngineConfig:
    """How a step is laid over the devices (DeepSpeed ZeRO)."""

    zero_stage: int = 1  # 0 replicates everything (fp32 only, for comparison), 3 shards weights too
    precision: str = "autocast"  # fp32; autocast (bf16 arithmetic, fp32 weights); bf16 (bf16 weights, fp32 masters)
    micro_batch_size: int | None = None  # images a rank and forward pass; null: the rank's whole share
    attention: str = "auto"  # kernel: flash-attn-4, flash-attn, sdpa, reference; auto: the fastest that works
    align: bool | None = None  # pad feed-forward products with zeros to multiples of 64; null: on GPUs
    compile: bool | None = None  # torch.compile, block by block; null: on GPUs
    float8: bool = False  # products of the blocks in float8, by torchao: GPUs from Hopper on
    activation_checkpointing: int = 0  # recompute every k-th block in the backward pass; 0: keep all activations
    offload_optimizer: bool = False  # optimizer state and masters in the CPU's memory
    hpz_group_size: int = 1  # stage 3: ranks of a group that keeps a second copy of the weights (ZeRO++ hpZ); 1: none


@dataclass
class EmaConfig:
    """Averages of the weights, kept in shards: exponential ones, and power functions (arXiv 2312.02696, section 3)."""

    decays: list[float] = field(default_factory=lambda: [0.9996, 0.9998, 0.9999])
    warmup: bool = False  # decay of step s is min(decay, (1 + s) / (10 + s)), so that the start is forgotten
    power_widths: list[float] = field(default_factory=list)  # standard deviations relative to the run, as [0.05,0.1]
    snapshot_every_images: int | None = None  # store the power averages for tools/posthoc_ema.py; null: never


@dataclass
class CheckpointConfig:
    """When the state is written."""

    every_images: int = 1_281_167
    keep_last: int = 2  # complete checkpoints kept; older ones are removed after a save
    keep_every_images: int | None = None  # the first checkpoint after each multiple of this is kept for ever
    asynchronous: bool = False  # go on while the state, copied to the CPU's memory, is written


@dataclass
class EvaluationConfig:
    """Sampling and the metrics taken from samples."""

    weights: str = "ema_0.9999"  # weight set that is sampled from: model, ema_<decay> or power_<width>
    method: str = "heun"
    steps: int = 50  # heun: steps - 1 Heun steps, then one Euler step
    guidance_scale: float = 1.0  # 1: no guidance
    guidance_interval: list[float] = field(default_factory=lambda: [0.1, 1.0])  # in t
    guide: str | None = None  # autoguidance: a smaller or less trained network, any stored weights; null: no label
    guide_weights: str | None = None  # its weight set; null: its default
    t_eps: float | None = None  # smallest denominator in 1 / (1 - t) and 1 / t while sampling; null: training's
    labels: str = "balanced"  # classes asked for: balanced; random; data, which are as frequent as in data.shards
    seed: int = 0
    features: str | None = None  # feature network of FID and IS; null: none
    features_file: str | None = None  # its weights, if not the published ones; of the same shape
    more_features: list[str] = field(default_factory=list)  # networks of which only the Fréchet distance is taken
    features_dir: str | None = None  # where published weights of feature networks are; null: torch hub's folder
    cache_dir: str | None = None  # where statistics of real images are kept; null: beside their shards
    reference: str | None = None  # shards whose images are the real ones; null: data.shards
    reference_size: int | None = None  # pixels a side to which those are brought; null: model.image_size
    num_images: int = 50_000
    block_size: int = 64  # images generated together; fixed, so that no result depends on the number of ranks
    cuda_graphs: bool = False  # the network as one CUDA graph for each size of a batch: GPUs only
    at_end: bool = False  # evaluate when the run is complete
    # What the final evaluation tries, as [guidance=1.8:2.6:0.2,ema=averages]: the axes of tools/evaluate_fid.py. The
    # best setting is then measured on num_images. null: the configured setting alone.
    sweep: list[str] | None = None
    sweep_images: int = 5000  # generated for each setting of the sweep; num_images at most
    sweep_keep: int = 1  # best settings that are measured on num_images
    sweep_max_share: float | None = None  # of the run's compute that the sweep may take; more is refused; null: any
    every_images: int = 0  # measure on few images while training, after each multiple of this; 0: never
    few_images: int = 1000  # generated then
    grid_every_images: int = 0  # log a grid of samples; 0: never
    held_out_every_images: int = 0  # measure the loss of data.held_out after each multiple of this; 0: never


@dataclass
class TrackingConfig:
    """Where the numbers go, beside metrics.jsonl in the run's folder."""

    wandb: str = "off"
    project: str = "jitscale"
    name: str | None = None  # null: the name of the run's folder
    log_every_steps: int = 100


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = "runs/jit"
    max_images: int | None = None  # the smaller of max_images and max_steps ends the run
    max_steps: int | None = None
    seed: int = 0
    device: str = "auto"
    init_from: str | None = None  # start from these weights: a run, a step folder, .safetensors, the authors' .pth
    init_weights: str | None = None  # the weight set to start from; null: model, or the only one
    init_ema: bool = True  # the file's averages go on where ema.* has them too; false: all start from init_weights
    rollback_after: int = 10  # steps in a row without a finite gradient: back to the last checkpoint, on in the data
    max_rollbacks: int = 3  # in one process; the next one ends the run
    profile: bool = False  # steps 20 to 25 of the first rank: RUN/profile/trace.json.gz and kernels.txt
    hang_timeout: float = 1800.0  # seconds without a finished step after which a rank ends itself; 0: never


@dataclass
class ProgressiveConfig:
    """Lower resolutions to train at first, with as many tokens as at the last one (docs/upgrade.md)."""

    resolutions: list[int] = field(default_factory=list)  # pixels a side, rising; model.image_size comes after them
    images: list[int] = field(default_factory=list)  # seen at each of them; run.max_images counts the last stage


@dataclass
class Config:
    """All settings, one group an attribute."""

    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    run: RunConfig = field(default_factory=RunConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)


def ema_name(decay: float) -> str:
    """The name of an average's weight set, such as `ema_0.9999`."""
    return f"ema_{decay}"


def power_name(width: float) -> str:
    """The name of a power-function average's weight set, such as `power_0.050`: three decimals, or more if needed."""
    return f"power_{width:.3f}" if float(f"{width:.3f}") == width else f"power_{width}"


def weight_set_names(config: Config) -> list[str]:
    """The weight sets that a run of `config` writes."""
    ema = config.ema
    return ["model", *(ema_name(decay) for decay in ema.decays), *(power_name(width) for width in ema.power_widths)]


def held_out_fraction(data: DataConfig) -> float | None:
    """The fraction of the samples that `data.held_out` asks for; None where it names shards, or nothing."""
    try:
        return None if data.held_out is None else float(data.held_out)
    except ValueError:
        return None


def load_config(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    world_size: int = 1,
    bf16_supported: Callable[[str], bool] = lambda device: True,
    needs_shards: bool = False,
) -> Config:
    """Compose `path` and the dotted `overrides` (`optim.lr=1e-4`) into a checked `Config`.

    Args:
        path: a YAML file.
        overrides: settings that win over the file.
        world_size: ranks that will share a batch.
        bf16_supported: whether the device that `run.device` names has bfloat16.
        needs_shards: whether `data.shards` must be set.

    Raises:
        ConfigError: everything that is wrong, together, each with its value, its limit and the remedy.
    """
    problems: list[_Problem] = []
    user = OmegaConf.create(_compose(Path(path), ()))
    for override in overrides:
        try:
            user.merge_with_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            problems.append(_Problem(override, "", f"is not key=value ({_first_line(error)})", "write group.key=value"))
        else:
            if "=" not in override:
                problems.append(_Problem(override, "", "has no '='", "write group.key=value"))
    try:
        values = cast(dict[str, Any], OmegaConf.to_container(user, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_first_line(error)}") from error

    typed = OmegaConf.structured(Config)
    known = {key for key, _ in _leaves(cast(dict[str, Any], OmegaConf.to_container(typed)), "")}
    bare = {problem.key for problem in problems}
    for key, value in _leaves(values, ""):
        if key not in bare:
            problems += _assign(typed, key, value, known)
    config = cast(Config, OmegaConf.to_object(typed))
    wrong = {problem.key for problem in problems}
    problems += [
        problem
        for problem in _impossible(config, world_size, bf16_supported, needs_shards)
        if wrong.isdisjoint(problem.depends_on)
    ]
    if problems:
        raise ConfigError(_report(str(path), problems))
    return config


def network_differences(before: Config, now: Config, *, ignored: Collection[str] = ()) -> list[str]:
    """The settings, as `key: before -> now`, that make `now` another network than `before` with the same weights.

    Dropout and the model fields in `ignored` do not count.
    """
    unlike = [
        (f"model.{f.name}", getattr(before.model, f.name), getattr(now.model, f.name))
        for f in fields(ModelConfig)
        if f.name not in ("attn_dropout", "proj_dropout", *ignored)
    ]
    unlike.append(("diffusion.prediction", before.diffusion.prediction, now.diffusion.prediction))
    return [f"{key}: {old} -> {new}" for key, old, new in unlike if old != new]


def check_model_config(model: ModelConfig, source: str) -> None:
    """Refuse a network that cannot be built; `source` names where it was described.

    Raises:
        ConfigError: every impossible field.
    """
    problems = list(_impossible_model(model))
    if problems:
        raise ConfigError(_report(source, problems))


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain nested dictionaries."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; fields that did not exist when `values` was written take their defaults."""
    return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values)))


class _Problem(NamedTuple):
    key: str
    value: Any
    limit: str
    remedy: str
    others: tuple[str, ...] = ()

    @property
    def depends_on(self) -> set[str]:
        return {self.key, *self.others}


def _report(source: str, problems: list[_Problem]) -> str:
    lines = [
        f"{key if value == '' else f'{key}={value}'} {limit}; {remedy}" for key, value, limit, remedy, _ in problems
    ]
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return "\n  ".join([f"{source}: {len(lines)} settings refused", *lines])


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _compose(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """`path` merged over the files of its `defaults:` list."""
    if path.resolve() in parents:
        raise ConfigError(f"{path}: its defaults lead back to itself; remove one of them")
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        origin = f" (named in the defaults of {parents[-1]})" if parents else ""
        raise ConfigError(f"{path}: no such config file{origin}; see the folder configs/") from error
    except (OSError, UnicodeDecodeError, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: must hold groups such as 'model:' and 'data:', found a list")
    names = loaded.pop("defaults", ListConfig([]))
    if not isinstance(names, ListConfig):
        raise ConfigError(f"{path}: defaults: {names} is not a list; write [size/b, recipe/imagenet] or the like")
    base = OmegaConf.create({})
    for name in names:
        base.merge_with(_compose((path.parent / str(name)).with_suffix(".yaml"), (*parents, path.resolve())))
    base.merge_with(loaded)
    return cast(dict[str, Any], OmegaConf.to_container(base))


def _leaves(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _assign(typed: DictConfig, key: str, value: Any, known: set[str]) -> list[_Problem]:
    """Put one value into the typed configuration, or say why not."""
    if key not in known:
        if key.split(".", maxsplit=1)[0] == key and key in typed:
            return [_Problem(key, value, "is a group of settings", f"write {key}.NAME=value")]
        close = difflib.get_close_matches(key, known, n=1)
        remedy = f"did you mean {close[0]}?" if close else "see jitscale/config.py for all settings"
        return [_Problem(key, value, "is not a setting", remedy)]
    if isinstance(value, bool) and "off" in CHOICES.get(key, ()):
        value = "on" if value else "off"  # YAML reads a bare off as false
    try:
        OmegaConf.update(typed, key, value)
    except OmegaConfBaseException as error:
        return [_Problem(key, value, f"has the wrong type ({_first_line(error)})", "give a value of the expected type")]
    return []


def _impossible(
    config: Config, world_size: int, bf16_supported: Callable[[str], bool], needs_shards: bool
) -> Iterator[_Problem]:
    """Values and combinations that no run can have."""
    yield from _wrong_choices(config)
    yield from _out_of_range(config)
    yield from _impossible_model(config.model)
    yield from _impossible_batch(config, world_size)
    if config.engine.zero_stage == 0 and config.engine.precision != "fp32":
        yield _Problem(
            "engine.zero_stage",
            0,
            "works in fp32 only (its bf16 path has no fp32 masters to average or save)",
            "set engine.zero_stage=1 or engine.precision=fp32",
            ("engine.precision",),
        )
    if config.engine.hpz_group_size > 1 and config.engine.zero_stage != 3:
        yield _Problem(
            "engine.hpz_group_size",
            config.engine.hpz_group_size,
            "needs ZeRO stage 3, whose weights it keeps near",
            "set engine.zero_stage=3 or engine.hpz_group_size=1",
            ("engine.zero_stage",),
        )
    if world_size > 1 and world_size % config.engine.hpz_group_size:
        yield _Problem(
            "engine.hpz_group_size",
            config.engine.hpz_group_size,
            f"must divide the {world_size} ranks",
            "give the number of GPUs of a node",
        )
    if config.engine.offload_optimizer and config.engine.zero_stage == 0:
        yield _Problem(
            "engine.offload_optimizer",
            True,
            "needs a ZeRO stage from 1 on",
            "set engine.zero_stage=1 or engine.offload_optimizer=false",
            ("engine.zero_stage",),
        )
    if config.engine.offload_optimizer and config.optim.name == "muon":
        yield _Problem(
            "engine.offload_optimizer",
            True,
            "does not go with Muon, whose matrices are put together over the GPUs' network",
            "set engine.offload_optimizer=false or optim.name=adamw",
            ("optim.name",),
        )
    if config.engine.precision != "fp32" and not bf16_supported(config.run.device):
        yield _Problem(
            "engine.precision",
            config.engine.precision,
            "needs bfloat16, which this GPU lacks (compute capability 8.0 or newer has it)",
            "set engine.precision=fp32",
        )
    yield from _impossible_evaluation(config)
    yield from _impossible_held_out(config)
    yield from _impossible_stages(config)
    if config.run.max_images is None and config.run.max_steps is None:
        yield _Problem("run.max_images", None, "neither it nor run.max_steps says where the run ends", "set one")
    if needs_shards and not config.data.shards:
        yield _Problem("data.shards", "''", "is not set", "give a folder, a glob or a brace pattern of tar shards")


def _wrong_choices(config: Config) -> Iterator[_Problem]:
    for key, choices in CHOICES.items():
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        for one in value if isinstance(value, list) else [value]:
            if one is not None and one not in choices:
                yield _Problem(key, one, f"must be one of {', '.join(choices)}", "choose one of them")


def _out_of_range(config: Config) -> Iterator[_Problem]:
    positive = (
        "diffusion.noise_scale",
        "diffusion.sigma",
        "diffusion.t_eps",
        "data.batch_size",
        "data.streams",
        "data.window",
        "data.cache_gb",
        "optim.lr",
        "optim.lr_factor_patch_embedding",
        "optim.lr_factor_embeddings",
        "optim.lr_factor_output",
        "optim.lr_factor_vectors",
        "ema.snapshot_every_images",
        "checkpoint.every_images",
        "checkpoint.keep_last",
        "checkpoint.keep_every_images",
        "engine.hpz_group_size",
        "run.rollback_after",
        "evaluation.steps",
        "evaluation.reference_size",
        "evaluation.block_size",
        "evaluation.sweep_keep",
        "evaluation.t_eps",
        "evaluation.sweep_max_share",
        "tracking.log_every_steps",
    )
    not_negative = (
        "data.num_workers",
        "engine.activation_checkpointing",
        "run.max_rollbacks",
        "run.hang_timeout",
        "optim.weight_decay",
        "optim.warmup_images",
        "optim.grad_clip",
        "evaluation.grid_every_images",
        "evaluation.held_out_every_images",
        "evaluation.every_images",
        "evaluation.seed",
        "run.max_images",
        "run.max_steps",
        "run.seed",
    )
    fractions = ("optim.beta1", "optim.beta2", "optim.muon_momentum", "data.max_bad_fraction")
    for key in (*positive, *not_negative, *fractions, "diffusion.label_drop"):
        group, name = key.split(".")
        value = getattr(getattr(config, group), name)
        if value is None:
            continue
        if key in positive and not value > 0:
            yield _Problem(key, value, "must be greater than 0", "give a positive number")
        elif key in not_negative and not value >= 0:
            yield _Problem(key, value, "must not be negative", "give 0 or more")
        elif key in fractions and not 0 <= value < 1:
            yield _Problem(key, value, "must lie in [0, 1)", "give such a number")
        elif key == "diffusion.label_drop" and not 0 <= value <= 1:
            yield _Problem(key, value, "must lie in [0, 1]", "give a probability")
    for key in ("run.seed", "evaluation.seed"):
        group, name = key.split(".")
        if getattr(getattr(config, group), name) >= 2**63:
            yield _Problem(key, getattr(getattr(config, group), name), "must be below 2^63", "give a smaller number")
    for key, value in _leaves(to_dict(config), ""):
        if any(isinstance(v, float) and not math.isfinite(v) for v in (value if isinstance(value, list) else [value])):
            yield _Problem(key, value, "must be finite", "give an ordinary number")
    if config.engine.zero_stage not in range(4):
        yield _Problem("engine.zero_stage", config.engine.zero_stage, "must be 0, 1, 2 or 3", "choose one of them")
    for decay in config.ema.decays:
        if not 0 < decay < 1:
            yield _Problem("ema.decays", decay, "must lie in (0, 1)", "give such a number, for example 0.9999")
    if len(set(config.ema.decays)) < len(config.ema.decays):
        yield _Problem("ema.decays", config.ema.decays, "names a decay twice", "remove one")
    for width in config.ema.power_widths:
        if not 0 < width < WIDEST_POWER:
            yield _Problem(
                "ema.power_widths",
                width,
                f"must lie in (0, {WIDEST_POWER:.4f})",
                "give such a number, for example 0.05",
            )
    if len(set(config.ema.power_widths)) < len(config.ema.power_widths):
        yield _Problem("ema.power_widths", config.ema.power_widths, "names a width twice", "remove one")
    if config.ema.snapshot_every_images is not None and not config.ema.power_widths:
        yield _Problem(
            "ema.snapshot_every_images",
            config.ema.snapshot_every_images,
            "stores power averages, and ema.power_widths=[] has none",
            "set ema.power_widths=[0.05,0.1]",
            ("ema.power_widths",),
        )


def _impossible_model(model: ModelConfig) -> Iterator[_Problem]:
    sizes_are_positive = True
    for name in ("image_size", "patch_size", "hidden_size", "depth", "num_heads", "bottleneck_dim"):
        if getattr(model, name) < 1:
            sizes_are_positive = False
            yield _Problem(f"model.{name}", getattr(model, name), "must be at least 1", "give a positive number")
    if model.position_grid is not None and model.position_grid < 1:
        yield _Problem("model.position_grid", model.position_grid, "must be at least 1", "give a number or null")
    for name in ("in_context_len", "num_classes"):
        if getattr(model, name) < 0:
            yield _Problem(f"model.{name}", getattr(model, name), "must not be negative", "give 0 or more")
    for name in ("attn_dropout", "proj_dropout"):
        if not 0 <= getattr(model, name) < 1:
            yield _Problem(f"model.{name}", getattr(model, name), "must lie in [0, 1)", "give a probability")
    if not sizes_are_positive:
        return
    if model.image_size % model.patch_size:
        yield _Problem(
            "model.image_size",
            model.image_size,
            f"must be a multiple of model.patch_size={model.patch_size}",
            f"for example {-(-model.image_size // model.patch_size) * model.patch_size}",
            ("model.patch_size",),
        )
    if model.hidden_size % model.num_heads or (model.hidden_size // model.num_heads) % 4:
        yield _Problem(
            "model.hidden_size",
            model.hidden_size,
            f"must be a multiple of 4 x model.num_heads={model.num_heads} (2-D rotation needs head dims of 4 n)",
            f"for example {-(-model.hidden_size // (4 * model.num_heads)) * 4 * model.num_heads}",
            ("model.num_heads",),
        )
    if model.in_context_len > 0 and not 0 <= model.in_context_start < model.depth:
        yield _Problem(
            "model.in_context_start",
            model.in_context_start,
            f"must lie in [0, model.depth={model.depth})",
            "lower it, or set model.in_context_len=0",
            ("model.depth", "model.in_context_len"),
        )


def _impossible_batch(config: Config, world_size: int) -> Iterator[_Problem]:
    batch, micro = config.data.batch_size, config.engine.micro_batch_size
    if batch < 1:
        return
    if batch % world_size:
        yield _Problem(
            "data.batch_size",
            batch,
            f"must be a multiple of the number of ranks, {world_size}",
            f"for example {-(-batch // world_size) * world_size}",
        )
    elif micro is not None and (micro < 1 or (batch // world_size) % micro):
        share = batch // world_size
        yield _Problem(
            "engine.micro_batch_size",
            micro,
            f"must divide a rank's share of the batch, {batch} / {world_size} = {share}",
            f"for example {max(d for d in range(1, share + 1) if share % d == 0 and d <= max(1, micro))}",
            ("data.batch_size",),
        )


def _impossible_evaluation(config: Config) -> Iterator[_Problem]:
    evaluation = config.evaluation
    for name in ("num_images", "few_images", "sweep_images"):
        if getattr(evaluation, name) < FEWEST_SAMPLES:
            yield _Problem(
                f"evaluation.{name}",
                getattr(evaluation, name),
                f"is too few for the {FEWEST_SAMPLES} splits of the inception score",
                f"give at least {FEWEST_SAMPLES}",
            )
    names = weight_set_names(config)
    if evaluation.weights not in names:
        yield _Problem(
            "evaluation.weights",
            evaluation.weights,
            f"is not a weight set of this run ({', '.join(names)})",
            "choose one of them or add its decay to ema.decays or its width to ema.power_widths",
            ("ema.decays", "ema.power_widths"),
        )
    interval = evaluation.guidance_interval
    if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
        yield _Problem(
            "evaluation.guidance_interval", interval, "must be two times 0 <= low < high <= 1", "for example [0.1,1.0]"
        )
    if evaluation.guidance_scale != 1.0 and evaluation.guide is None and config.model.num_classes == 0:
        yield _Problem(
            "evaluation.guidance_scale",
            evaluation.guidance_scale,
            "guides towards a class, and model.num_classes=0 has none",
            "set evaluation.guidance_scale=1.0, or evaluation.guide",
            ("model.num_classes",),
        )
    unlabelled = config.model.num_classes > 0 and config.diffusion.label_drop == 0
    if evaluation.guidance_scale != 1.0 and evaluation.guide is None and unlabelled:
        yield _Problem(
            "evaluation.guidance_scale",
            evaluation.guidance_scale,
            "needs a network trained without labels too, and diffusion.label_drop=0 never does that",
            "set diffusion.label_drop=0.1 or evaluation.guidance_scale=1.0",
            ("diffusion.label_drop", "model.num_classes"),
        )
    if (evaluation.at_end or evaluation.every_images) and evaluation.features is None:
        yield _Problem(
            "evaluation.at_end" if evaluation.at_end else "evaluation.every_images",
            evaluation.at_end or evaluation.every_images,
            "needs a feature network, and evaluation.features is null",
            f"set evaluation.features to one of {', '.join(CHOICES['evaluation.features'])}",
            ("evaluation.features",),
        )


def _impossible_held_out(config: Config) -> Iterator[_Problem]:
    held_out, fraction = config.data.held_out, held_out_fraction(config.data)
    if held_out == "" or (fraction is not None and not 0 < fraction < 1):
        yield _Problem(
            "data.held_out",
            held_out or "''",
            "must be a fraction in (0, 1), or name shards",
            "for example 0.01, a folder of shards, or null to train on all",
        )
    if config.evaluation.held_out_every_images > 0 and held_out is None:
        yield _Problem(
            "evaluation.held_out_every_images",
            config.evaluation.held_out_every_images,
            "measures held-out samples, and data.held_out=null has none",
            "set data.held_out, for example to 0.01, or evaluation.held_out_every_images=0",
            ("data.held_out",),
        )


def _impossible_stages(config: Config) -> Iterator[_Problem]:
    model, progressive = config.model, config.progressive
    resolutions, images = progressive.resolutions, progressive.images
    if [*resolutions, model.image_size] != sorted({*resolutions, model.image_size}):
        yield _Problem(
            "progressive.resolutions",
            resolutions,
            f"must rise, and end below model.image_size={model.image_size}",
            f"for example [{model.image_size // 4},{model.image_size // 2}]",
            ("model.image_size",),
        )
    for resolution in resolutions:
        if resolution < 1 or model.patch_size * resolution % max(1, model.image_size):
            yield _Problem(
                "progressive.resolutions",
                resolution,
                f"would have patches of {model.patch_size * resolution / max(1, model.image_size):g} pixels a side",
                f"give a multiple of {model.image_size // math.gcd(model.image_size, model.patch_size)}",
                ("model.image_size", "model.patch_size"),
            )
    if len(images) != len(resolutions) or any(count < 1 for count in images):
        yield _Problem(
            "progressive.images",
            images,
            f"must say for each of the {len(resolutions)} lower resolutions how many images are seen there",
            "give as many positive numbers",
            ("progressive.resolutions",),
        )
    if resolutions and config.model.position_grid is not None:
        yield _Problem(
            "progressive.resolutions",
            resolutions,
            "keeps the number of tokens, and model.position_grid is for another number of them",
            "set model.position_grid=null",
            ("model.position_grid",),
        )


def setting_names() -> list[str]:
    """Every dotted setting, such as `optim.lr`."""
    names: list[str] = []
    for group in fields(Config):
        group_type = group.default_factory
        assert is_dataclass(group_type)
        names += [f"{group.name}.{setting.name}" for setting in fields(group_type)]
    return names
