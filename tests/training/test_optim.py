"""Parameter groups and the learning rate."""

from dataclasses import replace

import pytest
import torch

from jitscale.config import OptimConfig
from jitscale.model.jit import JiT, parameter_kind
from jitscale.training.optim import ALIGNED_ELEMENTS, learning_rate, parameter_groups
from tests.support.tiny import MODEL

OUTPUT_LAYERS = ("final_layer.", "middle_layer.")


def grouped(config: OptimConfig) -> dict[tuple[float, float], set[str]]:
    """The names of parameters by (weight decay, learning-rate factor)."""
    model = JiT(replace(MODEL, middle_head=1))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config)
    assert sum(len(group["params"]) for group in groups) == len(names), "each parameter is in one group"
    return {(g["weight_decay"], g["lr_factor"]): {names[id(p)] for p in g["params"]} for g in groups}


@pytest.mark.parametrize("hidden_size", [1024, 1280, 1664])  # The feed-forward biases of L, H and G have odd sizes.
def test_only_parameters_of_odd_sizes_are_unaligned_in_a_flat_buffer(hidden_size: int) -> None:
    """GPUs read 16 bytes at once. A kernel that expects alignment fails at other addresses."""
    with torch.device("meta"):
        model = JiT(replace(MODEL, hidden_size=hidden_size, num_heads=16, image_size=32))
    odd = {id(block.mlp.w12.bias) for block in model.blocks}  # type: ignore[union-attr]
    for group in parameter_groups(model, OptimConfig(name="muon")) + parameter_groups(model, OptimConfig()):
        elements = 0
        for p in group["params"]:
            assert elements % ALIGNED_ELEMENTS == 0 or id(p) in odd
            elements += p.numel()


def test_by_default_there_are_two_groups_that_differ_in_decay() -> None:
    groups = grouped(OptimConfig(weight_decay=0.1))
    assert set(groups) == {(0.1, 1.0), (0.0, 1.0)}
    assert {"blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= groups[0.0, 1.0]
    assert "x_embedder.proj1.weight" in groups[0.1, 1.0]
    assert "final_layer.linear.bias" in groups[0.0, 1.0]
    for names in groups.values():
        layers = ({n.removeprefix(layer) for n in names if n.startswith(layer)} for layer in OUTPUT_LAYERS)
        assert next(layers) == next(layers), "the middle output layer is treated as the last one"


def test_muon_treats_both_output_layers_alike() -> None:
    model = JiT(replace(MODEL, middle_head=1))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, OptimConfig(name="muon", lr_factor_output=0.5))
    (orthogonalised,) = ({names[id(p)] for p in group["params"]} for group in groups if group["muon"])
    for layer in OUTPUT_LAYERS:
        assert {name for name in orthogonalised if name.startswith(layer)} == {f"{layer}adaLN_modulation.1.weight"}
    assert {parameter_kind(f"{layer}norm_final.weight", 1) for layer in OUTPUT_LAYERS} == {"vectors"}


def test_kinds_may_have_rates_of_their_own() -> None:
    config = OptimConfig(
        weight_decay=0.1, lr_factor_patch_embedding=0.25, lr_factor_output=0.5, lr_factor_embeddings=2.0
    )
    groups = grouped(config)
    assert {name for (_, factor), names in groups.items() if factor == 0.25 for name in names} == {
        "x_embedder.proj1.weight",
        "x_embedder.proj2.weight",
        "x_embedder.proj2.bias",
    }
    assert {name for (_, factor), names in groups.items() if factor == 0.5 for name in names} == {
        "final_layer.linear.weight",
        "final_layer.linear.bias",
        "middle_layer.linear.weight",
        "middle_layer.linear.bias",
    }
    assert "in_context_posemb" in {name for (_, factor), names in groups.items() if factor == 2.0 for name in names}
    assert parameter_kind("blocks.0.attn.qkv.weight", 2) == "matrices"
    assert parameter_kind("blocks.0.attn.qkv.bias", 1) == "vectors"


def test_the_learning_rate_from_warm_up_to_end() -> None:
    cosine = OptimConfig(lr=1.0, schedule="cosine", warmup_images=100)
    assert [learning_rate(cosine, images, 1100) for images in (50, 100, 600, 1100)] == pytest.approx([0.5, 1, 0.5, 0])
    assert learning_rate(OptimConfig(lr=1.0, warmup_images=0), 7, 10) == 1.0
