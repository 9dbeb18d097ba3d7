"""Agreement with numbers that the authors' code computed (tests/files/README.md)."""

from pathlib import Path
from typing import Any

import pytest
import torch

import jitscale
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.weights import write_safetensors
from jitscale.config import DiffusionConfig, ModelConfig, load_config
from jitscale.diffusion.objective import interpolate, sample_loss
from jitscale.errors import CheckpointError
from jitscale.model.jit import JiT
from jitscale.training.optim import build_optimizer
from tests.support import FILES, ROOT


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.detach() - expected).norm() / expected.norm())


@pytest.fixture(params=["heun", "euler"])
def case(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    stem = FILES / f"jit_tiny_{request.param}"
    stored = torch.load(f"{stem}.reference.pt", weights_only=True)
    return Path(f"{stem}.checkpoint-last.pth"), stored["config"], stored["reference"]


def test_network_output(case: Any) -> None:
    path, config, reference = case
    model = jitscale.load_model(path, weights="model", config=config)
    assert relative(model(reference["z"], reference["t"], reference["y"]), reference["net_out"]) < 1e-5


def test_sampler_output(case: Any) -> None:
    path, config, reference = case
    model = jitscale.load_model(path, weights="model", config=config)
    samples = jitscale.sample(
        model,
        reference["sample_labels"],
        noise=reference["sample_noise"],
        method=config["method"],
        steps=config["steps"],
        guidance_scale=config["guidance_scale"],
        guidance_interval=config["interval"],
    )
    assert relative(samples, reference["samples"]) < 1e-5


def test_five_training_steps_and_average(case: Any) -> None:
    path, config, reference = case
    diffusion = DiffusionConfig(noise_scale=config["noise_scale"])
    model = jitscale.load_model(path, weights="model", config=config).train()
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, load_config(ROOT / "configs/jit_b_256.yaml").optim)
    for step in range(5):
        x, t = reference["train_images"][step], reference["train_times"][step]
        e = config["noise_scale"] * reference["train_noise"][step]
        z = interpolate(x, e, t)
        loss = sample_loss(model(z, t, reference["train_labels"][step]), x, e, z, t, diffusion).mean()
        assert loss.item() == pytest.approx(float(reference["train_losses"][step]), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3
        optimizer.step()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - 0.9999)
    for name, p in model.named_parameters():
        assert relative(p, reference["train_final"][name]) < 1e-5, name
        assert relative(average[name], reference["train_ema1"][name]) < 1e-5, name


def test_position_table_equals_the_authors(case: Any) -> None:
    path, config, reference = case
    model = jitscale.load_model(path, weights="model", config=config)
    torch.testing.assert_close(model.pos_embed, reference["train_final"]["pos_embed"][0], rtol=0, atol=1e-6)


def test_weight_sets_of_the_authors_file(case: Any) -> None:
    path, config, _ = case
    stored = open_weights(path, config)
    key = "final_layer.linear.weight"
    tensors = {name: stored.tensor(name, key) for name in ("model", "ema_0.9999", "ema_0.9996")}
    assert stored.default == "ema_0.9999"
    assert torch.equal(stored.network().final_layer.linear.weight, tensors["ema_0.9999"])
    assert not torch.equal(tensors["model"], tensors["ema_0.9999"])
    assert not torch.equal(tensors["ema_0.9996"], tensors["ema_0.9999"])
    assert stored.config.diffusion.noise_scale == config["noise_scale"]
    with pytest.raises(CheckpointError, match=r"no weight set 'ema_0.5'.*ema_0.9996"):
        stored.network("ema_0.5")


def test_safetensors_keep_weights_and_config(case: Any, tmp_path: Path) -> None:
    path, config, reference = case
    stored = open_weights(path, config)
    write_safetensors(tmp_path / "weights.safetensors", stored, stored.default)
    again = open_weights(tmp_path / "weights.safetensors")
    assert again.weight_sets == [stored.default]
    assert (again.config.model, again.config.diffusion) == (stored.config.model, stored.config.diffusion)
    for name in stored.shapes:
        assert torch.equal(again.tensor(again.default, name), stored.tensor(stored.default, name)), name
    model = jitscale.load_model(tmp_path / "weights.safetensors")
    before = stored.network()(reference["z"], reference["t"], reference["y"])
    assert torch.equal(model(reference["z"], reference["t"], reference["y"]), before)


def test_settings_that_a_file_lacks_are_requested(case: Any, tmp_path: Path) -> None:
    path, config, _ = case
    with pytest.raises(CheckpointError, match="give its config"):
        jitscale.load_model(path)
    with pytest.raises(CheckpointError, match="do not fit the network"):
        jitscale.load_model(path, config={**config, "hidden_size": 64})
    with pytest.raises(CheckpointError, match="no model field hiden_size"):
        jitscale.load_model(path, config={"hiden_size": 64})
    (tmp_path / "noise.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        jitscale.load_model(tmp_path / "noise.pth", config=config)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        jitscale.load_model(tmp_path / "absent.pth")


def test_code_in_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": {}, "args": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        jitscale.load_model(tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("size", "parameters"), [("b", 131_123_712), ("l", 458_877_664), ("h", 952_514_368)])
def test_parameter_counts_of_the_authors(size: str, parameters: int) -> None:
    with torch.device("meta"):
        model = JiT(load_config(ROOT / f"configs/jit_{size}_256.yaml").model)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_paper_sizes_load_without_a_config(tmp_path: Path) -> None:
    """A checkpoint that names JiT-B needs no config: the other settings follow from its shapes."""
    expected = load_config(ROOT / "configs/jit_b_64.yaml").model
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in JiT(expected).named_parameters()}
    stored = torch.load(FILES / "jit_tiny_heun.checkpoint-last.pth", weights_only=False)
    zeros = {f"net.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    stored["args"].model, stored["args"].img_size = "JiT-B/4", 64
    torch.save({"model": zeros, "model_ema1": zeros, "model_ema2": zeros, "args": stored["args"]}, tmp_path / "b.pth")
    assert open_weights(tmp_path / "b.pth").config.model == expected


def test_unconditional_network() -> None:
    torch.manual_seed(0)
    config = ModelConfig(image_size=8, patch_size=4, hidden_size=16, depth=2, num_heads=2, bottleneck_dim=4)
    config.num_classes, config.in_context_start = 0, 1
    model = JiT(config).eval()
    images = jitscale.sample(model, [0, 0], steps=2)
    assert images.shape == (2, 3, 8, 8)
    assert model.null_label == 0
