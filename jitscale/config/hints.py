"""What a user may have meant with a setting that does not exist, or with a value that belongs to another one."""

import difflib
import re

from jitscale.config.limits import Problem
from jitscale.config.schema import CHOICES, SETTINGS

_SYNONYMS = {  # other names of the field for a setting
    "amp": "engine.precision",
    "attention_kernel": "engine.attention",
    "cfg": "evaluation.guidance_scale",
    "cfg_scale": "evaluation.guidance_scale",
    "checkpoint_dir": "run.dir",
    "class_dropout_prob": "diffusion.label_drop",
    "clip_grad": "optim.grad_clip",
    "data_path": "data.shards",
    "dropout": "model.proj_dropout",
    "dtype": "engine.precision",
    "ema_decay": "ema.decays",
    "embed_dim": "model.hidden_size",
    "epochs": "run.max_images",
    "grad_checkpointing": "engine.activation_checkpointing",
    "gradient_checkpointing": "engine.activation_checkpointing",
    "gradient_clipping": "optim.grad_clip",
    "heads": "model.num_heads",
    "img_size": "model.image_size",
    "layers": "model.depth",
    "learning_rate": "optim.lr",
    "max_grad_norm": "optim.grad_clip",
    "mixed_precision": "engine.precision",
    "num_epochs": "run.max_images",
    "num_samples": "evaluation.num_images",
    "num_layers": "model.depth",
    "optimizer": "optim.name",
    "out_dir": "run.dir",
    "output_dir": "run.dir",
    "output": "run.dir",
    "path": "data.shards",
    "random_seed": "run.seed",
    "resolution": "model.image_size",
    "resume": "run.dir",
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
    """What to do about `key`, which is no setting: the likeliest one by name, by its meaning, or all there are."""
    close = _likeliest(key)
    if close:
        return f"did you mean {close}?"
    groups = list(dict.fromkeys(name.partition(".")[0] for name in SETTINGS))
    group = key.partition(".")[0]
    if group in groups:
        names = [name for name in SETTINGS if name.startswith(f"{group}.")]
        return f"{group} has {', '.join(name.partition('.')[2] for name in names)}"
    return f"the groups are {', '.join(groups)}; --print-config shows all settings"


def meant_elsewhere(problem: Problem) -> Problem:
    """`problem`, or with another remedy where its value is a choice of a setting with the same choices and more."""
    own, group = CHOICES.get(problem.key, ()), problem.key.partition(".")[0]
    for other, choices in CHOICES.items():
        if own and other.startswith(f"{group}.") and set(own) < set(choices) and problem.value in choices:
            value = f"[{problem.value}]" if isinstance(SETTINGS[other].default, list) else problem.value
            return problem._replace(remedy=f"write {other}={value} ({SETTINGS[other].meaning})")
    return problem


def _likeliest(key: str) -> str | None:
    group, _, leaf = key.lstrip("-").rpartition(".")
    leaf = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", leaf).lower().replace("-", "_")
    names = {name: name.rpartition(".")[2] for name in SETTINGS}
    siblings = [name for name in SETTINGS if name.startswith(f"{group}.")]
    words = [word for word in leaf.split("_") if word]
    if close := difflib.get_close_matches(f"{group}.{leaf}", SETTINGS, n=1, cutoff=0.85):
        return close[0]
    begun = [name for name in siblings if words and names[name].startswith(leaf)]
    ended = [name for name in siblings if words and names[name].endswith(f"_{leaf}")]
    if begun or ended:
        return [*begun, *ended][0]
    if same := [name for name in SETTINGS if names[name] == leaf]:
        return difflib.get_close_matches(key, same, n=1, cutoff=0)[0]
    if synonym := difflib.get_close_matches(leaf, _SYNONYMS, n=1, cutoff=0.85):
        return _SYNONYMS[synonym[0]]
    if places := [(place, name) for name in siblings or SETTINGS if (place := _place(words, name)) >= 0]:
        return min(places)[1]
    if similar := difflib.get_close_matches(leaf, names.values(), n=1, cutoff=0.8):
        return next(name for name in SETTINGS if names[name] == similar[0])
    return next(iter(difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.75)), None)


def _place(words: list[str], name: str) -> int:
    """Where in the name and meaning of the setting `name` the first of all `words` stands; -1 if one is in neither."""
    text = f"{SETTINGS[name].meaning} {name.replace('_', ' ').replace('.', ' ')}".lower()
    places = [text.find(word) for word in words]
    return min(places) if places and all(re.search(rf"\b{re.escape(word)}\b", text) for word in words) else -1
