"""The cost and the needs of measurements, and the warnings about a configuration before it runs."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from jitscale.config import Config, images_of_run, load_config, weight_set_names
from jitscale.config.cautions import cautions, start_caution
from jitscale.config.schema import METHODS
from jitscale.data.shards import ShardSet
from jitscale.diffusion.sampler import Sampler
from jitscale.errors import ConfigError, DataError, UserError
from jitscale.evaluation.blocks import Missing, compute_blocks
from jitscale.evaluation.cost import measuring_cost
from jitscale.evaluation.evaluator import configured_labels
from jitscale.evaluation.generate import random_labels
from jitscale.evaluation.metrics import FrechetDistance
from jitscale.evaluation.real_images import cache_folders, finished_parts
from jitscale.evaluation.requirements import measurable_config
from jitscale.evaluation.sweep import sweep_points
from jitscale.parallel import World
from jitscale.preparation.array_shards import write_shards
from jitscale.preparation.digits import digit_images
from jitscale.progressive import stages_of
from tests.support import ROOT

CONFIGS = ROOT / "configs"
MEASURED = sorted(
    path
    for path in CONFIGS.glob("*.yaml")
    if path.name.startswith(("jit_", "finetune_", "progressive_")) and "glyphs" not in path.name
)


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.1, 1.0), (0.35, 0.8)])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("method", METHODS)
def test_the_counted_evaluations_equal_the_actual_ones(
    method: str, scale: float, interval: tuple[float, float]
) -> None:
    sampler = Sampler(method, 10, scale, interval)
    seen: list[torch.Tensor] = []

    def network(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y)
        return z

    sampler.sample(network, torch.randn(1, 3, 4, 4), torch.tensor([3]), null_label=7)
    labels = torch.cat(seen).tolist()
    assert sampler.evaluations() == (labels.count(3), labels.count(7))
    assert labels.count(3) == (19 if method == "heun" else 10), "a multistep method evaluates once a step"
    first = sampler.evaluations(range(4))
    assert tuple(a + b for a, b in zip(first, sampler.evaluations(range(4, 10)), strict=True)) == sampler.evaluations()


def test_a_guided_image_of_the_recipe_costs_62_images_of_training() -> None:
    strong, weak = Sampler("heun", 50, 2.2, (0.1, 1.0)).evaluations()
    assert (strong, weak) == (99, 88)
    alone = ["evaluation.sweep=null", "evaluation.every_images=0", "evaluation.grid_every_images=0"]
    config = load_config(CONFIGS / "jit_h_256.yaml", alone)
    cost = measuring_cost(config)
    assert cost.final == pytest.approx(50_000 * 187 / 3)
    assert cost.share == pytest.approx(50_000 * 187 / 3 / 768_700_200)
    assert (cost.in_training, cost.sweep, cost.points) == (0, 0, 1)


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: path.stem)
def test_every_imagenet_recipe_measures_within_its_bound(path: Path) -> None:
    """In 600 epochs all measurements cost at most 2%.

    In 40 epochs of fine-tuning the sweep costs at most 4%, besides one FID-50K.
    """
    config = load_config(path)
    evaluation = config.evaluation
    assert (evaluation.features, evaluation.num_images, evaluation.at_end) == ("inception", 50_000, True)
    settings = sweep_points(config, weight_set_names(config))
    assert {setting.weights for setting in settings} == {"ema_0.9996", "ema_0.9998", "ema_0.9999"}
    assert evaluation.guidance_scale in {setting.guidance_scale for setting in settings}
    cost = measuring_cost(config)
    assert evaluation.sweep_max_share is not None
    assert cost.sweep / cost.trained <= evaluation.sweep_max_share
    if path.name.startswith("finetune_"):
        assert images_of_run(config) == pytest.approx(40 * 1_281_167, rel=1e-4)
        assert cost.sweep / cost.trained <= 0.04
        assert cost.times_in_training == 3, "every 10 epochs; after 40 epochs only the final evaluation"
        assert cost.pictures / cost.trained == pytest.approx(40 * 80 * 62.3 / (40 * 1_281_167), rel=1e-2)
    else:
        assert sum(map(images_of_run, stages_of(config))) == pytest.approx(600 * 1_281_167, rel=1e-4)
        assert cost.share <= 0.02
        assert cost.times_in_training == 11, "every 50 epochs; after 600 epochs only the final evaluation"
        image = 62.3 if evaluation.method == "heun" else (50 + 44) / 3
        assert cost.pictures == pytest.approx(120 * 80 * image, rel=1e-2)
    assert "x 5,000 images during training" in str(cost)


def test_the_share_of_measuring_counts_training_with_routing() -> None:
    """JiT-B routes half of its tokens for three quarters of its images."""
    config = load_config(CONFIGS / "jit_b_256.yaml", ["model.route_share=0.5", "run.route_until_images=576525150"])
    whole = load_config(CONFIGS / "jit_b_256.yaml")
    cost, without = measuring_cost(config), measuring_cost(whole)
    assert without.trained == images_of_run(whole)
    assert cost.trained == pytest.approx(without.trained * (0.75 * 0.686 + 0.25), rel=1e-3)
    assert (cost.sweep, cost.final) == (without.sweep, without.final)


def test_the_sweep_counts_shared_steps_once() -> None:
    """Scales of one average and one interval share the steps before guidance.

    Of 10 Euler steps from t = 0.35 on, four are shared.
    """
    settings = ["evaluation.method=euler", "evaluation.steps=10", "evaluation.guidance_interval=[0.35,1.0]"]
    config = load_config(CONFIGS / "jit_b_256.yaml", [*settings, 'evaluation.sweep=["guidance=1,2,3"]'])
    cost = measuring_cost(config)
    assert cost.sweep == pytest.approx(5000 / 3 * (10 + 2 * (10 + 6) - 2 * 4))


def test_a_sweep_of_internal_guidance_costs_no_more_than_its_points() -> None:
    """Points of one internal scale share the steps before guidance; points of different scales do not.

    Evaluations are shared as before.
    """
    settings = ["evaluation.method=ab2", "evaluation.steps=10", "evaluation.guidance_interval=[0.35,1.0]"]
    axes = 'evaluation.sweep=["guidance=1,2,3","internal=1,1.5"]'
    cost = measuring_cost(load_config(CONFIGS / "jit_b_256.yaml", [*settings, "model.middle_head=4", axes]))
    assert cost.sweep == pytest.approx(2 * 5000 / 3 * (10 + 2 * (10 + 6) - 2 * 4))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["evaluation.features=inception", "evaluation.features_dir=/tmp/no_weights_here"],
            r"/tmp/no_weights_here/weights-inception.* is not there, and cannot be downloaded here \(.*\); on a "
            r"machine with a network: python tools/fetch_weights\.py --output /tmp/no_weights_here inception$",
        ),
        (
            ["evaluation.features=inception", "evaluation.features_file=/nowhere.pth"],
            "correct evaluation.features_file",
        ),
        (
            ["evaluation.reference=/nowhere"],
            r"evaluation\.reference: /nowhere: missing .*; copy it again or correct evaluation\.reference$",
        ),
        (
            ["evaluation.reference_size=16"],
            r"the manifest says 8 pixels per side, evaluation\.reference_size is 16; lower it",
        ),
        (["evaluation.reference=/nowhere.npz"], "evaluation.reference=/nowhere.npz: no statistics of features"),
        (
            ["evaluation.sweep_max_share=0.5", 'evaluation.sweep=["guidance=1,2"]', "evaluation.sweep_images=10"],
            r"evaluation\.sweep_max_share=0\.5: the sweep would take 230% of the run's .*evaluation\.sweep=null",
        ),
        (["evaluation.sweep=[guidance=x]"], "evaluation.sweep: guidance=x: write FROM:TO:STEP"),
        (["evaluation.sweep=[ema=ema_0.5]"], "no weight set ema_0.5; there are model, ema_0.9"),
        (["evaluation.num_images=100000000000"], "the features of 100000000000 images take "),
        ([], None),
    ],
)
def test_missing_parts_are_reported_before_the_run(tmp_path: Path, overrides: list[str], message: str | None) -> None:
    write_shards(*digits(20), tmp_path / "shards")
    settings = ["model.num_classes=10", "model.image_size=8", "model.patch_size=4", "evaluation.at_end=true"]
    settings += ["ema.decays=[0.9]", "evaluation.weights=ema_0.9", "evaluation.features=digits", "run.max_steps=20"]
    settings += [f"data.shards={tmp_path / 'shards'}", f"run.dir={tmp_path / 'run'}", "data.batch_size=20"]
    (tmp_path / "config.yaml").write_text("run: {max_images: 400}")
    config = load_config(tmp_path / "config.yaml", [*settings, "evaluation.num_images=10", *overrides])
    world = World(0, 1, 0, torch.device("cpu"))
    if message is None:
        assert measurable_config(config, world) == config
    else:
        with pytest.raises(UserError, match=message):
            measurable_config(config, world)
    config.evaluation.at_end = False
    assert measurable_config(config, world) == config, "without measurements nothing is needed"
    assert not (tmp_path / "run").exists()


def test_too_few_images_give_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """63 and 10 images are fewer than the 64 dimensions of the digits network.

    The warning covers sweeps and measurements on the way.
    """
    write_shards(*digits(20), tmp_path / "shards")
    (tmp_path / "config.yaml").write_text("run: {max_images: 400}")
    settings = ["model.num_classes=10", "model.image_size=8", "model.patch_size=4", "evaluation.at_end=true"]
    settings += [f"data.shards={tmp_path / 'shards'}", "evaluation.features=digits", "evaluation.num_images=64"]
    settings += ["evaluation.every_images=1024", "evaluation.few_images=63", "evaluation.sweep_images=10"]
    config = load_config(tmp_path / "config.yaml", [*settings, 'evaluation.sweep=["guidance=1,2"]'])
    measurable_config(config, World(0, 1, 0, torch.device("cpu")))
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [line.split(" is fewer than the 64 dimensions of features")[0] for line in said] == [
        "evaluation.sweep_images=10",
        "evaluation.few_images=63",
    ]


def digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = digit_images(8)
    return images[:count], labels[:count]


def test_the_warning_about_an_average_that_is_mostly_initial_weights() -> None:
    """0.9999^6931 is one half. With warm-up, or with averages from another run, the share is unknown."""
    config = load_config(CONFIGS / "jit_b_256.yaml")
    assert start_caution(config, "ema_0.9999", 6932) is None
    said = start_caution(config, "ema_0.9999", 60)
    assert said is not None
    assert said.startswith("after 60 steps, 99% of ema_0.9999 are the initial weights")
    assert start_caution(config, "model", 60) is None
    for group, name, value in (("ema", "warmup", True), ("run", "init_from", "runs/other")):
        other = load_config(CONFIGS / "jit_b_256.yaml")
        setattr(getattr(other, group), name, value)
        assert start_caution(other, "ema_0.9999", 60) is None


@pytest.mark.parametrize(
    ("config", "override", "said"),
    [
        ("jit_h_256", "run.max_images=6000000", "optim.warmup_images=6405835 is more than the "),
        ("jit_h_256", "model.attn_dropout=0", "model.attn_dropout of 0: the paper trains JiT-H and larger"),
        ("jit_g_512", "model.proj_dropout=0", "model.proj_dropout of 0"),
        ("jit_b_256", "diffusion.subspace=P.safetensors", "diffusion.subspace=P.safetensors does nothing without"),
        (
            "jit_b_256",
            "run.route_until_images=100",
            "route_until_images=100 does nothing without model.",
        ),
        (
            "jit_h_256_plus",
            "run.max_images=200000000",
            "route_until_images=614960160 is not before the end of the run, at 200000000 images",
        ),
        ("jit_h_256_plus", "model.proj_dropout=0", "model.proj_dropout of 0"),
        ("jit_h_256_plus", "optim.lr=1e-4", None),
        ("jit_h_256", "optim.lr=1e-4", None),
        ("jit_b_256", "model.attn_dropout=0", None),
    ],
)
def test_warnings_about_settings(config: str, override: str, said: str | None) -> None:
    loaded = load_config(CONFIGS / f"{config}.yaml", [override])
    found = cautions(loaded, images_of_run(loaded))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_random_labels_follow_the_counts() -> None:
    """A label depends on seed and id alone. A class without samples never appears."""
    drawn = random_labels(range(4000), 3, [10, 0, 30])
    assert torch.equal(random_labels([17, 5], 3, [10, 0, 30]), drawn[[17, 5]])
    assert not torch.equal(random_labels(range(4000), 4, [10, 0, 30]), drawn)
    counts = torch.bincount(drawn, minlength=3).tolist()
    assert counts[1] == 0
    assert counts[0] == pytest.approx(1000, abs=100)
    with pytest.raises(ValueError, match="need a class with samples"):
        random_labels([0], 0, [0, 0])


def test_merged_statistics_of_parts_equal_those_of_the_whole() -> None:
    """The mean may be large and the covariance singular. Any split gives the same statistics and the same distance."""
    random = np.random.default_rng(0)
    # Roots of zero eigenvalues are only as exact as roots of round-off.
    singular = random.normal(0.0, 1.0, (6, 20)).astype(np.float32)
    for features, digits in ((random.normal(1000.0, 1.0, (300, 8)), 1e-9), (singular, 1e-7)):
        mean, covariance = features.mean(axis=0, dtype=np.float64), np.cov(features.T, dtype=np.float64)
        other = features[::-1] * 1.5
        whole = FrechetDistance.from_statistics(mean, covariance)
        whole.update(other, real=False)
        for ends in ([100], [1, 2, 3], [0, len(features) - 1]):
            merged = FrechetDistance(features.shape[1])
            for part in np.split(features, ends):
                sums = FrechetDistance(features.shape[1])
                sums.update(part, real=True)
                merged.merge_state(sums.metric_state)
            merged.update(other, real=False)
            found_mean, found_covariance = merged.gaussian("real")
            np.testing.assert_allclose(found_mean, mean, rtol=1e-12)
            np.testing.assert_allclose(found_covariance, covariance, rtol=1e-9, atol=1e-12)
            assert float(merged.compute()) == pytest.approx(float(whole.compute()), rel=digits)


def test_blocks_are_the_same_without_files(tmp_path: Path) -> None:
    def compute(missing: Sequence[Missing]) -> Iterator[dict[str, np.ndarray]]:
        for block in missing:
            for point in block.points:
                yield {"features": np.full((2, 1), 10.0 * point + block.number)}

    world = World(0, 1, 0, torch.device("cpu"))
    folders = [tmp_path / "a", tmp_path / "b"]
    passing = compute_blocks(folders, 3, 2, compute, world, keep=False)
    assert not list(tmp_path.iterdir())
    kept = compute_blocks(folders, 3, 2, compute, world, keep=True)
    assert [found["features"][:, 0].tolist() for found in passing] == [[0, 0, 1, 1, 2, 2], [10, 10, 11, 11, 12, 12]]
    assert all(np.array_equal(a["features"], b["features"]) for a, b in zip(passing, kept, strict=True))


def test_a_damaged_block_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made: list[int] = []

    def compute(missing: Sequence[Missing]) -> Iterator[dict[str, np.ndarray]]:
        for block in missing:
            made.append(block.number)
            yield {"features": np.full((2, 50), float(block.number)), "labels": np.arange(2)}

    def compute_all() -> list[float]:
        made.clear()
        (found,) = compute_blocks([tmp_path], 5, 2, compute, World(0, 1, 0, torch.device("cpu")), keep=True)
        return found["features"][:, 0].tolist()

    files = [tmp_path / f"block_{number:06d}.npz" for number in range(5)]
    whole = compute_all()
    content = files[1].read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 1
    for file, damaged in zip(files[1:], (content[:-100], b"", flipped, b"garbage"), strict=True):
        file.write_bytes(damaged)
    assert compute_all() == whole == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert made == [1, 2, 3, 4]
    assert caplog.text.count("it is computed again") == 4
    np.savez(files[2], features=np.zeros((1, 50)), labels=np.arange(1))  # The size is wrong.
    assert (compute_all(), made) == (whole, [2])
    np.savez(files[3], other=np.zeros((2, 50)), labels=np.arange(2))  # The names are wrong.
    assert (compute_all(), made) == (whole, [3])
    files[0].write_bytes(b"")

    def never_whole(missing: Sequence[Missing]) -> Iterator[dict[str, np.ndarray]]:
        yield from ({"features": np.zeros((1, 50))} for _ in missing)

    with pytest.raises(DataError, match=r"block_000000\.npz: damaged right after it was written; check the disk"):
        compute_blocks([tmp_path], 1, 2, never_whole, World(0, 1, 0, torch.device("cpu")), keep=True)


def test_tars_without_a_manifest_are_not_cached_for_other_runs(tmp_path: Path) -> None:
    """Another run's pictures of the same sizes would get these statistics. This holds for any place of the cache."""
    images, labels = digit_images(16)
    write_shards(images[:20], labels[:20], tmp_path / "shards")
    config = load_config(
        CONFIGS / "demo.yaml", [f"data.shards={tmp_path / 'shards'}", "model.image_size=16", "model.patch_size=4"]
    )
    world, own = World(0, 1, 0, torch.device("cpu")), tmp_path / "run/evaluation/real_images"

    def folders(cache_dir: str | None) -> list[Path]:
        config.evaluation.cache_dir = cache_dir
        return cache_folders(config, ShardSet.open(tmp_path / "shards", 10, 16), tmp_path / "run", world)

    asked = tmp_path / "asked"
    assert folders(None) == [tmp_path / "shards/real_images"]
    assert folders(str(asked)) == [asked]
    (tmp_path / "shards/manifest.json").unlink()
    assert folders(None) == folders(str(asked)) == [own]


def test_finished_parts_are_counted_in_any_folder(tmp_path: Path) -> None:
    """Statistics of real images grow next to the shards, however that path is written, or in the configured cache."""
    for setting, folder in (
        ("data.shards=/data", "run/evaluation/real_images"),
        (f"data.shards={tmp_path}/shards", "shards/real_images"),
        (f"data.shards={tmp_path}/of_{{resolution}}/shard-{{000..007}}.tar", "of_32/real_images"),
        (f"data.shards={tmp_path}/some/*.tar", "some/real_images"),
        (f"evaluation.reference={tmp_path}/real", "real/real_images"),
        (f"evaluation.cache_dir={tmp_path}/asked", "asked"),
    ):
        config = load_config(CONFIGS / "demo.yaml", [f"run.dir={tmp_path}/run", "data.shards=/data", setting])
        before = finished_parts(config)
        place = tmp_path / folder / "digits_0"
        place.mkdir(parents=True)
        (place / "part_000.npz").touch()
        assert finished_parts(config) == before + 1, setting
        samples = tmp_path / "run/evaluation/samples_0"
        samples.mkdir(parents=True, exist_ok=True)
        (samples / f"block_{len(list(samples.iterdir())):06d}.npz").touch()
        assert finished_parts(config) == before + 2, setting
        (place / "facts.json").touch()
        assert finished_parts(config) == before + 2, setting


def test_labels_of_the_data_need_data() -> None:
    config = load_config(CONFIGS / "jit_b_256.yaml", ["evaluation.labels=data", "evaluation.reference=real.npz"])
    with pytest.raises(ConfigError, match=r"evaluation\.labels=data: needs shards, to count their labels"):
        configured_labels(config)


def test_a_progressive_run_is_measured_in_every_stage() -> None:
    config: Config = load_config(CONFIGS / "progressive_b_256.yaml")
    alone = replace(config, progressive=type(config.progressive)())
    whole, last = (measuring_cost(one) for one in (config, alone))
    assert (whole.trained, last.trained) == (768_700_200, 384_350_100)
    # 200 epochs at 64 px have 4 measurements, and 100 epochs at 128 px have 2. 300 epochs at 256 px have 5, and the
    # final evaluation.
    assert (whole.times_in_training, last.times_in_training) == (4 + 2 + 5, 5)
    assert (whole.sweep, whole.final) == (last.sweep, last.final)
