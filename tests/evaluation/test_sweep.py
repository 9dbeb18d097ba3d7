"""The points of a sweep. Sharing the steps before guidance changes no image and saves the expected work."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jitscale
from jitscale.checkpoints.format import Progress, step_folder
from jitscale.checkpoints.opening import read_guide
from jitscale.checkpoints.saving import write_streamed
from jitscale.config import Config, DiffusionConfig, image_shape, load_config
from jitscale.diffusion.sampler import Sampler
from jitscale.errors import ConfigError, DataError, UserError
from jitscale.evaluation.generate import generate, generate_by_scale, labels_of, noise_ahead, noise_of
from jitscale.evaluation.report import table_of
from jitscale.evaluation.sweep import sharing_steps, sweep_points
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL

SETS = ["model", "ema_0.9"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text("ema: {decays: [0.9]}\nevaluation: {weights: ema_0.9}\nrun: {max_steps: 1}\n")
    return load_config(path)


def settings_of(axes: list[str], config: Config) -> list[tuple[str, list[float], float]]:
    config.evaluation.sweep = axes
    return [(s.weights, s.guidance_interval, s.guidance_scale) for s in sweep_points(config, SETS)]


def test_a_sweep_combines_its_axes(config: Config) -> None:
    found = settings_of(["guidance=1.0:2.0:0.5", "ema=all", "interval=0.1:1.0,0.2:0.8"], config)
    own = [
        (interval, scale)
        for interval in ([0.1, 1.0], [0.2, 0.8])
        for scale in (1.0, 1.5, 2.0)
        if (interval, scale) != ([0.2, 0.8], 1.0)
    ]
    assert found == [(name, interval, scale) for name in SETS for interval, scale in own]
    assert settings_of([], config) == [("ema_0.9", [0.1, 1.0], 1.0)]
    assert [scale for _, _, scale in settings_of(["guidance=1,3,1"], config)] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("cfg=1", "write one of guidance="),
        ("guidance=1:2", "write FROM:TO:STEP"),
        ("guidance=1:2:0", "write FROM:TO:STEP"),
        ("guidance=1:1000:1", "at most 200"),
        ("guidance=nan", "write FROM:TO:STEP"),
        ("guidance=1:inf:1", "write FROM:TO:STEP"),
        ("ema=ema_0.5", "there are model, ema_0.9"),
        ("interval=0.5:0.1", "0 <= low < high <= 1"),
        ("internal=-1,2", "write FROM:TO:STEP"),
        ("internal_interval=0:2", "0 <= low < high <= 1"),
        ("internal=1,1.5", "internal: the network has no middle output layer"),
    ],
)
def test_impossible_sweeps_are_refused(config: Config, axis: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings_of([axis], config)


def test_guidance_needs_a_network_with_labels(config: Config) -> None:
    config.model.num_classes = 0
    with pytest.raises(UserError, match="cannot be guided"):
        settings_of(["guidance=2"], config)


def test_internal_guidance_is_an_axis_of_a_sweep(config: Config) -> None:
    """Without internal guidance, its interval does not multiply the points. Points that share steps are neighbours."""
    config.model.middle_head = 4
    config.evaluation.sweep = ["guidance=1,2", "internal=1,1.5", "internal_interval=0:1,0:0.8", "interval=0.1:1,0.2:1"]
    points = sweep_points(config, SETS)
    found = [(p.guidance_interval[0], p.internal_interval[1], p.internal_guidance, p.guidance_scale) for p in points]
    assert found == [
        (low, high, inner, scale)
        for low in (0.1, 0.2)
        for high, inner in ((1.0, 1.0), (1.0, 1.5), (0.8, 1.5))
        for scale in ((1.0, 2.0) if low == 0.1 else (2.0,))
    ]
    assert [len(group) for group in sharing_steps(points)] == [2, 2, 2, 1, 1, 1]


def test_the_table_shows_internal_guidance_if_the_sweep_varies_it() -> None:
    row = {"weights": "model", "guidance_scale": 2.0, "guidance_interval": [0.1, 1.0], "num_images": 10, "fid": 3.0}
    row |= {"inception_score": 4.0, "internal_interval": [0.0, 0.8]}
    table = [{**row, "internal_guidance": w} for w in (1.0, 1.4)]
    result = {"best": table[1], "table": table, "num_images": 10, "fid": 3.0}
    head, first, *_, best, _ = table_of(result).splitlines()
    assert head.split() == ["weights", "interval", "guidance", "internal", "guidance", "images", "FID", "IS"]
    assert first.split() == ["model", "0.1:1", "2", "0:0.8", "1", "10", "3.000", "4.00"]
    assert best == "best: model, guidance 2, internal guidance 1.4, 10 images"
    head, *_, best, _ = table_of({**result, "table": table[:1]}).splitlines()
    assert "internal" not in head + best


@pytest.mark.parametrize("inner", [1.0, 1.5])
@pytest.mark.parametrize(
    ("method", "interval", "before"),
    [
        *(("heun", (0.35, 0.8), 3), ("heun", (0.0, 1.0), 0), ("heun", (0.95, 1.0), 10)),
        *((method, (0.35, 0.8), 4) for method in ("euler", "2m", "ab2")),
    ],
)
def test_shared_steps_change_no_image(method: str, interval: tuple[float, float], before: int, inner: float) -> None:
    """The images are bit-equal. The history of a multistep method is kept with the shared steps."""
    model = network(0, middle_head=1)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    first = Sampler(method, 10, 1.5, interval, internal_guidance=inner, internal_interval=(0.2, 0.6))
    samplers = [replace(first, guidance_scale=scale) for scale in (1.0, 1.5, 3.0)]
    assert first.steps_before_guidance() == before
    alone = [generate(model, sampler, range(4), seed=7) for sampler in samplers]
    separately = sum(seen)
    seen.clear()
    together = list(
        generate_by_scale(model, samplers, labels_of(range(4), 10), noise_of(7, range(4), image_shape(model.config)))
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    shared = 2 * before - (before == 10) if method == "heun" else before
    assert separately - sum(seen) == 2 * 4 * shared, "the steps before guidance, for two of three scales"


def network(seed: int, middle_head: int = 0) -> JiT:
    torch.manual_seed(seed)
    model = JiT(replace(MODEL, middle_head=middle_head), DiffusionConfig()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def test_autoguidance_moves_away_from_the_guide() -> None:
    """v = v_guide + w (v_network - v_guide), both with the label. One Euler step from t = 0 to 1 gives z + v."""
    strong, weak = network(0), network(1)
    noise, labels = torch.randn(3, 3, 16, 16), [1, 2, 3]

    def sampled(model: JiT, scale: float, guide: JiT | None) -> torch.Tensor:
        return jitscale.sample(
            model,
            labels,
            noise=noise,
            method="euler",
            steps=1,
            guidance_scale=scale,
            guidance_interval=(0.0, 1.0),
            guide=guide,
        )

    alone, other = sampled(strong, 1.0, None), sampled(weak, 1.0, None)
    assert torch.equal(sampled(strong, 1.0, weak), alone), "scale 1 means no guidance"
    torch.testing.assert_close(sampled(strong, 2.5, weak), other + 2.5 * (alone - other), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sampled(strong, 2.5, strong), alone, rtol=1e-4, atol=1e-4)
    labels_seen: list[int] = []
    weak.register_forward_pre_hook(lambda _, inputs: labels_seen.extend(inputs[2].tolist()))
    jitscale.sample(
        strong, labels, noise=noise, steps=10, guidance_scale=2.0, guidance_interval=(0.35, 1.0), guide=weak
    )
    assert labels_seen == labels * (2 * 10 - 1 - 7), "the guide gets the label, and only inside the interval"


def test_a_guide_must_have_the_same_inputs(tmp_path: Path, config: Config) -> None:
    state = network(1).state_dict()
    its = Config(model=MODEL)
    its.evaluation.weights, its.ema.decays, its.run.max_steps = "model", [], 1
    shapes = {name: tuple(p.shape) for name, p in state.items()}
    folder = step_folder(tmp_path, 1)
    write_streamed(
        folder, Progress(1, 8, 0, None, class_names=["a", "b"]), its, shapes, ["model"], lambda _, name: state[name]
    )
    assert read_guide(config, None) is None
    config.evaluation.guide = str(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.image_size: 16 there, 256 here; model\.num_classes: 10 there"):
        read_guide(config, None)
    config = replace(config, model=its.model)
    with pytest.raises(DataError, match=r"evaluation.guide=.*: class 1 is 'b' here and 'c' in the network; give a"):
        read_guide(config, ["a", "c"])
    found = read_guide(config, ["a", "b"])
    assert found is not None
    assert torch.equal(found.state_dict()["x_embedder.proj1.weight"], state["x_embedder.proj1.weight"])


def test_noise_drawn_ahead_is_unchanged() -> None:
    """This holds for the blocks of one rank of three, and for no blocks."""
    blocks = [range(0, 4), range(12, 16), range(24, 28)]
    for ids, noise in zip(blocks, noise_ahead(3, blocks, (3, 8, 8)), strict=True):
        assert torch.equal(noise, noise_of(3, ids, (3, 8, 8)))
    assert not list(noise_ahead(3, [], (3, 8, 8)))
