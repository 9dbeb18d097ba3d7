"""Folders in the format of diffusers.

The real diffusers opens what we write, and we read each of its forms bit by bit.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import jitscale
from jitscale.checkpoints.names import diffusers_names
from jitscale.checkpoints.opening import open_weights
from jitscale.config import DiffusionConfig, ModelConfig, to_yaml
from jitscale.errors import CheckpointError, UserError
from jitscale.model.layers import sincos_position_table
from tests.support.diffusers_jit import JiTTransformer2DModel
from tests.support.tiny import MODEL
from tests.support.weights import assert_same, convert, run_of, settings

PLAIN = "transformer/diffusion_pytorch_model.safetensors"
# a quarter of size G, with heads of the same width
WIDE = replace(MODEL, hidden_size=416, num_heads=4, depth=1, in_context_start=0)
NETWORKS: dict[str, ModelConfig] = {
    "conditional": MODEL,
    "unconditional": replace(MODEL, num_classes=0),
    "no class tokens": replace(MODEL, in_context_len=0),
    "its own grid": replace(MODEL, position_grid=4),
    "dropout": replace(MODEL, attn_dropout=0.1, proj_dropout=0.2),
    "grey": replace(MODEL, in_channels=1),
    "heads of G": WIDE,
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run", settings())


def exported(run: Path, folder: Path, *more: object) -> Path:
    return convert(run, "diffusers", folder, "--samples", 0, *more)


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_through_the_real_diffusers(name: str, tmp_path: Path) -> None:
    """Our run -> folder -> diffusers' from_pretrained and save_pretrained -> our reader: each tensor keeps its bits."""
    run = run_of(tmp_path / "run", settings(NETWORKS[name]))
    folder, source = exported(run, tmp_path / "folder"), open_weights(run)
    assert_same(open_weights(folder), source, "ema_0.9", "ema_0.9")
    assert open_weights(folder).config.model == replace(NETWORKS[name], position_grid=None)

    model, told = JiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
    assert not any(told.values()), f"keys that are missing, unexpected or misshapen: {told}"
    theirs = model.state_dict()
    assert set(theirs) - {"pos_embed"} == {part for own in source.shapes for part in diffusers_names(own)}
    assert torch.equal(theirs["pos_embed"][0], sincos_position_table(NETWORKS[name].hidden_size, 4))
    assert torch.equal(
        torch.cat([theirs[f"blocks.0.attn.to_{each}.weight"] for each in "qkv"]),
        source.tensor("ema_0.9", "blocks.0.attn.qkv.weight"),
    )

    model.save_pretrained(tmp_path / "again")
    assert_same(open_weights(tmp_path / "again"), source, "ema_0.9", "ema_0.9")
    run_again = convert(tmp_path / "again", "run", tmp_path / "run2", "--config", _yaml(tmp_path, run))
    assert_same(open_weights(run_again), source, "model", "ema_0.9")


def _yaml(folder: Path, run: Path) -> Path:
    config = open_weights(run).config
    path = folder / "new.yaml"
    path.write_text(to_yaml(replace(config, model=replace(config.model, position_grid=None))))
    return path


def test_split_files_both_ways(run: Path, tmp_path: Path) -> None:
    """Weights above a size limit are split into several files, by us and by diffusers, also for a variant."""
    source = open_weights(run)
    folder = exported(run, tmp_path / "folder", "--max-shard-bytes", 40_000)
    parts = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    assert len(parts) > 2
    assert parts[0] == f"diffusion_pytorch_model-00001-of-{len(parts):05d}.safetensors"
    assert_same(open_weights(folder), source, "ema_0.9", "ema_0.9")
    model, told = JiTTransformer2DModel.from_pretrained(folder, subfolder="transformer", output_loading_info=True)
    assert not any(told.values())

    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs/diffusion_pytorch_model.safetensors.index.json").exists()
    assert_same(open_weights(tmp_path / "theirs"), source, "ema_0.9", "ema_0.9")
    half = model.to(torch.bfloat16)
    half.save_pretrained(tmp_path / "half", variant="bf16")
    half.save_pretrained(tmp_path / "halves", variant="bf16", max_shard_size="20KB")
    half.save_pretrained(tmp_path / "theirs", variant="bf16")
    for name, set_name in (("half", "ema_0.9"), ("halves", "ema_0.9"), ("theirs", "bf16")):
        stored = open_weights(tmp_path / name)
        for parameter in source.shapes:
            rounded = source.tensor("ema_0.9", parameter).bfloat16().float()
            assert torch.equal(stored.tensor(set_name, parameter), rounded), (name, parameter)
    assert open_weights(tmp_path / "theirs").weight_sets == ["ema_0.9", "bf16"]


def test_the_json_files_equal_those_of_diffusers(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = diffusers.DiffusionPipeline.load_config(folder)
    assert pipeline["_class_name"] == "JiTPipeline"
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = JiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    model.save_pretrained(tmp_path / "transformer")

    class JiTPipeline(diffusers.DiffusionPipeline):
        def __init__(self, transformer: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    JiTPipeline(model, scheduler).save_pretrained(tmp_path / "pipeline")
    for name in ("scheduler/scheduler_config.json", "model_index.json"):
        theirs = (tmp_path / "pipeline" / name).read_text()
        # The class is not in diffusers yet, so config.json would otherwise name the module of this test.
        theirs = theirs.replace('"tests.support.diffusers_jit"', '"diffusers"').replace(
            '"diffusers_jit"', '"diffusers"'
        )
        assert (folder / name).read_text() == theirs
    config = json.loads((tmp_path / "transformer/config.json").read_text())
    ours = json.loads((folder / "transformer/config.json").read_text())
    assert {key: value for key, value in config.items() if key != "_name_or_path"} == ours
    assert (folder / "transformer/config.json").read_text() == json.dumps(ours, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("form", ["before 2026-06-28", "april"])
def test_older_forms_are_read(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A thin network of the paper's size B, as the community's folders store it. Code in such a folder never runs."""
    model = replace(MODEL, image_size=256, patch_size=64, depth=5, in_context_start=4, num_classes=3)
    source = open_weights(run_of(tmp_path / "run", settings(model, DiffusionConfig())))
    tensors = {name: source.tensor("model", name) for name in source.shapes}
    table = sincos_position_table(32, 4)[None]
    (folder := tmp_path / "flat").mkdir()
    if form == "april":
        tensors = {f"transformer.{name}": tensor for name, tensor in tensors.items()} | {"transformer.pos_embed": table}
        config: dict[str, Any] = {"model_type": "JiT-B/64", "sample_size": 256, "num_class_embeds": 3}
        config |= {"attention_dropout": 0.0, "dropout": 0.0, "model_name": None}
    else:
        inner = {"final_layer.norm_final": "norm_final", "final_layer.linear": "linear_final"}
        inner |= {"final_layer.adaLN_modulation.1": "adaLN_modulation_final", "adaLN_modulation.1": "adaLN_modulation"}
        for ours, theirs in inner.items():
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
        tensors |= {"pos_embed": table}
        config = {"sample_size": 256, "patch_size": 64, "hidden_size": 32, "num_layers": 5, "num_attention_heads": 2}
        config |= {"num_classes": 3, "bottleneck_dim": 8, "in_context_len": 4, "in_context_start": 4, "mlp_ratio": 4.0}
        (tmp_path / "flat/transformer").mkdir()
        folder = tmp_path / "flat/transformer"
        (folder / "jit_transformer_2d.py").write_text("raise SystemExit('executed')")
        (tmp_path / "flat/model_index.json").write_text('{"_class_name": ["pipeline", "JiTPipeline"]}')
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "diffusion_pytorch_model.safetensors")
    described = {"_class_name": "JiTTransformer2DModel", **config}
    (folder / "config.json").write_text(json.dumps(described))
    with caplog.at_level(logging.WARNING):
        found = open_weights(tmp_path / "flat")
    assert "assumed: noise_scale=1, t_eps=0.05" in caplog.text
    assert found.config.model == source.config.model
    assert_same(found, source, "model", "model")
    caplog.clear()
    told = settings(model, DiffusionConfig(noise_scale=3.0))
    assert open_weights(tmp_path / "flat", told).config.diffusion.noise_scale == 3.0
    assert not caplog.text
    with pytest.raises(CheckpointError, match=r"another network than the config \(model\.depth: 6 -> 5\)"):
        open_weights(tmp_path / "flat", replace(told, model=replace(model, depth=6)))


def test_an_unknown_position_table_is_refused(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    tensors = load_file(folder / PLAIN)
    stretched = sincos_position_table(32, 4, 8)[None]
    save_file({**tensors, "pos_embed": stretched}, folder / PLAIN)
    with pytest.raises(CheckpointError, match="pos_embed differs from this network's position table"):
        open_weights(folder)
    save_file({name: tensor for name, tensor in tensors.items() if name != "pos_embed"}, folder / PLAIN)
    open_weights(folder).network()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_ratio": 3.0}, r"config\.json: mlp_ratio=3\.0, but networks here have 4"),
        ({"norm_eps": 1e-5}, r"norm_eps=1e-05, but networks here have 1e-06"),
        ({"in_channels": 2}, r"model\.in_channels=2"),
        ({"qk_norm": False}, "unknown key qk_norm=False"),
        ({"_class_name": "FluxTransformer2DModel"}, "describes a FluxTransformer2DModel, not a JiTTransformer2DModel"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"num_layers": 0}, r"model\.depth=0"),
        ({"num_layers": 3}, "do not fit the network"),
        ({"jitscale": None}, "does not say diffusion.noise_scale, and pipelines differ below 256 pixels"),
        ({"jitscale": {"weights": "model"}}, "does not describe a JiT"),
        ({"jitscale": {"weights": "../x", "diffusion": {}}}, "is not a name of a weight set"),
        ({"jitscale": {"weights": "model", "diffusion": {"prediction": "v"}}}, "prediction=v; must be x"),
        ({"jitscale": {"weights": "model", "diffusion": {"noise_scale": -1}}}, "noise_scale=-1"),
        ({"model_type": "JiT-Z/2"}, "model_type=JiT-Z/2 must be one of JiT-B"),
    ],
)
def test_features_that_our_network_lacks_are_a_one_line_error(
    change: dict[str, Any], message: str, run: Path, tmp_path: Path
) -> None:
    folder = exported(run, tmp_path / "folder")
    lost = {key for key, value in change.items() if value is None}
    edit(
        folder / "transformer/config.json", lambda content: content.update(change) or [content.pop(key) for key in lost]
    )
    with pytest.raises(UserError, match=message) as error:
        jitscale.load_model(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_missing_and_duplicate_tensors_are_named(run: Path, tmp_path: Path) -> None:
    folder = exported(run, tmp_path / "folder")
    sound = load_file(folder / PLAIN)
    lost, key = "blocks.1.attn.to_k.bias", "blocks.0.attn.q_norm.weight"
    wrong: list[tuple[dict[str, torch.Tensor], str]] = [
        ({name: tensor for name, tensor in sound.items() if name != lost}, r"blocks\.1\.attn\.qkv\.bias is made of"),
        ({**sound, key: sound["blocks.0.attn.norm_q.weight"].clone()}, f"{key} are the same tensor|and {key}"),
        ({**sound, lost: torch.zeros(5)}, "have different shapes"),
        ({**sound, "extra.weight": torch.zeros(5)}, r"extra\.weight: \(5,\) there, absent"),
    ]
    for tensors, message in wrong:
        save_file(tensors, folder / PLAIN)
        with pytest.raises(CheckpointError, match=message):
            open_weights(folder).network()


def test_networks_that_the_format_cannot_describe_are_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = {
        "stretched": (
            settings(position_grid=8),
            "model.position_grid=8, and JiT in diffusers predicts x, with positions",
        ),
        "v": (settings(diffusion=DiffusionConfig(prediction="v")), "diffusion.prediction=v, and JiT in diffusers"),
    }
    for name, (config, message) in refused.items():
        with pytest.raises(CheckpointError, match=message):
            exported(run_of(tmp_path / name, config), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    source = run_of(tmp_path / "middle", settings(middle_head=1))
    found = open_weights(exported(source, tmp_path / "out"))
    assert "its middle output layer is left out" in capsys.readouterr().out
    assert not any("middle" in name for name in found.shapes)
    assert torch.equal(
        found.tensor("ema_0.9", "t_embedder.mlp.0.bias"),
        open_weights(source).tensor("ema_0.9", "t_embedder.mlp.0.bias"),
    )
