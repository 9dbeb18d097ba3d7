"""The model card of an exported network: README.md with the front matter that the Hugging Face hub reads.

Keys and values of the front matter follow the hub's documentation (huggingface/hub-docs modelcard.md). The hub has a
task for unconditional images, but none for class labels; therefore a network with classes names no task.
`library_name` is jitscale even for a folder of diffusers: with diffusers, the hub would show an example with a text
prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import yaml

from jitscale.addresses import masked
from jitscale.config import Config
from jitscale.tracking import distance_title

PAPER = "https://arxiv.org/abs/2511.13720"
_METRICS = {  # key of a result -> type and name in the front matter
    "fid": ("fid", "FID"),
    "inception_score": ("inception_score", "Inception Score"),
    "kid": ("kid", "KID"),
    "precision": ("precision", "Precision"),
    "recall": ("recall", "Recall"),
}


@dataclass(frozen=True)
class Card:
    """The facts of a card; `text` is its README.md."""

    config: Config  # the network; `evaluation` says how its samples are drawn
    weights: str  # the weight set
    samples: str | None = None  # the file of the picture, next to the card
    num_samples: int = 0
    result: Mapping[str, Any] | None = None  # a result.json of these weights
    license: str | None = None  # an identifier of the hub, such as mit
    is_diffusers: bool = False

    @property
    def text(self) -> str:
        """The content of README.md."""
        parts = [f"---\n{yaml.safe_dump(self.front_matter, sort_keys=False)}---\n", f"# {self.name}\n"]
        if self.samples:
            parts.append(f"![{self.num_samples} samples]({self.samples})\n")
        parts += [self._summary(), self._use(), self._protocol(), self._results()]
        if self.is_diffusers:
            parts.append(self._about_diffusers())
        parts.append(f"## Licence\n\n{self.license or 'Not stated. Ask the author before you use the weights.'}\n")
        return "\n".join(parts)

    @property
    def name(self) -> str:
        """The name of the network, from its sizes."""
        model = self.config.model
        return f"JiT {model.depth}x{model.hidden_size}/{model.patch_size} at {model.image_size} px"

    @property
    def front_matter(self) -> dict[str, Any]:
        """The YAML header, which the hub reads."""
        conditional = self.config.model.num_classes > 0
        found: dict[str, Any] = {} if self.license is None else {"license": self.license}
        found["library_name"] = "jitscale"
        if not conditional:
            found["pipeline_tag"] = "unconditional-image-generation"
        found["tags"] = ["jit", "diffusion", "pixel-space", "class-conditional" if conditional else "unconditional"]
        if self.is_diffusers:
            found["tags"].append("diffusers")
        if self.result is not None:
            found["model-index"] = [{"name": self.name, "results": [self._index_entry(self.result)]}]
        return found

    def _index_entry(self, result: Mapping[str, Any]) -> dict[str, Any]:
        conditional = self.config.model.num_classes > 0
        dataset = _dataset(result)
        metrics = [
            {"type": kind, "value": float(result[key]), "name": name, "args": self._arguments(result)}
            for key, (kind, name) in _metrics(result).items()
        ]
        return {
            "task": {
                "type": "image-generation" if conditional else "unconditional-image-generation",
                "name": f"{'Class-conditional' if conditional else 'Unconditional'} image generation",
            },
            "dataset": {"type": dataset, "name": dataset},
            "metrics": metrics,
        }

    def _arguments(self, result: Mapping[str, Any]) -> dict[str, Any]:
        sampler = result["protocol"]["sampler"]
        return {
            "weights": self.weights,
            "method": sampler["method"],
            "steps": sampler["steps"],
            "guidance_scale": sampler["guidance_scale"],
            "guidance_interval": list(sampler["guidance_interval"]),
            "images": result["num_images"],
            "labels": result["protocol"].get("labels"),
            "features": result["protocol"]["features"],
        }

    def _summary(self) -> str:
        model, diffusion = self.config.model, self.config.diffusion
        classes = (
            f"{model.num_classes} classes (class-conditional)" if model.num_classes else "no classes (unconditional)"
        )
        return (
            f"A JiT ([Back to Basics: Let Denoising Generative Models Denoise]({PAPER})),\n"
            f"a plain transformer on pixels: {model.depth} blocks of width {model.hidden_size}, patches of "
            f"{model.patch_size} pixels,\n{classes}, noise scale {diffusion.noise_scale:g}. "
            f"These are the weights `{self.weights}`.\n"
        )

    def _use(self) -> str:
        evaluation, classes = self.config.evaluation, self.config.model.num_classes
        low, high = evaluation.guidance_interval
        settings = [f'method="{evaluation.method}"', f"steps={evaluation.steps}"]
        if evaluation.guidance_scale != 1:
            settings += [f"guidance_scale={evaluation.guidance_scale:g}", f"guidance_interval=({low:g}, {high:g})"]
        if evaluation.time_shift != 1:
            settings.append(f"time_shift={evaluation.time_shift:g}")
        if evaluation.internal_guidance != 1:
            first, last = evaluation.internal_interval
            settings += [f"internal_guidance={evaluation.internal_guidance:g}"]
            settings += [f"internal_interval=({first:g}, {last:g})"]
        settings.append(f"seed={evaluation.seed}")
        labels = list(range(min(classes, 4))) or [0, 0]  # class i belongs to image i of an evaluation
        order = "; image i has the label i modulo the classes" if classes else ""
        return (
            "## Use\n\n```python\nimport jitscale\n\n"
            'model = jitscale.load_model("hf://OWNER/NAME")  # this repository, or a folder with its files\n'
            f"images = jitscale.sample(model, labels={labels}, {', '.join(settings)})\n"
            'jitscale.to_pil(images)[0].save("sample.png")\n```\n\n'
            f"These are images 0 to {len(labels) - 1} of our evaluation{order}.\n"
        )

    def _protocol(self) -> str:
        evaluation = self.config.evaluation
        low, high = evaluation.guidance_interval
        guided = f"{evaluation.guidance_scale:g} in [{low:g}, {high:g}]" if evaluation.guidance_scale != 1 else "none"
        if evaluation.guide is not None:
            guided += ", by another network (autoguidance)"
        rows = [
            ("weights", f"`{self.weights}`"),
            ("sampler", f"{evaluation.method}, {evaluation.steps} steps"),
            ("guidance", guided),
        ]
        if evaluation.time_shift != 1:
            rows.append(("time shift", f"{evaluation.time_shift:g}"))
        if evaluation.internal_guidance != 1:
            first, last = evaluation.internal_interval
            rows.append(("internal guidance", f"{evaluation.internal_guidance:g} in [{first:g}, {last:g}]"))
        if self.samples:
            rows.append(("picture", f"images 0 to {self.num_samples - 1} of seed {evaluation.seed}, not chosen"))
        table = "\n".join(f"| {key} | {value} |" for key, value in rows)
        return f"## How samples are drawn\n\n| | |\n|---|---|\n{table}\n"

    def _results(self) -> str:
        if self.result is None:
            return "## Results\n\nNot measured.\n"
        args = self._arguments(self.result)
        said = ", ".join(f"{key} {value}" for key, value in args.items() if value is not None)
        metrics = _metrics(self.result).items()
        table = "\n".join(f"| {name} | {self.result[key]:.4g} |" for key, (_, name) in metrics)
        text = f"## Results\n\n| | |\n|---|---|\n{table}\n\nAgainst {_dataset(self.result)}: {said}.\n"
        if args["features"] not in ("inception", "dinov2"):
            text += "The features come from a small network: do not compare these numbers with published FIDs.\n"
        return text

    def _about_diffusers(self) -> str:
        model, diffusion, evaluation = self.config.model, self.config.diffusion, self.config.evaluation
        guided = "without guidance" if evaluation.guidance_scale == 1 else "with guidance in an interval"
        return f"""## diffusers

diffusers 0.42.1 has no JiT class, so `DiffusionPipeline.from_pretrained` does not open this folder
yet. Keys and config names follow the proposal (huggingface/diffusers pull request 13098, names since
2026-06-28), which may still change. `FlowMatchEulerDiscreteScheduler` opens `scheduler/`.

- **Always pass `noise_scale={diffusion.noise_scale:g}`**. Without it the pipeline takes sample_size / 256, here
  {model.image_size / 256:g}.
- Its images are not those of our FID. Its time grid ends with a step from 0.001 to 0, it guides at all
  times, and it clamps differently; ours are {evaluation.steps} equal steps {guided}.
  The lines under "Use" make the images that we measure.
- `transformer/config.json` has a key `jitscale` with facts that the format has no key for: noise scale,
  `t_eps`, the distribution of times, the name of the weight set. diffusers ignores it with a warning, and
  keeps it.
"""


def _metrics(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The metrics of `_METRICS` that were measured. A distance in other features than Inception's is not called FID."""
    features = result["protocol"]["features"]
    found = {key: value for key, value in _METRICS.items() if key in result}
    if features != "inception":
        found = {key: (f"{kind}_{features}", f"{name} ({features} features)") for key, (kind, name) in found.items()}
    named = {key: (key, distance_title(key)) for key in result if key.startswith("fd_")}  # by their networks
    return found | named


def _dataset(result: Mapping[str, Any]) -> str:
    """The last part of the reference's address. The rest is a path that means nothing on another machine."""
    source = masked(str(result["reference"].get("source", "")))
    return PurePosixPath(source.partition("?")[0]).name or "unknown"
