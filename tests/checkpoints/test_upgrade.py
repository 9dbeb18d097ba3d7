"""The upgraded network, averaged down, computes the same function as the old one."""

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
from jitscale.checkpoints.upgrade import (
    AREA_MEANS,
    KERNELS,
    PATCH_EMBEDDING,
    RESIZED,
    SUBSPACE,
    Upgrade,
    operators,
    plan_upgrade,
)
from jitscale.checkpoints.weights import MOMENTS, check_fits, names_in
from jitscale.config import Config, DiffusionConfig, ModelConfig, has_fitted_subspace, image_shape, load_config, to_yaml
from jitscale.diffusion.objective import project, to_spaces
from jitscale.errors import CheckpointError, ConfigError, UserError
from jitscale.model.jit import JiT
from tests.support import FILES
from tests.support.tiny import MODEL
from tools.upgrade_resolution import main, self_check

RANK = 5
NUMBERS = 3 * MODEL.patch_size**2


def settings(patch: int, *, image: int | None = None, rank: int | None = None, **model: Any) -> Config:
    """The network at another patch size, with the matching noise scale; `rank` adds asym."""
    size = image or patch * MODEL.image_size // MODEL.patch_size
    sizes = {**vars(MODEL), "image_size": size, "patch_size": patch, **model}
    predicts = {} if rank is None else {"prediction": "asym", "rank": rank}
    diffusion: dict[str, Any] = {"noise_scale": size / MODEL.image_size, **predicts}
    return Config(model=ModelConfig(**sizes), diffusion=DiffusionConfig(**diffusion))


def subspace(rank: int = RANK) -> torch.Tensor:
    found: torch.Tensor = torch.linalg.qr(torch.randn(NUMBERS, rank, generator=torch.Generator().manual_seed(5)))[0]
    return found


def perturbed(config: Config) -> JiT:
    torch.manual_seed(0)
    fitted = has_fitted_subspace(config.model, config.diffusion)
    network = JiT(config.model, config.diffusion, subspace(config.diffusion.rank) if fitted else None).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # Layers that start at zero would hide an error.
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network


def both(new: Config, kernel: str = KERNELS[0], old_rank: int | None = None) -> tuple[JiT, JiT, Upgrade]:
    kept = {name: getattr(new.model, name) for name in ("middle_head", "in_channels")}
    low = settings(MODEL.patch_size, rank=old_rank, **kept)
    old = perturbed(low)
    upgrade = plan_upgrade(low, new, kernel)
    network = JiT(new.model, new.diffusion).eval()
    network.load_state_dict({name: upgrade.tensor(name, p) for name, p in old.state_dict().items()})
    return old, network, upgrade


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("patch", [6, 8, 12, 16])
def test_the_function_is_preserved(patch: int, kernel: str, channels: int) -> None:
    """The ratios k are 3/2, 2, 3 and 4."""
    old, new, upgrade = both(settings(patch, in_channels=channels), kernel)
    z, t, y = torch.randn(3, *image_shape(new.config)), torch.rand(3), torch.tensor([0, 5, 10])
    with torch.no_grad():
        expected = old(upgrade.pool(z), t, y)
        found = upgrade.pool(new(z, t, y))
    assert expected.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    if kernel == "nearest" and patch % MODEL.patch_size == 0:
        torch.testing.assert_close(upgrade.pool(z), F.avg_pool2d(z, patch // MODEL.patch_size))


def test_a_lower_resolution_shows_the_enlarged_image() -> None:
    old, new, upgrade = both(settings(2), "nearest")
    z, t, y = torch.randn(3, 3, 8, 8), torch.rand(3), torch.tensor([0, 5, 10])
    with torch.no_grad():
        expected = F.avg_pool2d(old(F.interpolate(z, scale_factor=2, mode="nearest"), t, y), 2)
        torch.testing.assert_close(new(z, t, y), expected, rtol=1e-5, atol=1e-5)
    assert upgrade.ratio == Fraction(1, 2)


def velocities(network: JiT, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """The velocities of the last and of the middle output layer."""
    with torch.no_grad():
        outputs, asked = network(z, t, y, middle=True), network.diffusion
    return [to_spaces(each, z, t, asked.prediction, asked.t_eps, network.subspace).v for each in outputs]


@pytest.mark.parametrize(
    ("rank", "new_rank", "patch", "kernel"),
    [
        *((RANK, RANK, patch, kernel) for patch in (8, 12, 16) for kernel in AREA_MEANS),
        *((0, 0, patch, kernel) for patch in (6, 8) for kernel in KERNELS),
        *((NUMBERS, 3 * patch**2, patch, kernel) for patch in (6, 8) for kernel in KERNELS),
    ],
)
def test_velocities_of_asym_and_of_the_middle_layer_are_preserved(
    rank: int, new_rank: int, patch: int, kernel: str
) -> None:
    """Both ends of the ranks, with every kernel and ratio. At the last time the clamp of 1 - t acts."""
    old, new, upgrade = both(settings(patch, rank=new_rank, middle_head=1), kernel, rank)
    size = new.config.image_size
    z, t, y = torch.randn(3, 3, size, size), torch.tensor([0.1, 0.6, 0.98]), torch.tensor([0, 5, 10])
    pairs = list(zip(velocities(new, z, t, y), velocities(old, upgrade.pool(z), t, y), strict=True))
    assert not torch.allclose(pairs[0][0], pairs[1][0], rtol=0.1)
    for after, before in pairs:
        assert before.std() > 0.05
        torch.testing.assert_close(upgrade.pool(after), before, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kernel", AREA_MEANS)
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_the_lifted_subspace_is_orthonormal_and_reversible(ratio: int, kernel: str) -> None:
    """P' = k D^T P is orthonormal, and D S' = S D. The reverse map gives P again."""
    low, high = settings(4, rank=RANK), settings(4 * ratio, rank=RANK)
    up, down = plan_upgrade(low, high, kernel), plan_upgrade(high, low, kernel)
    before = torch.linalg.qr(torch.randn(NUMBERS, RANK, dtype=torch.float64))[0]
    after = up.tensor(SUBSPACE, before)
    assert after.shape == (NUMBERS * ratio**2, RANK)
    exact: dict[str, Any] = {"rtol": 0, "atol": 1e-14}
    torch.testing.assert_close(after.T @ after, torch.eye(RANK, dtype=torch.float64), **exact)
    whole = before.view(4, 4, 3, RANK).repeat_interleave(ratio, 0).repeat_interleave(ratio, 1) / ratio
    torch.testing.assert_close(after, whole.reshape(-1, RANK), **exact)
    images = torch.randn(2, 3, 16 * ratio, 16 * ratio, dtype=torch.float64)
    torch.testing.assert_close(up.pool(project(images, after)), project(up.pool(images), before), **exact)
    torch.testing.assert_close(down.tensor(SUBSPACE, after), before, **exact)


def test_a_subspace_with_fine_detail_cannot_be_reduced() -> None:
    down = plan_upgrade(settings(4, rank=RANK), settings(2, rank=RANK))
    with pytest.raises(CheckpointError, match=r"not orthonormal.*holds detail that these pixels lose"):
        down.tensor(SUBSPACE, subspace())
    up = plan_upgrade(settings(4, rank=RANK), settings(8, rank=RANK))
    for damaged in (subspace() * 1.01, subspace() * torch.nan):
        with pytest.raises(CheckpointError, match="the old one is damaged"):
            up.tensor(SUBSPACE, damaged)


def test_more_tokens_keep_the_subspace() -> None:
    old, new, upgrade = both(settings(4, image=32, position_grid=4, rank=RANK), old_rank=RANK)
    assert upgrade.mode == "tokens"
    assert torch.equal(new.stored_buffers()[SUBSPACE], old.stored_buffers()[SUBSPACE])


@pytest.mark.parametrize(
    ("old_rank", "new", "kernel", "message"),
    [
        (RANK, settings(8, rank=RANK), "pi-bicubic", r"rank=5: .* mean of areas; choose --kernel smooth or nearest"),
        (RANK, settings(6, rank=RANK), "smooth", r"rank=5: .* by a whole number, not by 3/2; choose another size"),
        (RANK, settings(8, rank=6), "smooth", r"rank=6 must be 5, the old one; add diffusion\.rank=5"),
        (NUMBERS, settings(8, rank=NUMBERS), "smooth", r"must be 192: full rank.*add diffusion\.rank=192"),
        (RANK, settings(8, rank=192), "smooth", r"rank=192 must be 5"),
        (12, settings(2, rank=12), "smooth", r"rank=12: below the 48 numbers of the old patch, but full"),
        (0, settings(8, rank=1), "smooth", r"rank=1 must be 0"),
        (RANK, settings(8), "smooth", r"diffusion\.prediction: asym -> x"),
    ],
)
def test_ranks_and_kernels_that_do_not_preserve_the_function_are_refused(
    old_rank: int, new: Config, kernel: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        plan_upgrade(settings(4, rank=old_rank), new, kernel)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rank", [None, RANK])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_whole_trajectories_are_preserved(method: str, rank: int | None) -> None:
    """avgpool(sample_hi(z)) == sample_lo(avgpool(z)). Noise of scale 2 pools to a standard deviation of 1."""
    low, high, _ = both(settings(8, rank=rank), old_rank=rank)
    noise = torch.randn(2, 3, 32, 32)
    sampler: dict[str, Any] = {"method": method, "steps": 10, "guidance_scale": 2.0}
    found = F.avg_pool2d(jitscale.sample(high, [1, 2], noise=noise, **sampler), 2)
    pooled = F.avg_pool2d(2.0 * noise, 2)
    assert pooled.std().item() == pytest.approx(1.0, rel=0.1)
    expected = jitscale.sample(low, [1, 2], noise=pooled, noise_scale=1.0, **sampler)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [8, 16])
def test_up_and_down_again_is_bit_equal(patch: int) -> None:
    low, high = (settings(each, rank=RANK, middle_head=1) for each in (MODEL.patch_size, patch))
    up, down = plan_upgrade(low, high, "nearest"), plan_upgrade(high, low, "nearest")
    for name, p in perturbed(low).state_dict().items():
        assert torch.equal(down.tensor(name, up.tensor(name, p)), p), name


def test_the_upgrade_is_linear_in_the_weights() -> None:
    """Linearity makes the average of upgraded weights equal to the upgraded average."""
    low = settings(4, middle_head=1)
    upgrade = plan_upgrade(low, settings(8, middle_head=1))
    first, second = perturbed(low).state_dict(), JiT(low.model).state_dict()
    for name in (name for name in RESIZED if name != SUBSPACE):
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


def test_more_tokens_interpolate_the_old_positions() -> None:
    old, new, upgrade = both(settings(4, image=32, position_grid=4))
    assert (upgrade.mode, upgrade.resized) == ("tokens", ())
    every_second = [8 * row + column for row in range(0, 8, 2) for column in range(0, 8, 2)]
    torch.testing.assert_close(new.pos_embed[every_second], old.pos_embed)
    prefix = MODEL.in_context_len
    torch.testing.assert_close(new.rope[:, prefix:][:, every_second], old.rope[:, prefix:])
    z, t, y = torch.randn(1, 3, 32, 32), torch.rand(1), torch.tensor([3])
    assert new(z, t, y).shape == (1, 3, 32, 32)


def test_impossible_targets_are_refused() -> None:
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
    """A run that has moments."""
    return run_with_moments(tmp_path, settings(4))


def run_with_moments(tmp_path: Path, config: Config) -> Path:
    config.run.max_steps, config.ema.decays = 1, [0.9]
    config.evaluation.weights = "ema_0.9"
    state = perturbed(config).state_dict()
    torch.manual_seed(1)
    sets = {name: {key: torch.rand_like(p) for key, p in state.items()} for name in ("model", "ema_0.9", *MOMENTS)}
    sets["model"] = state
    if SUBSPACE in state:
        sets["ema_0.9"][SUBSPACE] = state[SUBSPACE]
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    progress = Progress(7, 84, 7, None, class_names=["a", "b"])
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
    assert Image.open(picture).size == (8 * 32, 3 * 32), "the table has three columns: before, after pooling, after"
    before, after = open_weights(low), open_weights(high)
    assert (after.optimizer_step, after.class_names) == (7, ["a", "b"])
    plan = plan_upgrade(settings(4), settings(8), "nearest")
    for name in ("model", "ema_0.9", *MOMENTS):
        for key in before.shapes:
            expected = plan.tensor(key, before.tensor(name, key))
            if name in MOMENTS and key in RESIZED:
                expected = torch.zeros_like(expected)
            assert torch.equal(after.tensor(name, key), expected), (name, key)
    back = upgraded(high, target(tmp_path, settings(4)), tmp_path / "back", *exact)
    assert torch.equal(open_weights(back).tensor("model", PATCH_EMBEDDING), before.tensor("model", PATCH_EMBEDDING))


@pytest.mark.parametrize("kernel", AREA_MEANS)
def test_the_tool_lifts_the_subspace_and_the_middle_layer(
    tmp_path: Path, kernel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run_with_moments(tmp_path, settings(4, rank=RANK, middle_head=1))
    to, picture = target(tmp_path, settings(8, rank=RANK, middle_head=1)), tmp_path / "preview.png"
    high = upgraded(source, to, tmp_path / "high", "--preview", str(picture), "--kernel", kernel)
    printed = capsys.readouterr().out
    assert Image.open(picture).size == (8 * 32, 3 * 32)
    assert "middle_layer.linear.weight, middle_layer.linear.bias, subspace" in printed
    checks = [line for line in printed.splitlines() if "self-check" in line]
    assert len(checks) == 2
    for line in checks:
        for what in ("patch embedding", " output layer", "middle output layer", "subspace", "whole network"):
            assert float(line.split(f"{what} ")[1].split(",")[0]) < 1e-5, line
    before, after = open_weights(source), open_weights(high)
    check_fits(after, load_config(to))
    plan = plan_upgrade(before.config, after.config, kernel)
    for name in ("model", "ema_0.9", *MOMENTS):
        for key in names_in(name, before.shapes):
            expected = plan.tensor(key, before.tensor(name, key))
            if name in MOMENTS and key in RESIZED:
                expected = torch.zeros_like(expected)
            assert torch.equal(after.tensor(name, key), expected), (name, key)
    assert after.tensor("model", "middle_layer.linear.weight").shape == (192, 32)
    assert after.tensor("exp_avg", "middle_layer.adaLN_modulation.1.weight").std() > 0


@pytest.mark.parametrize("name", ["middle_layer.linear.bias", SUBSPACE])
def test_the_self_check_finds_an_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error anywhere is found, also if only the whole network shows it."""
    config = settings(8, rank=RANK, middle_head=1)
    source = open_weights(run_with_moments(tmp_path, settings(4, rank=RANK, middle_head=1)))
    plan = plan_upgrade(source.config, config)
    assert "e-" in self_check(source, "model", config, plan).split("whole network ")[1]
    right = Upgrade.tensor

    def wrong(self: Upgrade, key: str, tensor: torch.Tensor) -> torch.Tensor:
        return right(self, key, tensor).roll(1, 0) if key == name else right(self, key, tensor)

    monkeypatch.setattr(Upgrade, "tensor", wrong)
    found = self_check(source, "model", config, plan)
    words = "subspace" if name == SUBSPACE else "middle output layer"
    assert float(found.split(f"{words} ")[1].split(",")[0]) > 1e-2
    assert float(found.split("whole network ")[1]) > 1e-2


def test_moments_can_be_left_out(low: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    high = upgraded(low, target(tmp_path, settings(8)), tmp_path / "high", "--reset-moments")
    assert "begin at zero" in capsys.readouterr().out
    assert open_weights(high).optimizer_step == 0


def test_the_authors_file_is_upgraded(tmp_path: Path) -> None:
    """The new network also agrees with the numbers that the authors' code computed for the old one."""
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


def test_mistakes_of_the_upgrade_command(low: Path, tmp_path: Path) -> None:
    to = target(tmp_path, settings(8))
    upgraded(low, to, tmp_path / "high")
    with pytest.raises(UserError, match="holds checkpoints already"):
        upgraded(low, to, tmp_path / "high")
    with pytest.raises(ConfigError, match=r"model\.hidden_size: 32 -> 64"):
        upgraded(low, to, tmp_path / "other", "model.hidden_size=64")
    part = next(low.glob("checkpoints/*/rank_00000.safetensors"))
    part.write_bytes(part.read_bytes()[:-8] + b"\0\1\2\3\4\5\6\7")
    with pytest.raises(CheckpointError, match="its content has changed since it was written"):
        upgraded(low, to, tmp_path / "other")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        upgraded(tmp_path / "absent", to, tmp_path / "other")
    assert not (tmp_path / "other").exists()
