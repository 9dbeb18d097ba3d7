"""Everything that a run records: the numbers that it logs and the files of its folder. docs/reference.md shows both.

A test compares this list with what runs write. A new number or file needs its entry here.
"""

from dataclasses import dataclass

# Words in the names of numbers that stand for other text.
PLACEHOLDERS = {
    "K": "a digit from 0 to 9",
    "SET": "a weight set: `model`, `ema_DECAY` or `power_WIDTH`",
    "TIME": "a time t of the held-out loss, from 0.0625 to 0.9375",
    "NETWORK": "a feature network of `evaluation.features` or `evaluation.more_features`",
    "DISTANCE": "`fid`, `sfid`, `kid`, `fd_NETWORK` or `kd_NETWORK`",
    "COUNT": "the number of generated images: `5k` is 5,000, `16` is 16",
    "SETTING": "a setting of `evaluation` that a sweep chooses, such as `guidance_scale`",
    "NAME": "another key of `evaluations.jsonl`",
}


@dataclass(frozen=True)
class Metric:
    """A number, text or picture that a run logs."""

    name: str  # may have words of PLACEHOLDERS
    unit: str  # empty: a pure number
    meaning: str
    when: str = ""  # empty: always


@dataclass(frozen=True)
class RunFile:
    """Files of a run's folder that have one purpose."""

    path: str  # a glob below the run's folder; ** stands for any number of folders
    writer: str
    content: str
    removable: str  # whether a user may remove it, and what is lost


_POSITION = (
    Metric("step", "steps", "optimizer steps so far; skipped steps count"),
    Metric("images", "images", "images seen so far; the horizontal axis of every curve in W&B"),
)
STEP_METRICS = (
    *_POSITION,
    Metric(
        "loss",
        "",
        "mean loss of this step's batch on all ranks, in the space `diffusion.loss`; `null` if it is not finite",
    ),
    Metric(
        "loss_tK",
        "",
        "mean loss since the last line over samples with t in [K/10, (K+1)/10); t = 1 is the clean image",
        "`null` without such samples",
    ),
    Metric("middle_loss", "", "mean loss of the middle output layer; `loss` leaves it out", "`model.middle_head` > 0"),
    Metric("lr", "", "learning rate of this step; `optim.lr_factor_output` and its siblings multiply it"),
    Metric("grad_norm", "", "2-norm of the whole gradient before clipping; `null` if it is not finite"),
    Metric(
        "images_per_second",
        "images/s",
        "speed of all ranks together since the last line; the time of checkpoints, measurements and grids is left out",
    ),
    Metric(
        "mfu",
        "share",
        "model FLOPs utilisation: matrix products of the network, divided by what the GPU can do in bf16 (data sheet)",
        "on GPUs whose peak is known",
    ),
    Metric(
        "skipped_steps",
        "steps",
        "steps so far without an update, because a gradient was not finite; a rollback subtracts those it undoes",
    ),
    Metric("skipped_images", "images", "images so far that rollbacks jumped over"),
    Metric("bad_samples", "images", "images so far that could not be decoded; another image replaced each of them"),
    Metric(
        "loss_spike",
        "0 or 1",
        "1 if this loss lies more than 10 robust standard deviations above the median of the last 100 logged losses",
    ),
)
HELD_OUT_METRICS = (
    *_POSITION,
    Metric("held_out_samples", "images", "held-out samples that were measured"),
    Metric("held_out_bad_samples", "images", "held-out samples that could not be decoded; they are left out"),
    Metric("held_out/SET", "", "mean loss of a weight set over the samples and eight times"),
    Metric("held_out/SET/tTIME", "", "mean loss of a weight set at one time; t = 1 is the clean image"),
)
EVALUATION_METRICS = (
    *_POSITION,
    Metric("weights", "text", "the weight set that was sampled from"),
    Metric("num_images", "images", "generated images"),
    Metric("num_real_images", "images", "real images of the reference", "if it is known"),
    Metric(
        "fid",
        "",
        "Fréchet distance of generated to real images in the features of `evaluation.features`; lower is better",
        "if that network has logits",
    ),
    Metric(
        "sfid", "", "Fréchet distance in the spatial features of Inception; lower is better", "`features=inception`"
    ),
    Metric("inception_score", "", "Inception Score of the generated images; higher is better", "together with `fid`"),
    Metric("inception_score_std", "", "its standard deviation over ten parts of the images", "together with `fid`"),
    Metric(
        "kid",
        "",
        "kernel distance (KID) in the features of `fid`, not multiplied by 1000; lower is better",
        "final evaluation, if the features of real images are known",
    ),
    Metric("kid_std", "", "its standard deviation over random subsets", "together with `kid`"),
    Metric("precision", "share", "generated images that lie among the real ones", "as `kid`"),
    Metric("recall", "share", "real images that lie among the generated ones", "as `kid`"),
    Metric(
        "label_agreement",
        "share",
        "generated images that the feature network assigns to the class that was asked for",
        "if it has the model's number of classes",
    ),
    Metric(
        "fd_NETWORK",
        "",
        "Fréchet distance in the features of another network; lower is better",
        "`evaluation.more_features`, or a main network without logits",
    ),
    Metric("kd_NETWORK", "", "kernel distance in the features of the main network", "in place of `kid` with `fd_*`"),
    Metric("kd_NETWORK_std", "", "its standard deviation over random subsets", "together with `kd_NETWORK`"),
    Metric("DISTANCE_floor", "", "the same distance from one half of the real images to the other", "if it is known"),
    Metric(
        "NAME_COUNT",
        "",
        "a number of a measurement while training, on COUNT images: `fid_5k`; compare it with the same COUNT only",
        "`evaluation.every_images`, `few_images`",
    ),
)
RESULT_ENTRIES = (
    Metric("best", "object", "the settings with the smallest distance, to which the numbers belong"),
    Metric("table", "list", "a row for each setting that was measured: settings, `num_images`, distance, score"),
    Metric("protocol", "object", "all that determines the generated images: hash of the weights, sampler, seed, ..."),
    Metric("reference", "object", "where the real images come from"),
)
WANDB_RECORDS = (
    Metric("evaluation/NAME", "", "a number of `evaluations.jsonl`"),
    Metric("samples", "picture", "a grid of samples", "`evaluation.grid_every_images`"),
    Metric("best_samples", "picture", "a grid of samples with the best setting", "final evaluation"),
    Metric("sweep", "table", "`table` of `result.json`", "final evaluation with a sweep"),
    Metric("DISTANCE_over_guidance", "chart", "the distance over the guidance scale", "final evaluation with a sweep"),
    Metric(
        "DISTANCE_over_internal_guidance",
        "chart",
        "the distance over the scale of internal guidance",
        "final evaluation with a sweep of it alone",
    ),
    Metric("NAME", "", "summary of the run: the numbers of the final evaluation", "final evaluation"),
    Metric("best/SETTING", "", "summary of the run: `best` of `result.json`", "final evaluation"),
)

_LOST = "yes; its curves are lost"
_CHECKPOINT = "older ones, as whole folders; a run resumes from the newest one"
_CACHED = "yes; the next evaluation computes it again"
_MARKER = "yes; a Slurm job then starts the ranks again"
_IDLE = "yes, if no process works in the folder"
FILES = (
    RunFile("config.yaml", "every start", "all settings of the run", "no: evaluations and tools read it"),
    RunFile("metrics.jsonl", "training", "a line of numbers for each logged step and held-out measurement", _LOST),
    RunFile("evaluations.jsonl", "training", "a line of numbers for each measurement of samples", _LOST),
    RunFile(
        "checkpoints/step_*/*",
        "training, tools that write a run",
        "the whole state after a step: `rank_*.safetensors`, `index.json`, `config.yaml`, `COMPLETE`",
        _CHECKPOINT,
    ),
    RunFile(
        "snapshots/images_*/*",
        "training",
        "power averages for `tools/posthoc_ema.py`",
        "yes; that tool then mixes fewer",
    ),
    RunFile("*/*.partial/*", "training", "a checkpoint or snapshot while it is written", _IDLE),
    RunFile("samples/images_*.png", "training", "grids of samples, by images seen", "yes"),
    RunFile("best_samples/images_*.png", "the final evaluation", "a grid of samples with the best setting", "yes"),
    RunFile(
        "result.json",
        "the final evaluation",
        "the result of the run; a start that trains on removes it",
        "no: the same command evaluates again",
    ),
    RunFile("sweep.svg", "the final evaluation", "figure of its sweep; needs matplotlib", "yes"),
    RunFile("results/*.json", "every evaluation", "a result, named by its protocol", "yes; the result is lost"),
    RunFile("results/*.svg", "every evaluation", "figure of a sweep; needs matplotlib", "yes"),
    RunFile(
        "evaluation/samples_*/block_*.npz",
        "every evaluation",
        "features of generated images; an interrupted evaluation goes on from them",
        "yes, after the result is there",
    ),
    RunFile(
        "evaluation/real_images/*/*",
        "every evaluation",
        "statistics of real images, if they cannot lie next to the shards or in `evaluation.cache_dir`",
        _CACHED,
    ),
    RunFile("wandb_id", "training with W&B", "id of the record in W&B", "no: a resumed run would begin a new record"),
    RunFile("wandb/**", "training with W&B", "W&B's own files", "yes, after `wandb sync`"),
    RunFile("complete_train.json", "training", "training has ended, under these settings", _MARKER),
    RunFile("complete_evaluate.json", "`jitscale.evaluate`", "the evaluation has ended", _MARKER),
    RunFile(
        "attempts.json",
        "the Slurm job",
        "starts without progress, excluded nodes",
        "yes; counts and exclusions begin anew",
    ),
    RunFile(
        "stacks_rank_*.txt",
        "training",
        "stacks of the threads of a rank that hung; empty while a run is at work",
        _IDLE,
    ),
    RunFile(
        "profile/trace.json.gz", "training with `run.profile`", "trace of steps 20 to 25, for ui.perfetto.dev", "yes"
    ),
    RunFile("profile/kernels.txt", "training with `run.profile`", "the twenty slowest kernels of these steps", "yes"),
    RunFile(
        "at_*px/**",
        "training",
        "the run of a lower resolution (`progressive.resolutions`), with the same files",
        "yes, when the next stage has a checkpoint",
    ),
    RunFile("gallery.html", "`tools/gallery.py`", "a page about the run", "yes"),
    RunFile(".lock", "training", "the process at work locks it, so that no second run begins", _IDLE),
    RunFile("**/.*.partial", "any command", "a file while it is written; a killed process leaves it", _IDLE),
    RunFile(".*.partial/**", "tools that write weights", "weights until they are checked", _IDLE),
    RunFile(".preflight*", "the Slurm job", "a test whether the folder can be written", _IDLE),
)
