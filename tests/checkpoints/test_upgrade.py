"""The upgraded network is the old one seen through pooling."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import jitscale
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.saving import write_streamed
from jitscale.checkpoints.upgrade import KERNELS, PATCH_EMBEDDING, RESIZED, Upgrade, operators, plan_upgrade
from jitscale.checkpoints.weights import MOMENTS
from jitscale.config import Config, DiffusionConfig, ModelConfig, to_yaml
from jitscale.errors import CheckpointError, ConfigError, UserError
from jitscale.model.jit import JiT
from tests.support import FILES
from tests.support.tiny import MODEL
from tools.upgrade_resolution import main


def settings(patch: int, *, image: int | None = None, **model: Any) -> Config:
    """The network at another patch size, with the noise scale that belongs to it."""
    size = image or patch * MODEL.image_size // MODEL.patch_size
    sizes = {**vars(MODEL), "image_size": size, "patch_size": patch, **model}
    return Config(model=ModelConfig(**sizes), diffusion=DiffusionConfig(noise_scale=size / MODEL.image_size))


def perturbed(config: Config) -> JiT:
    torch.manual_seed(0)
    network = JiT(config.model, config.diffusion).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # zero-initialised layers would hide an error
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def both(new: Config, kernel: str = KERNELS[0]) -> tuple[JiT, JiT, Upgrade]:
    old = perturbed(settings(MODEL.patch_size))
    upgrade = plan_upgrade(settings(MODEL.patch_size), new, kernel)
    network = JiT(new.model, new.diffusion).eval()
    network.load_state_dict({name: upgrade.tensor(name, p) for name, p in old.state_dict().items()})
    return old, network, upgrade


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("patch", [6, 8, 12, 16])
def test_the_function_is_preserved(patch: int, kernel: str) -> None:
    """k = 3/2, 2, 3, 4."""
    old, new, upgrade = both(settings(patch), kernel)
    size = new.config.image_size
    z, t, y = torch.randn(3, 3, size, size), torch.rand(3), torch.tensor([0, 5, 10])
    with torch.no_grad():
        expected = old(upgrade.pool(z), t, y)
        found = upgrade.pool(new(z, t, y))
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if kernel == "nearest" and patch % MODEL.patch_size == 0:
        torch.testing.assert_close(upgrade.pool(z), F.avg_pool2d(z, patch // MODEL.patch_size))


def test_a_lower_resolution_is_seen_enlarged() -> None:
    old, new, upgrade = both(settings(2), "nearest")
    z, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 5, 10])
    with torch.no_grad():
        expected = F.avg_pool2d(old(F.interpolate(z, scale_factor=2, mode="nearest"), t, y), 2)
        torch.testing.assert_close(new(z, t, y), expected, rtol=1e-5, atol=1e-5)
    assert upgrade.ratio == Fraction(1, 2)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_whole_trajectories_are_preserved(method: str) -> None:
    """avgpool(sample_hi(z)) == sample_lo(avgpool(z)); noise of scale 2 pools to standard deviation 1."""
    low, high, _ = both(settings(8))
    noise = torch.randn(2, 3, 32, 32)
    sampler: dict[str, Any] = {"method": method, "steps": 10, "guidance_scale": 2.0}
    found = F.avg_pool2d(jitscale.sample(high, [1, 2], noise=noise, **sampler), 2)
    pooled = F.avg_pool2d(2.0 * noise, 2)
    assert pooled.std().item() == pytest.approx(1.0, rel=0.1)
    expected = jitscale.sample(low, [1, 2], noise=pooled, noise_scale=1.0, **sampler)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [8, 16])
def test_up_and_down_again_is_the_same_bits(patch: int) -> None:
    low, high = settings(MODEL.patch_size), settings(patch)
    up, down = plan_upgrade(low, high, "nearest"), plan_upgrade(high, low, "nearest")
    for name, p in perturbed(low).state_dict().items():
        assert torch.equal(down.tensor(name, up.tensor(name, p)), p), name


def test_the_map_is_linear() -> None:
    """So that an average of upgraded weights is the upgraded average."""
    upgrade = plan_upgrade(settings(4), settings(8))
    first, second = perturbed(settings(4)).state_dict(), JiT(MODEL).state_dict()
    for name in RESIZED:
        mixed = upgrade.tensor(name, first[name].lerp(second[name], 0.3))
        separately = upgrade.tensor(name, first[name]).lerp(upgrade.tensor(name, second[name]), 0.3)
        torch.testing.assert_close(mixed, separately, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("old", "new", "kernel", "deviation"),
    [
        (16, 32, "nearest", 1.0),
        (16, 32, "smooth", 1.0),
        (16, 32, "pi-bilinear", 1.91),
        (16, 32, "pi-bicubic", 1.23),
        (16, 24, "nearest", 0.833),
    ],
)
def test_the_deviation_of_pooled_noise(old: int, new: int, kernel: str, deviation: float) -> None:
    enter, leave = operators(old, new, kernel)
    upgrade = Upgrade("patch", Fraction(new, old), enter, leave)
    assert upgrade.noise_deviation() == pytest.approx(deviation, abs=0.005)
    torch.manual_seed(0)
    pooled = upgrade.pool(new / old * torch.randn(64, 3, new, new))
    assert pooled.std().item() == pytest.approx(deviation, rel=0.03)


def test_more_tokens_see_the_old_positions() -> None:
    old, new, upgrade = both(settings(4, image=32, position_grid=4))
    assert (upgrade.mode, upgrade.resized) == ("tokens", ())
    every_second = [8 * row + column for row in range(0, 8, 2) for column in range(0, 8, 2)]
    torch.testing.assert_close(new.pos_embed[every_second], old.pos_embed)
    prefix = MODEL.in_context_len
    torch.testing.assert_close(new.rope[:, prefix:][:, every_second], old.rope[:, prefix:])
    z, t, y = torch.randn(1, 3, 32, 32), torch.rand(1), torch.tensor([3])
    assert new(z, t, y).shape == (1, 3, 32, 32)


def test_other_targets_are_refused() -> None:
    old = settings(4)
    for target, message in (
        (settings(8, depth=3, bottleneck_dim=4), r"model\.depth: 2 -> 3; model\.bottleneck_dim: 8 -> 4"),
        (settings(8, image=48), r"patch_size=8 must be 3 x 4"),
        (settings(4, image=32), r"position_grid=None must be 4"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_upgrade(old, target)
    wrong = settings(8)
    wrong.diffusion.noise_scale = 1.0
    with pytest.raises(ConfigError, match=r"noise_scale=1\.0 must be 2 x the old one.*add diffusion\.noise_scale=2"):
        plan_upgrade(old, wrong)
    with pytest.raises(ConfigError, match="mean mode patch"):
        plan_upgrade(old, settings(8), mode="tokens")
    with pytest.raises(ConfigError, match="choose one of smooth, nearest"):
        operators(4, 8, "cubic")


# The tool


@pytest.fixture
def low(tmp_path: Path) -> Path:
    """A run with moments."""
    config = settings(4)
    config.run.max_steps, config.ema.decays = 1, [0.9]
    config.evaluation.weights = "ema_0.9"
    state = perturbed(config).state_dict()
    torch.manual_seed(1)
    sets = {name: {key: torch.rand_like(p) for key, p in state.items()} for name in ("model", "ema_0.9", *MOMENTS)}
    sets["model"] = state
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    progress = Progress(7, 84, 7, None)
    folder = step_folder(tmp_path / "low", 7)
    write_streamed(folder, progress, config, shapes, list(sets), lambda name, key: sets[name][key])
    return tmp_path / "low"


def target(folder: Path, config: Config) -> Path:
    config.run.max_steps, config.ema.decays, config.evaluation.weights = 1, [0.9], "ema_0.9"
    path = folder / f"to_{config.model.image_size}_{config.model.patch_size}.yaml"
    path.write_text(to_yaml(config))
    return path


def upgraded(source: Path, to: Path, output: Path, *more: str) -> Path:
    assert main(["--checkpoint", str(source), "--to", str(to), "--output", str(output), *more]) == 0
    return output


def test_the_tool_writes_a_run(low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "preview.png"
    exact = ["--kernel", "nearest"]
    high = upgraded(low, target(tmp_path, settings(8)), tmp_path / "high", "--preview", str(picture), *exact)
    printed = capsys.readouterr().out
    for text in ("resized by 2", "noise scale: 1 -> 2", "lr_factor_patch_embedding=0.25", "whole network"):
        assert text in printed
    for line in printed.splitlines():
        if "self-check" in line:
            assert all(float(number.rstrip(",")) < 1e-5 for number in line.split() if "e-" in number), line
    assert Image.open(picture).size == (8 * 32, 3 * 32), "before, after pooled, after"
    before, after = open_weights(low), open_weights(high)
    assert after.optimizer_step == 7
    plan = plan_upgrade(settings(4), settings(8), "nearest")
    for name in ("model", "ema_0.9", *MOMENTS):
        for key in before.shapes:
            expected = plan.tensor(key, before.tensor(name, key))
            if name in MOMENTS and key in RESIZED:
                expected = torch.zeros_like(expected)
            assert torch.equal(after.tensor(name, key), expected), (name, key)
    back = upgraded(high, target(tmp_path, settings(4)), tmp_path / "back", *exact)
    assert torch.equal(open_weights(back).tensor("model", PATCH_EMBEDDING), before.tensor("model", PATCH_EMBEDDING))


def test_moments_can_be_left_out(low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    high = upgraded(low, target(tmp_path, settings(8)), tmp_path / "high", "--reset-moments")
    assert "begin at zero" in capsys.readouterr().out
    assert open_weights(high).optimizer_step == 0


def test_the_authors_file_is_upgraded(tmp_path: Path) -> None:
    """And the new network agrees with the numbers that the authors' code has computed for the old one."""
    stored = torch.load(FILES / "jit_tiny_heun.reference.pt", weights_only=True)
    described, reference = stored["config"], stored["reference"]
    sizes = {key: value for key, value in described.items() if key in vars(ModelConfig())}
    low = Config(model=ModelConfig(**sizes), diffusion=DiffusionConfig(noise_scale=described["noise_scale"]))
    high = Config(model=ModelConfig(**{**sizes, "image_size": 32, "patch_size": 8}))
    high.diffusion.noise_scale = 2 * described["noise_scale"]
    source = FILES / "jit_tiny_heun.checkpoint-last.pth"
    run = upgraded(source, target(tmp_path, high), tmp_path / "high", "--config", str(target(tmp_path, low)))
    network = jitscale.load_model(run, weights="model")
    z = F.interpolate(reference["z"], scale_factor=2, mode="nearest")
    with torch.no_grad():
        found = F.avg_pool2d(network(z, reference["t"], reference["y"]), 2)
    assert float((found - reference["net_out"]).norm() / reference["net_out"].norm()) < 1e-5


def test_mistakes(low: Path, tmp_path: Path) -> None:
    to = target(tmp_path, settings(8))
    upgraded(low, to, tmp_path / "high")
    with pytest.raises(UserError, match="holds checkpoints already"):
        upgraded(low, to, tmp_path / "high")
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 32 -> 64"):
        upgraded(low, to, tmp_path / "other", "model.hidden_size=64")
    part = next(low.glob("checkpoints/*/rank_00000.safetensors"))
    part.write_bytes(part.read_bytes()[:-8] + b"\0\1\2\3\4\5\6\7")
    with pytest.raises(CheckpointError, match="its content is not what was written"):
        upgraded(low, to, tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        upgraded(tmp_path / "absent", to, tmp_path / "other")
    assert not (tmp_path / "other").exists()
