"""Limits of several settings together. The limits of a single setting are in schema.py.

A rule is a function of the settings that its decorator names. It yields the faults of the first of them. If one of them
was refused already, the rule is skipped. A rule may also use arguments of `load_config`, such as `world_size`.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import pairwise
from typing import Any

from jitscale.config.limits import Faults, Problem
from jitscale.config.schema import (
    AUTO,
    CHOICES,
    SETTINGS,
    Config,
    EmaConfig,
    ModelConfig,
    weight_set_names,
)
from jitscale.config.shapes import image_tokens, patch_elements, routed_tokens

Rule = Callable[..., Faults]
_RULES: list[tuple[tuple[str, ...], Rule]] = []


def problems_of(values: dict[str, Any], refused: Collection[str] = ()) -> list[Problem]:
    """All problems of `values` (by dotted names). Rules about settings that are already `refused` are skipped."""
    known = [key for key in values if key in SETTINGS]
    found = [problem for key in known for problem in SETTINGS[key].problems(key, values[key])]
    wrong = {*refused, *(problem.key for problem in found)}
    for keys, check in _RULES:
        if wrong.isdisjoint(keys) and values.keys() >= set(keys):
            faults = check(*(values[key] for key in keys))
            found += [Problem(keys[0], values[keys[0]], *fault) for fault in faults]
    return found


def rule(*keys: str) -> Callable[[Rule], Rule]:
    """Register a function as a rule about `keys`."""

    def add(check: Rule) -> Rule:
        _RULES.append((keys, check))
        return check

    return add


@rule("model.image_size", "model.patch_size")
def _whole_patches(image_size: int, patch_size: int) -> Faults:
    if image_size % patch_size:
        larger = -(-image_size // patch_size) * patch_size
        yield f"must be a multiple of model.patch_size={patch_size}", f"for example {larger}"


@rule("model.hidden_size", "model.num_heads")
def _head_dims(hidden_size: int, num_heads: int) -> Faults:
    unit = 4 * num_heads
    if hidden_size % unit:
        limit = f"must be a multiple of 4 x model.num_heads={num_heads} (2-D rotation needs head dims of 4 n)"
        yield limit, f"for example {-(-hidden_size // unit) * unit}"


@rule("model.in_context_start", "model.depth", "model.in_context_len")
def _class_tokens_start(start: int, depth: int, length: int) -> Faults:
    if length > 0 and start >= depth:
        yield f"must be in [0, model.depth={depth})", "lower it, or set model.in_context_len=0"


@rule("model.middle_head", "model.depth")
def _middle_inside(middle: int, depth: int) -> Faults:
    if middle >= depth:
        limit = f"must be in [0, model.depth={depth}): the output layer follows the last block"
        yield limit, f"for example {depth // 3}, or 0 for none"


@rule("model.route_blocks", "model.route_share", "model.depth")
def _blocks_to_skip(blocks: list[int], share: float, depth: int) -> Faults:
    example = f"for example [{min(2, depth - 1)},{depth - 2 if depth > 4 else depth}]"
    if len(blocks) != 2:
        yield "must be two numbers, the first block and the end of a slice", example
    elif share > 0 and not range(depth)[slice(*blocks)]:
        yield f"names no block of model.depth={depth}", example


@rule("model.route_share", "model.image_size", "model.patch_size")
def _tokens_to_keep(share: float, image_size: int, patch_size: int) -> Faults:
    if image_size % patch_size == 0 and share > 0:
        model = ModelConfig(image_size, patch_size, route_share=share)
        tokens, passing = image_tokens(model), routed_tokens(model)
        if passing < 1:
            yield f"leaves none of the {tokens} tokens of an image", "lower it"
        elif passing == tokens:
            yield f"is less than one of the {tokens} tokens of an image", "raise it, or set model.route_share=0"


@rule("diffusion.rank", "diffusion.prediction", "model.patch_size", "model.in_channels")
def _rank_of_a_patch(rank: int, prediction: str, patch_size: int, channels: int) -> Faults:
    most = patch_elements(ModelConfig(patch_size=patch_size, in_channels=channels))
    if prediction == "asym" and rank > most:
        yield f"must be in [0, {most}], the numbers of a patch of {patch_size} pixels per side", "for example 8"


@rule("data.batch_size", "world_size")
def _batch_over_ranks(batch: int, ranks: int) -> Faults:
    if batch % ranks:
        yield f"must be a multiple of the number of ranks, {ranks}", f"for example {-(-batch // ranks) * ranks}"


@rule("engine.micro_batch_size", "data.batch_size", "world_size")
def _micro_batches(micro: int | None, batch: int, ranks: int) -> Faults:
    share = batch // ranks
    if micro is not None and batch % ranks == 0 and share % micro:
        smaller = max(d for d in range(1, share + 1) if share % d == 0 and d <= micro)
        yield f"must divide a rank's share of the batch, {batch} / {ranks} = {share}", f"for example {smaller}"


@rule("engine.zero_stage", "engine.precision")
def _stage_0_in_fp32(stage: int, precision: str) -> Faults:
    if stage == 0 and precision != "fp32":
        yield "works in fp32 only (it has no fp32 master weights)", "set engine.zero_stage=1 or engine.precision=fp32"


@rule("engine.hpz_group_size", "engine.zero_stage")
def _hpz_in_stage_3(group_size: int, stage: int) -> Faults:
    if group_size > 1 and stage != 3:
        yield "needs ZeRO stage 3, which shards the weights", "set engine.zero_stage=3 or engine.hpz_group_size=1"


@rule("engine.hpz_group_size", "world_size")
def _hpz_over_ranks(group_size: int, ranks: int) -> Faults:
    if ranks > 1 and ranks % group_size:
        yield f"must divide the {ranks} ranks", "give the number of GPUs of a node"


@rule("engine.offload_optimizer", "engine.zero_stage")
def _offload_in_a_stage(offload: bool, stage: int) -> Faults:
    if offload and stage == 0:
        yield "needs a ZeRO stage from 1 on", "set engine.zero_stage=1 or engine.offload_optimizer=false"


@rule("engine.offload_optimizer", "optim.name")
def _offload_without_muon(offload: bool, name: str) -> Faults:
    if offload and name == "muon":
        limit = "does not work with Muon, which gathers matrices between GPUs"
        yield limit, "set engine.offload_optimizer=false or optim.name=adamw"


@rule("engine.cuda_graphs", "engine.zero_stage")
def _graphs_of_fixed_weights(graphs: bool | None, stage: int) -> Faults:
    if graphs and stage == 3:
        limit = "needs weights at fixed addresses, and ZeRO stage 3 gathers them at new ones each time"
        yield limit, "set engine.cuda_graphs=false or engine.zero_stage=2"


@rule("engine.cuda_graphs", "engine.offload_optimizer")
def _graphs_without_offload(graphs: bool | None, offload: bool) -> Faults:
    if graphs and offload:
        limit = "saves host time, but with engine.offload_optimizer=true the host computes the optimizer step"
        yield limit, "set one of them to false"


@rule("engine.precision", "run.device", "bf16_supported")
def _bf16_on_the_device(precision: str, device: str, bf16_supported: Callable[[str], bool]) -> Faults:
    if precision != "fp32" and not bf16_supported(device):
        limit = "needs bfloat16, which this GPU lacks (it needs compute capability 8.0 or newer)"
        yield limit, "set engine.precision=fp32"


@rule("ema.snapshot_every_images", "ema.power_widths")
def _averages_to_store(every: int | None, widths: list[float]) -> Faults:
    if every is not None and not widths:
        yield "stores power averages, and ema.power_widths=[] has none", "set ema.power_widths=[0.05,0.1]"


@rule("evaluation.weights", "ema.decays", "ema.power_widths")
def _weights_of_the_run(weights: str, decays: list[float], widths: list[float]) -> Faults:
    names = weight_set_names(Config(ema=EmaConfig(decays=decays, power_widths=widths)))
    if weights not in names:
        limit = f"is not a weight set of this run ({', '.join(names)})"
        yield limit, "choose one of them, or add its decay to ema.decays or its width to ema.power_widths"


@rule("evaluation.guidance_scale", "evaluation.guide", "model.num_classes", "diffusion.label_drop")
def _something_to_guide_by(scale: float, guide: str | None, classes: int, label_drop: float) -> Faults:
    if scale == 1.0 or guide is not None:
        return
    if classes == 0:
        limit = "guides towards a class, and model.num_classes=0 has none"
        yield limit, "set evaluation.guidance_scale=1.0, or evaluation.guide"
    elif label_drop == 0:
        limit = "needs a network that was also trained without labels, and diffusion.label_drop=0 never drops a label"
        yield limit, "set diffusion.label_drop=0.1 or evaluation.guidance_scale=1.0"


@rule("evaluation.internal_guidance", "model.middle_head")
def _middle_to_guide_by(scale: float, middle: int) -> Faults:
    if scale != 1.0 and middle == 0:
        limit = "guides away from a middle output layer, and model.middle_head=0 has none"
        yield limit, "set evaluation.internal_guidance=1.0, or train with model.middle_head"


@rule("evaluation.features", "evaluation.at_end", "evaluation.every_images")
def _features_to_measure(features: str | None, at_end: bool, every: int) -> Faults:
    if features is None and (at_end or every):
        asking = "evaluation.at_end=true" if at_end else f"evaluation.every_images={every}"
        remedy = f"set it to one of {', '.join(CHOICES['evaluation.features'])}, or measure nothing"
        yield f"names no feature network, and {asking} needs one", remedy


@rule("evaluation.features_file", "evaluation.features")
def _network_of_the_file(file: str | None, features: str | None) -> Faults:
    if file is not None and features == AUTO:
        yield "needs the name of its network, and evaluation.features=auto names none", "set evaluation.features"


@rule("evaluation.more_features", "evaluation.features")
def _further_networks(further: list[str], features: str | None) -> Faults:
    if features in further:
        yield f"names the network of evaluation.features={features} again", "remove it"


@rule("evaluation.held_out_every_images", "data.held_out")
def _held_out_samples(every: int, held_out: str | None) -> Faults:
    if every > 0 and held_out is None:
        remedy = "set data.held_out, for example to 0.01, or evaluation.held_out_every_images=0"
        yield "measures held-out samples, and data.held_out=null has none", remedy


@rule("progressive.resolutions", "model.image_size")
def _rising_resolutions(resolutions: list[int], image_size: int) -> Faults:
    if [*resolutions, image_size] != sorted({*resolutions, image_size}):
        example = f"for example [{image_size // 4},{image_size // 2}]"
        yield f"must rise, and stay below model.image_size={image_size}", example


@rule("progressive.resolutions", "model.image_size", "model.patch_size")
def _patches_of_resolutions(resolutions: list[int], image_size: int, patch_size: int) -> Faults:
    unit = image_size // math.gcd(image_size, patch_size)
    broken = [f"{patch_size * each / image_size:g}" for each in resolutions if each % unit]
    if broken:
        yield f"would have patches of {', '.join(broken)} pixels per side", f"give multiples of {unit}"


@rule("progressive.resolutions", "model.position_grid")
def _positions_of_resolutions(resolutions: list[int], position_grid: int | None) -> Faults:
    if resolutions and position_grid is not None:
        limit = f"keeps the number of tokens, and model.position_grid={position_grid} is meant for another number"
        yield limit, "set model.position_grid=null"


@rule(
    *("progressive.resolutions", "model.image_size", "model.patch_size", "model.in_channels"),
    *("diffusion.prediction", "diffusion.rank"),
)
def _subspace_of_resolutions(
    resolutions: list[int], image_size: int, patch_size: int, channels: int, prediction: str, rank: int
) -> Faults:
    """Refuses before the run what checkpoints/upgrade.py would refuse after the first stage."""
    whole = ModelConfig(patch_size=patch_size, in_channels=channels)
    if prediction != "asym" or not 0 < rank < patch_elements(whole) or not resolutions or min(resolutions) < 1:
        return
    lowest = patch_elements(replace(whole, patch_size=patch_size * min(resolutions) // image_size))
    if rank >= lowest:
        limit = f"would have patches of {lowest} numbers, and diffusion.rank={rank} must be below that"
        yield limit, "begin at a higher resolution, or lower diffusion.rank"
    elif any(high % low for low, high in pairwise([*resolutions, image_size])):
        limit = "must grow by whole factors, which alone preserve the subspace of diffusion.prediction=asym"
        yield limit, f"for example [{image_size // 4},{image_size // 2}]"


@rule("progressive.images", "progressive.resolutions")
def _images_of_resolutions(images: list[int], resolutions: list[int]) -> Faults:
    if len(images) != len(resolutions):
        count = len(resolutions)
        yield f"must have one number for each of the {count} lower resolutions", f"give {count} numbers"


@rule("run.max_images", "run.max_steps")
def _an_end(max_images: int | None, max_steps: int | None) -> Faults:
    if max_images is None and max_steps is None:
        yield "leaves the run without an end, since run.max_steps=null too", "set one of them"


@rule("data.shards", "needs_shards")
def _shards_to_read(shards: str, needs_shards: bool) -> Faults:
    if needs_shards and not shards:
        yield "is not set", "give a folder, a glob or a brace pattern of tar shards"
