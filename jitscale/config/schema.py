"""Every setting of a run, each with its type, default, meaning, unit and limits in one place: `setting(...)`.

limits.py checks the value of one setting, rules.py checks several settings together.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, fields

from jitscale.config.limits import Faults, Setting, distinct, setting

WIDEST_POWER = 12**-0.5  # width of a plain mean over the whole run (gamma = 0)
LARGEST_SEED = 2**63 - 1
# No network is as large. Beyond these limits, the arithmetic about shapes and memory overflows or takes minutes.
LARGEST_SIDE, WIDEST, DEEPEST, MOST_CLASSES, LARGEST_BATCH = 2**14, 2**17, 512, 2**30, 2**20
RGB = 3
CHANNELS = (1, RGB)  # channels of an image: grey or RGB
PREDICTIONS = ("x", "e", "v", "asym")
METHODS = ("euler", "heun", "2m", "ab2")
# Beyond these limits, neighbouring times of a grid would be equal in float32.
LEAST_SHIFT, MOST_SHIFT, MOST_STEPS = 0.01, 100.0, 10_000
PRECISIONS = ("fp32", "autocast", "bf16")
FUSED_KERNELS = ("auto", "triton", "torch")
KERNELS = ("auto", "flash-attn-4", "flash-attn", "sdpa-cudnn", "sdpa-flash", "sdpa", "reference")
_OF_TRAINING_ALONE = ("attn_dropout", "proj_dropout", "route_share", "route_blocks")  # fields of ModelConfig
NETWORKS = ("digits", "glyphs", "inception", "dinov2")  # feature networks of the metrics
AUTO = "auto"  # value of `evaluation.features`: evaluation/choice.py chooses the network
SPLITS = "the Inception Score has 10 splits, and each needs an image"


def _held_out(held_out: str) -> Faults:
    fraction = held_out_fraction(DataConfig(held_out=held_out))
    if fraction is not None and not 0 < fraction < 1:
        yield (
            "must be a fraction in (0, 1), or name shards",
            "for example 0.01, a folder of shards, or null to train on all samples",
        )


def _low_and_high(interval: list[float]) -> Faults:
    if len(interval) != 2 or interval[0] >= interval[1]:
        yield "must be two times 0 <= low < high <= 1", "for example [0.1,1.0]"


@dataclass
class ModelConfig:
    """The network (arXiv 2511.13720, table 9 and appendix A). The defaults are JiT-B/16 at 256 px."""

    image_size: int = setting(256, "side of an image", unit="pixels", at_least=1, at_most=LARGEST_SIDE)
    patch_size: int = setting(
        16, "side of a patch; each patch becomes a token", unit="pixels", at_least=1, at_most=LARGEST_SIDE
    )
    in_channels: int = setting(
        RGB, "channels of an image: 3 is RGB, 1 is grey; any shard can be read as either", choices=CHANNELS
    )
    hidden_size: int = setting(768, "width of a token", at_least=1, at_most=WIDEST)
    depth: int = setting(12, "transformer blocks", at_least=1, at_most=DEEPEST)
    num_heads: int = setting(12, "attention heads", at_least=1, at_most=WIDEST)
    bottleneck_dim: int = setting(128, "bottleneck width (rank) of the patch embedding", at_least=1, at_most=WIDEST)
    in_context_len: int = setting(
        32, "class tokens that are prepended before block in_context_start; 0: none", at_least=0, at_most=WIDEST
    )
    in_context_start: int = setting(4, "first block that sees the class tokens, counted from 0", at_least=0)
    num_classes: int = setting(1000, "classes of the images; 0: unconditional", at_least=0, at_most=MOST_CLASSES)
    position_grid: int | None = setting(
        None,
        "side of the grid for which the position encodings were trained; null: the model's own grid",
        unit="tokens",
        at_least=1,
        at_most=LARGEST_SIDE,
    )
    attn_dropout: float = setting(
        0.0, "dropout probability of attention weights, in the middle half of the blocks", at_least=0, below=1
    )
    proj_dropout: float = setting(
        0.0,
        "dropout probability after attention's projection and in SwiGLU, in the middle half of the blocks",
        at_least=0,
        below=1,
    )
    middle_head: int = setting(
        0,
        "number of blocks before a second output layer, for evaluation.internal_guidance; 0: no such layer",
        at_least=0,
    )
    route_share: float = setting(
        0.0, "share of the image's tokens that skip route_blocks in training; 0: none", at_least=0, below=1
    )
    route_blocks: list[int] = setting(
        [2, -2], "the blocks that tokens skip: first and end of a Python slice, counted from 0"
    )


@dataclass
class DiffusionConfig:
    """Noise, prediction and loss: z_t = t x + (1 - t) noise_scale e, and t = 1 is the clean image."""

    prediction: str = setting(
        "x", "target of the network; asym: v inside a subspace of each patch, x outside of it", choices=PREDICTIONS
    )
    rank: int = setting(
        8, "dimensions of asym's subspace of a patch; 0 predicts x, all dimensions predict v", at_least=0
    )
    subspace: str | None = setting(
        None,
        "asym's subspace: a file of tools/fit_subspace.py; null: the first start fits one to data.shards",
        path=True,
    )
    loss: str = setting("v", "space in which the loss is computed", choices=("x", "e", "v"))
    noise_scale: float = setting(
        1.0, "factor on the noise; the recipe has 1 at 256 px, 2 at 512 px and 4 at 1024 px", above=0
    )
    mu: float = setting(-0.8, "mean of n in t = sigmoid(n), n ~ N(mu, sigma^2)")
    sigma: float = setting(0.8, "standard deviation of n, see mu", above=0)
    label_drop: float = setting(0.1, "probability of training a sample without its class", at_least=0, at_most=1)
    t_eps: float = setting(0.05, "lower bound of the denominators in 1 / (1 - t) and 1 / t", above=0)
    middle_weight: float = setting(
        1.0, "weight of the loss at model.middle_head; the loss at the output has weight 1", at_least=0
    )


@dataclass
class DataConfig:
    """The images: their source and their order."""

    shards: str = setting(
        "",
        "tar shards: a folder, glob or brace pattern, local or s3://, gs://, https://; {resolution}: the image size",
        path=True,
    )
    batch_size: int = setting(1024, "images of one optimizer step, over all ranks", at_least=1, at_most=LARGEST_BATCH)
    flip: bool = setting(True, "mirror half of the images")
    num_workers: int = setting(4, "loader processes per rank; 0: the training process reads", at_least=0)
    streams: int = setting(
        512, "contiguous streams that are interleaved; they define the order of samples (data/order.py)", at_least=1
    )
    window: int = setting(512, "samples shuffled together inside a stream", at_least=1)
    accept_new_shards: bool = setting(False, "allow a resume with other shards than before; a new epoch begins")
    classes: str = setting(
        "all", "all: shards have all classes of the model; subset: they may have fewer", choices=("all", "subset")
    )
    held_out: str | None = setting(
        None,
        "samples never trained on: shards, or a fraction chosen by sample keys; null: none",
        check=_held_out,
        path=True,
        number_too=True,
    )
    max_bad_fraction: float = setting(
        1e-4,
        "largest share of undecodable images (10 are always allowed); each is replaced by another",
        at_least=0,
        below=1,
    )
    cache_dir: str | None = setting(
        None, "node-local folder that caches remote shards; null: a folder of the user in $TMPDIR", path=True
    )
    cache_gb: float = setting(100.0, "largest size of cache_dir", unit="10^9 bytes", above=0)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate."""

    name: str = setting("adamw", "muon: Muon for hidden matrices, AdamW for the rest", choices=("adamw", "muon"))
    muon_momentum: float = setting(0.95, "Muon's momentum: the decay of its average of gradients", at_least=0, below=1)
    lr: float = setting(2e-4, "learning rate after the warm-up, for AdamW and Muon", above=0)
    lr_factor_patch_embedding: float = setting(1.0, "factor on lr for the patch embedding", above=0)
    lr_factor_embeddings: float = setting(
        1.0, "factor on lr for the embeddings of labels and times, and in-context tokens", above=0
    )
    lr_factor_output: float = setting(1.0, "factor on lr for the output layer and the middle output layer", above=0)
    lr_factor_vectors: float = setting(1.0, "factor on lr for biases and norms elsewhere", above=0)
    beta1: float = setting(0.9, "AdamW's decay of its average of gradients", at_least=0, below=1)
    beta2: float = setting(0.95, "AdamW's decay of its average of squared gradients", at_least=0, below=1)
    weight_decay: float = setting(0.0, "decoupled weight decay: it is multiplied by the learning rate", at_least=0)
    schedule: str = setting(
        "constant",
        "learning rate after the warm-up; cosine: falls to zero at the end of the run",
        choices=("constant", "cosine"),
    )
    warmup_images: int = setting(0, "images over which the learning rate rises linearly from zero", at_least=0)
    grad_clip: float = setting(0.0, "largest norm of the gradient of all weights; 0: no clipping", at_least=0)


@dataclass
class EngineConfig:
    """The devices: how they share a step (DeepSpeed ZeRO), and how they compute it."""

    zero_stage: int = setting(
        1,
        "ZeRO stage: 0 replicates everything (fp32 only, for comparisons); 3 shards the weights too",
        choices=(0, 1, 2, 3),
    )
    precision: str = setting(
        "autocast",
        "autocast: bf16 arithmetic, fp32 weights; bf16: bf16 weights, fp32 master copies",
        choices=PRECISIONS,
    )
    micro_batch_size: int | None = setting(
        None, "images per rank in one pass; null: the rank's whole share of the batch", at_least=1
    )
    attention: str = setting(
        "auto",
        "kernel of attention; auto: the first of the list that works (on CPUs and in fp32: sdpa)",
        choices=KERNELS,
    )
    fused_kernels: str = setting(
        "auto",
        "kernels that fuse q, k, v, SwiGLU, residuals and norms; auto: Triton on GPUs in bf16, if it works",
        choices=FUSED_KERNELS,
    )
    align: bool | None = setting(None, "pad feed-forward products with zeros to multiples of 64; null: true on GPUs")
    compile: bool | None = setting(None, "torch.compile, block by block; null: true on GPUs")
    float8: bool = setting(False, "matrix products of the blocks in float8 (torchao); only on GPUs from Hopper on")
    cuda_graphs: bool | None = setting(
        None, "run each block's passes in training as CUDA graphs, only on GPUs; null: true if compiled"
    )
    activation_checkpointing: int = setting(0, "recompute every k-th block in backward; 0: none", at_least=0)
    offload_optimizer: bool = setting(False, "keep optimizer state and fp32 master weights in the CPU's memory")
    hpz_group_size: int = setting(
        1, "stage 3: ranks that share a second copy of the weights (hpZ); 1: no second copy", at_least=1
    )


@dataclass
class EmaConfig:
    """EMA weights, split across ranks: exponential and power-function averages (arXiv 2312.02696, section 3)."""

    decays: list[float] = setting(
        [0.9996, 0.9998, 0.9999], "decays per step of the exponential averages", above=0, below=1, check=distinct
    )
    warmup: bool = setting(
        False, "use the decay min(decay, (1 + s) / (10 + s)) at step s, so that averages forget the initial weights"
    )
    power_widths: list[float] = setting(
        [],
        "widths of the power-function averages, such as [0.05,0.1]: standard deviations relative to the run",
        above=0,
        below=WIDEST_POWER,
        check=distinct,
    )
    snapshot_every_images: int | None = setting(
        None,
        "images between snapshots of the power-function averages for tools/posthoc_ema.py; null: no snapshots",
        at_least=1,
    )


@dataclass
class CheckpointConfig:
    """Checkpoints: when they are written, and which ones are kept."""

    every_images: int = setting(1_281_167, "images between two checkpoints", at_least=1)
    keep_last: int = setting(2, "number of complete checkpoints to keep; each save removes older ones", at_least=1)
    keep_every_images: int | None = setting(
        None, "keep the first checkpoint after each multiple for ever; null: none", at_least=1
    )
    asynchronous: bool = setting(False, "train on while a copy of the state in the CPU's memory is written")


@dataclass
class EvaluationConfig:
    """Sampling, and the metrics of the samples."""

    weights: str = setting("ema_0.9999", "weight set to sample from: model, ema_DECAY or power_WIDTH")
    method: str = setting(
        "heun",
        "sampler; heun: steps - 1 Heun steps, then one Euler step; others: one evaluation of the network per step",
        choices=METHODS,
    )
    steps: int = setting(50, "sampling steps", at_least=1, at_most=MOST_STEPS)
    time_shift: float = setting(
        1.0,
        "s in the times t / (t + (1 - t) s); 1: uniform; above 1: more steps near the noise",
        at_least=LEAST_SHIFT,
        at_most=MOST_SHIFT,
    )
    guidance_scale: float = setting(
        1.0, "scale of guidance by evaluation.guide, or by leaving out the label; 1: no guidance"
    )
    guidance_interval: list[float] = setting(
        [0.1, 1.0], "times t between which guidance acts", at_least=0, at_most=1, check=_low_and_high
    )
    internal_guidance: float = setting(
        1.0, "guidance away from the prediction of model.middle_head; 1: none", at_least=0
    )
    internal_interval: list[float] = setting(
        [0.0, 1.0], "times t between which internal guidance acts", at_least=0, at_most=1, check=_low_and_high
    )
    guide: str | None = setting(
        None, "smaller or less trained network for autoguidance; null: guidance leaves out the label", path=True
    )
    guide_weights: str | None = setting(None, "weight set of the guide; null: its default")
    t_eps: float | None = setting(None, "diffusion.t_eps while sampling; null: the value of training", above=0)
    labels: str = setting(
        "balanced", "classes of the samples; data: as often as in data.shards", choices=("balanced", "random", "data")
    )
    seed: int = setting(0, "seed of noise and random labels", at_least=0, at_most=LARGEST_SEED)
    features: str | None = setting(
        None,
        "feature network of FID and Inception Score; auto: one that fits and is at hand; null: none",
        choices=(AUTO, *NETWORKS),
    )
    features_file: str | None = setting(
        None, "file with other weights for that network; null: the published weights", path=True
    )
    more_features: list[str] = setting(
        [], "further feature networks, for their Fréchet distance only", choices=NETWORKS, check=distinct
    )
    features_dir: str | None = setting(
        None, "folder of published feature networks; null: torch hub's folder", path=True
    )
    cache_dir: str | None = setting(None, "folder for statistics of real images; null: next to their shards", path=True)
    reference: str | None = setting(None, "shards of the real images; null: data.shards", path=True)
    reference_size: int | None = setting(None, "side of real images; null: model.image_size", unit="pixels", at_least=1)
    num_images: int = setting(50_000, "images to generate", at_least=10, reason=SPLITS)
    block_size: int = setting(
        64, "images generated together; the number of ranks changes neither it nor a result", at_least=1
    )
    cuda_graphs: bool = setting(False, "run the network as a CUDA graph for each batch size, only on GPUs")
    at_end: bool = setting(False, "evaluate when the run is complete")
    sweep: list[str] | None = setting(
        None, "axes of the sweep, as for tools/evaluate_fid.py: [guidance=2:3:0.2,ema=averages]; null: no sweep"
    )
    sweep_images: int = setting(
        5000, "images for each setting of the sweep, at most num_images", at_least=10, reason=SPLITS
    )
    sweep_keep: int = setting(1, "number of best settings that are measured again, on num_images", at_least=1)
    sweep_max_share: float | None = setting(
        None, "largest share of the run's compute; a larger sweep is refused; null: no limit", above=0
    )
    every_images: int = setting(
        0, "images between two measurements (on few_images samples) while training; 0: never", at_least=0
    )
    few_images: int = setting(1000, "images to generate for a measurement while training", at_least=10, reason=SPLITS)
    grid_every_images: int = setting(0, "images between two logged grids of samples; 0: never", at_least=0)
    held_out_every_images: int = setting(
        0, "images between two measurements of the loss on data.held_out; 0: never", at_least=0
    )


@dataclass
class TrackingConfig:
    """Records of the numbers, besides metrics.jsonl in the run's folder."""

    wandb: str = setting("off", "record in Weights & Biases", choices=("online", "offline", "off"))
    project: str = setting("jitscale", "project in Weights & Biases")
    name: str | None = setting(None, "name in Weights & Biases; null: the name of the run's folder")
    log_every_steps: int = setting(100, "steps between two lines of training metrics", at_least=1)


@dataclass
class RunConfig:
    """The run as a whole."""

    dir: str = setting("runs/jit", "folder of checkpoints and results", path=True)
    max_images: int | None = setting(
        None, "images at which the run ends; if max_steps is set too, the run ends at the first of both", at_least=0
    )
    max_steps: int | None = setting(None, "optimizer steps at which the run ends, see max_images", at_least=0)
    seed: int = setting(0, "seed of everything random in training", at_least=0, at_most=LARGEST_SEED)
    route_until_images: int | None = setting(
        None, "images until which tokens are routed (model.route_share); null: to the end", at_least=0
    )
    device: str = setting("auto", "auto: a GPU if there is one, else the CPU", choices=("auto", "cpu", "cuda"))
    init_from: str | None = setting(
        None, "weights to start from: a run, step folder, .safetensors, authors' .pth; null: random", path=True
    )
    init_weights: str | None = setting(None, "weight set of init_from; null: model, or the only one")
    init_ema: bool = setting(
        True, "continue the averages of init_from that ema.* names; false: start them from init_weights"
    )
    rollback_after: int = setting(
        10, "steps in a row without a finite gradient after which the run rolls back", at_least=1
    )
    max_rollbacks: int = setting(3, "rollbacks of one process; if it needs one more, the run ends", at_least=0)
    profile: bool = setting(False, "profile steps 20 to 25 of rank 0: RUN/profile/trace.json.gz and kernels.txt")
    hang_timeout: float = setting(
        1800.0, "time without a finished step after which a rank ends itself; 0: never", unit="seconds", at_least=0
    )


@dataclass
class ProgressiveConfig:
    """Lower resolutions that are trained first, with the same number of tokens (docs/upgrade.md)."""

    resolutions: list[int] = setting(
        [], "rising resolutions; model.image_size comes after them", unit="pixels", at_least=1
    )
    images: list[int] = setting(
        [], "images seen at each of them; run.max_images counts the last stage only", at_least=1
    )


@dataclass
class Config:
    """All settings. Each attribute is a group."""

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
    """The fraction of the samples that `data.held_out` asks for. None if it names shards or is None."""
    try:
        return None if data.held_out is None else float(data.held_out)
    except ValueError:
        return None


def network_differences(before: Config, now: Config, *, ignored: Collection[str] = ()) -> list[str]:
    """The settings that make `now` another network than `before` with the same weights, as `key: before -> now`.

    Settings that act in training only (dropout, routing) do not count. Neither do those that `ignored` names: fields of
    the model, or `rank`.
    """
    names = [name for name in vars(before.model) if name not in (*_OF_TRAINING_ALONE, *ignored)]
    both = [(f"model.{name}", getattr(before.model, name), getattr(now.model, name)) for name in names]
    both.append(("diffusion.prediction", before.diffusion.prediction, now.diffusion.prediction))
    if before.diffusion.prediction == now.diffusion.prediction == "asym" and "rank" not in ignored:
        both.append(("diffusion.rank", before.diffusion.rank, now.diffusion.rank))
    return [f"{key}: {old} -> {new}" for key, old, new in both if old != new]
