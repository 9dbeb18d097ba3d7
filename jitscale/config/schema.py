"""Every setting of a run, each with its type, default, meaning, unit and limits in one place: `setting(...)`.

limits.py says what a setting can have, and rules.py what several settings must have together.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from jitscale.config.limits import Faults, Setting, distinct, setting

WIDEST_POWER = 12**-0.5  # relative standard deviation of a plain mean over the whole run, where gamma is 0
LARGEST_SEED = 2**63 - 1
# Far beyond what anybody trains; with more, counting shapes and memory overflows or takes minutes.
LARGEST_SIDE, WIDEST, DEEPEST, MOST_CLASSES, LARGEST_BATCH = 2**14, 2**17, 512, 2**30, 2**20
RGB = 3
CHANNELS = (1, RGB)  # that an image may have: grey has one
PREDICTIONS = ("x", "e", "v", "asym")
METHODS = ("euler", "heun", "2m", "ab2")
# Beyond these, times of a grid would fall together in float32.
LEAST_SHIFT, MOST_SHIFT, MOST_STEPS = 0.01, 100.0, 10_000
PRECISIONS = ("fp32", "autocast", "bf16")
FUSED_KERNELS = ("auto", "triton", "torch")
KERNELS = ("auto", "flash-attn-4", "flash-attn", "sdpa-cudnn", "sdpa-flash", "sdpa", "reference")
_OF_TRAINING_ALONE = ("attn_dropout", "proj_dropout", "route_share", "route_blocks")  # fields of ModelConfig
NETWORKS = ("digits", "glyphs", "inception", "dinov2")  # that embed images for the metrics
AUTO = "auto"  # as `evaluation.features`: evaluation/choice.py names the network
SPLITS = "fewer is too few for the 10 splits of the Inception Score"


def _held_out(held_out: str) -> Faults:
    fraction = held_out_fraction(DataConfig(held_out=held_out))
    if fraction is not None and not 0 < fraction < 1:
        yield (
            "must be a fraction in (0, 1), or name shards",
            "for example 0.01, a folder of shards, or null: all are trained on",
        )


def _low_and_high(interval: list[float]) -> Faults:
    if len(interval) != 2 or interval[0] >= interval[1]:
        yield "must be two times 0 <= low < high <= 1", "for example [0.1,1.0]"


@dataclass
class ModelConfig:
    """The network (arXiv 2511.13720, table 9 and appendix A). The defaults are JiT-B/16 at 256 px."""

    image_size: int = setting(256, "side of an image", unit="pixels", at_least=1, at_most=LARGEST_SIDE)
    patch_size: int = setting(
        16, "side of the patch that becomes a token", unit="pixels", at_least=1, at_most=LARGEST_SIDE
    )
    in_channels: int = setting(RGB, "channels of an image: 3 is RGB, 1 grey; shards are read as both", choices=CHANNELS)
    hidden_size: int = setting(768, "elements of a token", at_least=1, at_most=WIDEST)
    depth: int = setting(12, "transformer blocks", at_least=1, at_most=DEEPEST)
    num_heads: int = setting(12, "attention heads", at_least=1, at_most=WIDEST)
    bottleneck_dim: int = setting(128, "rank of the patch embedding", at_least=1, at_most=WIDEST)
    in_context_len: int = setting(
        32, "class tokens prepended before block in_context_start; 0: none", at_least=0, at_most=WIDEST
    )
    in_context_start: int = setting(4, "the first block with class tokens", at_least=0)
    num_classes: int = setting(1000, "classes; 0: unconditional", at_least=0, at_most=MOST_CLASSES)
    position_grid: int | None = setting(
        None, "trained side of the grid; null: its own", unit="tokens", at_least=1, at_most=LARGEST_SIDE
    )
    attn_dropout: float = setting(0.0, "probability, in the middle half of the depth", at_least=0, below=1)
    proj_dropout: float = setting(0.0, "probability, in the middle half of the depth", at_least=0, below=1)
    middle_head: int = setting(
        0, "a second output layer after so many blocks, for evaluation.internal_guidance; 0: none", at_least=0
    )
    route_share: float = setting(
        0.0, "share of the image's tokens that skip route_blocks in training; 0: none", at_least=0, below=1
    )
    route_blocks: list[int] = setting([2, -2], "first and end of a Python slice of the blocks, counted from 0")


@dataclass
class DiffusionConfig:
    """z_t = t x + (1 - t) noise_scale e, with t = 1 clean; what the network predicts and where the loss is taken."""

    prediction: str = setting(
        "x", "what the network predicts; asym: v in a subspace, x outside of it", choices=PREDICTIONS
    )
    rank: int = setting(8, "dimensions of asym's subspace of a patch; 0 is x, all are v", at_least=0)
    subspace: str | None = setting(
        None, "asym: a file of tools/fit_subspace.py; null: fitted to data.shards at the first start", path=True
    )
    loss: str = setting("v", "where the loss is taken", choices=("x", "e", "v"))
    noise_scale: float = setting(1.0, "relative to the resolution at which the recipe was tuned", above=0)
    mu: float = setting(-0.8, "t = sigmoid(n), n ~ N(mu, sigma^2)")
    sigma: float = setting(0.8, "see mu", above=0)
    label_drop: float = setting(0.1, "probability of training a sample without its class", at_least=0, at_most=1)
    t_eps: float = setting(0.05, "smallest denominator in 1 / (1 - t) and 1 / t", above=0)
    middle_weight: float = setting(1.0, "of the loss of model.middle_head, next to that of the output", at_least=0)


@dataclass
class DataConfig:
    """Where the images come from and in which order."""

    shards: str = setting(
        "", "folder, glob or braces of tars; s3://, gs://, https://; {resolution}: the image size", path=True
    )
    batch_size: int = setting(1024, "images of one optimizer step over all ranks", at_least=1, at_most=LARGEST_BATCH)
    flip: bool = setting(True, "mirror half of the images")
    num_workers: int = setting(4, "loader processes a rank; 0 reads in the training process", at_least=0)
    streams: int = setting(512, "contiguous streams read side by side; part of the order (data/order.py)", at_least=1)
    window: int = setting(512, "samples shuffled together inside a stream", at_least=1)
    accept_new_shards: bool = setting(False, "resume with other shards than before: a new epoch of them begins")
    classes: str = setting("all", "subset: shards may hold fewer classes than the model", choices=("all", "subset"))
    held_out: str | None = setting(
        None, "never trained on: shards, or a fraction by keys; null: none", check=_held_out, path=True, number_too=True
    )
    max_bad_fraction: float = setting(
        1e-4, "largest share of undecodable images (10 are always allowed); others replace them", at_least=0, below=1
    )
    cache_dir: str | None = setting(
        None, "node-local folder for remote shards; null: a folder of the user in $TMPDIR", path=True
    )
    cache_gb: float = setting(100.0, "largest size of that folder", unit="10^9 bytes", above=0)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = setting("adamw", "muon: hidden matrices by Muon, the rest by AdamW", choices=("adamw", "muon"))
    muon_momentum: float = setting(0.95, "Muon's decay of gradients", at_least=0, below=1)
    lr: float = setting(2e-4, "learning rate after the warm-up, of Muon too", above=0)
    lr_factor_patch_embedding: float = setting(1.0, "times lr, for the patch embedding", above=0)
    lr_factor_embeddings: float = setting(1.0, "times lr, for labels, times and in-context tokens", above=0)
    lr_factor_output: float = setting(1.0, "times lr, for the output layer, and the middle one", above=0)
    lr_factor_vectors: float = setting(1.0, "times lr, for biases and norms elsewhere", above=0)
    beta1: float = setting(0.9, "AdamW's decay of gradients", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of squared gradients", at_least=0, below=1)
    weight_decay: float = setting(0.0, "decoupled: times the learning rate", at_least=0)
    schedule: str = setting("constant", "cosine: to zero at the end of the run", choices=("constant", "cosine"))
    warmup_images: int = setting(0, "the learning rate rises linearly from zero", at_least=0)
    grad_clip: float = setting(0.0, "largest global gradient norm; 0: no clipping", at_least=0)


@dataclass
class EngineConfig:
    """How a step is laid over the devices (DeepSpeed ZeRO)."""

    zero_stage: int = setting(1, "0 replicates all (fp32 only, to compare), 3 shards weights too", choices=(0, 1, 2, 3))
    precision: str = setting(
        "autocast", "autocast: bf16 arithmetic, fp32 weights; bf16: bf16 weights, fp32 masters", choices=PRECISIONS
    )
    micro_batch_size: int | None = setting(None, "images a rank and pass; null: the rank's whole share", at_least=1)
    attention: str = setting("auto", "auto: the fastest that works", choices=KERNELS)
    fused_kernels: str = setting(
        "auto",
        "q, k, v, SwiGLU, residuals and norms in one pass; auto: Triton's on GPUs in bf16 if they work",
        choices=FUSED_KERNELS,
    )
    align: bool | None = setting(None, "pad feed-forward products with zeros to multiples of 64; null: on GPUs")
    compile: bool | None = setting(None, "torch.compile, block by block; null: on GPUs")
    float8: bool = setting(False, "products of the blocks in float8, by torchao: GPUs from Hopper on")
    cuda_graphs: bool | None = setting(None, "each block's passes in training as CUDA graphs: GPUs; null: if compiled")
    activation_checkpointing: int = setting(0, "recompute every k-th block in backward; 0: none", at_least=0)
    offload_optimizer: bool = setting(False, "optimizer state and masters in the CPU's memory")
    hpz_group_size: int = setting(1, "stage 3: ranks that share a second copy of weights (hpZ); 1: none", at_least=1)


@dataclass
class EmaConfig:
    """EMA weights, split across ranks: exponential averages and power functions (arXiv 2312.02696, section 3)."""

    decays: list[float] = setting([0.9996, 0.9998, 0.9999], "per step", above=0, below=1, check=distinct)
    warmup: bool = setting(False, "decay of step s is min(decay, (1 + s) / (10 + s)), so that the start is forgotten")
    power_widths: list[float] = setting(
        [], "standard deviations relative to the run, as [0.05,0.1]", above=0, below=WIDEST_POWER, check=distinct
    )
    snapshot_every_images: int | None = setting(None, "store power averages (posthoc_ema.py); null: never", at_least=1)


@dataclass
class CheckpointConfig:
    """When the state is written."""

    every_images: int = setting(1_281_167, "the distance between checkpoints", at_least=1)
    keep_last: int = setting(2, "complete checkpoints kept; older ones are removed after a save", at_least=1)
    keep_every_images: int | None = setting(None, "keep the first after each multiple for ever; null: none", at_least=1)
    asynchronous: bool = setting(False, "go on while the state, copied to the CPU's memory, is written")


@dataclass
class EvaluationConfig:
    """Sampling and the metrics taken from samples."""

    weights: str = setting("ema_0.9999", "weight set that is sampled from: model, ema_DECAY or power_WIDTH")
    method: str = setting(
        "heun", "heun: steps - 1 Heun steps, then one Euler step; 2m, ab2: one evaluation a step", choices=METHODS
    )
    steps: int = setting(50, "sampling steps", at_least=1, at_most=MOST_STEPS)
    time_shift: float = setting(
        1.0, "s of the times t / (t + (1 - t) s); 1: uniform", at_least=LEAST_SHIFT, at_most=MOST_SHIFT
    )
    guidance_scale: float = setting(1.0, "1: no guidance")
    guidance_interval: list[float] = setting([0.1, 1.0], "in t", at_least=0, at_most=1, check=_low_and_high)
    internal_guidance: float = setting(1.0, "away from the prediction of model.middle_head; 1: none", at_least=0)
    internal_interval: list[float] = setting([0.0, 1.0], "of it, in t", at_least=0, at_most=1, check=_low_and_high)
    guide: str | None = setting(None, "autoguidance by a smaller or less trained network; null: no labels", path=True)
    guide_weights: str | None = setting(None, "the guide's weight set; null: its default")
    t_eps: float | None = setting(None, "as diffusion.t_eps, while sampling; null: training's", above=0)
    labels: str = setting("balanced", "classes; data: as in data.shards", choices=("balanced", "random", "data"))
    seed: int = setting(0, "for noise and random labels", at_least=0, at_most=LARGEST_SEED)
    features: str | None = setting(
        None, "network of FID and Inception Score; auto: one at hand that fits; null: none", choices=(AUTO, *NETWORKS)
    )
    features_file: str | None = setting(None, "its weights, of the same shape; null: the published ones", path=True)
    more_features: list[str] = setting([], "for the Fréchet distance alone", choices=NETWORKS, check=distinct)
    features_dir: str | None = setting(
        None, "folder of published feature networks; null: torch hub's folder", path=True
    )
    cache_dir: str | None = setting(None, "folder for statistics of real images; null: next to their shards", path=True)
    reference: str | None = setting(None, "shards of the real images; null: data.shards", path=True)
    reference_size: int | None = setting(None, "side of real images; null: model.image_size", unit="pixels", at_least=1)
    num_images: int = setting(50_000, "generated images", at_least=10, reason=SPLITS)
    block_size: int = setting(64, "images generated together; fixed, so that ranks do not change a result", at_least=1)
    cuda_graphs: bool = setting(False, "the network as one CUDA graph for each size of a batch: GPUs only")
    at_end: bool = setting(False, "evaluate when the run is complete")
    sweep: list[str] | None = setting(None, "axes of evaluate_fid.py, as [guidance=2:3:0.2,ema=averages]; null: none")
    sweep_images: int = setting(5000, "images of each setting of it; num_images at most", at_least=10, reason=SPLITS)
    sweep_keep: int = setting(1, "best settings that are measured on num_images", at_least=1)
    sweep_max_share: float | None = setting(None, "of the run's compute; a larger sweep is refused; null: any", above=0)
    every_images: int = setting(0, "while training, measure few_images so often; 0: never", at_least=0)
    few_images: int = setting(1000, "images generated while training", at_least=10, reason=SPLITS)
    grid_every_images: int = setting(0, "log a grid of samples so often; 0: never", at_least=0)
    held_out_every_images: int = setting(0, "measure the loss of data.held_out so often; 0: never", at_least=0)


@dataclass
class TrackingConfig:
    """Where the numbers go, besides metrics.jsonl in the run's folder."""

    wandb: str = setting("off", "Weights & Biases", choices=("online", "offline", "off"))
    project: str = setting("jitscale", "project in W&B")
    name: str | None = setting(None, "name in W&B; null: the name of the run's folder")
    log_every_steps: int = setting(100, "the distance between two records of training", at_least=1)


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = setting("runs/jit", "folder of checkpoints and results", path=True)
    max_images: int | None = setting(None, "the smaller of max_images and max_steps ends the run", at_least=0)
    max_steps: int | None = setting(None, "see max_images", at_least=0)
    seed: int = setting(0, "for everything random in training", at_least=0, at_most=LARGEST_SEED)
    route_until_images: int | None = setting(
        None, "model.route_share acts until so many images are seen; null: to the end", at_least=0
    )
    device: str = setting("auto", "auto: a GPU where there is one", choices=("auto", "cpu", "cuda"))
    init_from: str | None = setting(
        None, "start from: a run, step folder, .safetensors, authors' .pth; null: random", path=True
    )
    init_weights: str | None = setting(None, "the weight set to start from; null: model, or the only one")
    init_ema: bool = setting(True, "averages of init_from go on where ema.* has them; false: start from init_weights")
    rollback_after: int = setting(10, "steps in a row without a finite gradient, after which to roll back", at_least=1)
    max_rollbacks: int = setting(3, "in one process; the next one ends the run", at_least=0)
    profile: bool = setting(False, "steps 20 to 25 of the first rank: RUN/profile/trace.json.gz and kernels.txt")
    hang_timeout: float = setting(
        1800.0, "a rank without a finished step for so long ends itself; 0: never", unit="seconds", at_least=0
    )


@dataclass
class ProgressiveConfig:
    """Lower resolutions to train at first, with as many tokens as at the last one (docs/upgrade.md)."""

    resolutions: list[int] = setting([], "rising; model.image_size comes after them", unit="pixels", at_least=1)
    images: list[int] = setting([], "seen at each of them; run.max_images counts the last stage", at_least=1)


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


SETTINGS: dict[str, Setting] = {  # every setting by its dotted name, such as `optim.lr`
    f"{group.name}.{one.name}": one.metadata["setting"]
    for group in fields(Config)
    for one in fields(group.default_factory)  # type: ignore[arg-type]
}
CHOICES = {key: known.choices for key, known in SETTINGS.items() if known.choices}


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


def images_of_run(config: Config) -> int:
    """Images until `run.max_images` or `run.max_steps` ends the run."""
    run = config.run
    ends = [run.max_images, None if run.max_steps is None else run.max_steps * config.data.batch_size]
    return min(end for end in ends if end is not None)


def held_out_fraction(data: DataConfig) -> float | None:
    """The fraction of the samples that `data.held_out` asks for; None where it names shards, or nothing."""
    try:
        return None if data.held_out is None else float(data.held_out)
    except ValueError:
        return None


def network_differences(before: Config, now: Config, *, ignored: Collection[str] = ()) -> list[str]:
    """The settings, as `key: before -> now`, that make `now` another network than `before` with the same weights.

    Settings of training alone (dropout, routing) and the fields in `ignored`, of the model or `rank`, do not count.
    """
    names = [name for name in vars(before.model) if name not in (*_OF_TRAINING_ALONE, *ignored)]
    both = [(f"model.{name}", getattr(before.model, name), getattr(now.model, name)) for name in names]
    both.append(("diffusion.prediction", before.diffusion.prediction, now.diffusion.prediction))
    if before.diffusion.prediction == now.diffusion.prediction == "asym" and "rank" not in ignored:
        both.append(("diffusion.rank", before.diffusion.rank, now.diffusion.rank))
    return [f"{key}: {old} -> {new}" for key, old, new in both if old != new]
