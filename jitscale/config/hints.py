"""Suggestions for a setting that does not exist, and for a value that belongs to another setting."""

import difflib
import re

from jitscale.config.limits import Problem
from jitscale.config.schema import CHOICES, SETTINGS

SHORTEST_WORD = 3  # letters; a shorter text is the beginning or the end of too many names
MEANING_WORDS = 3  # words at the beginning of a meaning, which are searched
_SYNONYMS = {  # other common names of a setting
    "amp": "engine.precision",
    "attention_kernel": "engine.attention",
    "bs": "data.batch_size",
    "cfg": "evaluation.guidance_scale",
    "cfg_scale": "evaluation.guidance_scale",
    "checkpoint_dir": "run.dir",
    "class_dropout_prob": "diffusion.label_drop",
    "clip_grad": "optim.grad_clip",
    "data_path": "data.shards",
    "dinov2": "evaluation.more_features",
    "dropout": "model.proj_dropout",
    "dtype": "engine.precision",
    "ema_decay": "ema.decays",
    "embed_dim": "model.hidden_size",
    "epochs": "run.max_images",
    "fid": "evaluation.features",
    "fsdp": "engine.zero_stage",
    "grad_accum": "engine.micro_batch_size",
    "grad_checkpointing": "engine.activation_checkpointing",
    "gradient_accumulation_steps": "engine.micro_batch_size",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "gradient_clipping": "optim.grad_clip",
    "heads": "model.num_heads",
    "img_size": "model.image_size",
    "layers": "model.depth",
    "learning_rate": "optim.lr",
    "log_every": "tracking.log_every_steps",
    "log_interval": "tracking.log_every_steps",
    "max_grad_norm": "optim.grad_clip",
    "mixed_precision": "engine.precision",
    "num_epochs": "run.max_images",
    "num_layers": "model.depth",
    "num_samples": "evaluation.num_images",
    "optimizer": "optim.name",
    "out_dir": "run.dir",
    "output": "run.dir",
    "output_dir": "run.dir",
    "p_mean": "diffusion.mu",
    "p_std": "diffusion.sigma",
    "path": "data.shards",
    "random_seed": "run.seed",
    "resolution": "model.image_size",
    "resume": "run.dir",
    "sampler": "evaluation.method",
    "samples": "evaluation.num_images",
    "save_every": "checkpoint.every_images",
    "save_interval": "checkpoint.every_images",
    "scheduler": "optim.schedule",
    "warmup_steps": "optim.warmup_images",
    "wd": "optim.weight_decay",
    "width": "model.hidden_size",
    "workers": "data.num_workers",
    "zero": "engine.zero_stage",
}


def remedy_of_unknown(key: str) -> str:
    """The remedy for an unknown `key`: the likeliest setting by name or meaning, or a list of all."""
    close = _likeliest(key)
    if close:
        return f"did you mean {close}?"
    groups = list(dict.fromkeys(name.partition(".")[0] for name in SETTINGS))
    group = key.partition(".")[0]
    if group in groups:
        names = [name for name in SETTINGS if name.startswith(f"{group}.")]
        return f"{group} has {', '.join(name.partition('.')[2] for name in names)}"
    return f"the groups are {', '.join(groups)}; --list-settings shows all settings"


def meant_elsewhere(problem: Problem) -> Problem:
    """`problem`. If a setting of the same group has its choices and also this value, the remedy names that setting."""
    own, group = CHOICES.get(problem.key, ()), problem.key.partition(".")[0]
    for other, choices in CHOICES.items():
        if own and other.startswith(f"{group}.") and set(own) < set(choices) and problem.value in choices:
            return problem._replace(remedy=f"write {other}={problem.value} ({SETTINGS[other].meaning})")
    return problem


def _likeliest(key: str) -> str | None:
    group, _, leaf = key.lstrip("-").rpartition(".")
    leaf = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", leaf).lower().replace("-", "_")
    names = {name: name.rpartition(".")[2] for name in SETTINGS}
    groups = {name.partition(".")[0] for name in SETTINGS}
    group = next(iter(difflib.get_close_matches(group, groups, n=1, cutoff=0.7)), group)
    own = {names[name]: name for name in SETTINGS if name.startswith(f"{group}.")}
    begun = [name for name in own.values() if names[name].startswith(leaf) and len(leaf) >= SHORTEST_WORD]
    ended = [name for name in own.values() if names[name].endswith(f"_{leaf}") and len(leaf) >= SHORTEST_WORD]
    if leaf in own or begun:
        return own.get(leaf) or begun[0]
    if leaf in _SYNONYMS or ended:
        return _SYNONYMS.get(leaf) or ended[0]
    if same := [name for name in SETTINGS if names[name] == leaf]:
        return difflib.get_close_matches(key, same, n=1, cutoff=0)[0]
    if close := difflib.get_close_matches(leaf, own, n=1, cutoff=0.8):
        return own[close[0]]
    if synonym := difflib.get_close_matches(leaf, _SYNONYMS, n=1, cutoff=0.85):
        return _SYNONYMS[synonym[0]]
    meant = [
        name for name in own.values() if leaf in re.findall(r"\w+", SETTINGS[name].meaning.lower())[:MEANING_WORDS]
    ]
    if len(meant) == 1:
        return meant[0]
    similar = difflib.get_close_matches(leaf, names.values(), n=1, cutoff=0.8)
    return next((name for name in SETTINGS if names[name] in similar), None)
