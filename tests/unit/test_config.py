"""Configuration: composition, overrides, and everything that is refused."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jitscale.config import CHOICES, load_config, setting_names, to_yaml, weight_set_names
from jitscale.errors import ConfigError
from jitscale.evaluation.networks import FEATURE_NETWORKS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(("resolution", "patch", "noise_scale"), [(256, 16, 1.0), (512, 32, 2.0), (1024, 64, 4.0)])
@pytest.mark.parametrize("size", "blhg")
def test_the_papers_recipe(size: str, resolution: int, patch: int, noise_scale: float) -> None:
    config = load_config(ROOT / f"configs/jit_{size}_{resolution}.yaml")
    assert (config.model.image_size, config.model.patch_size) == (resolution, patch)
    assert config.diffusion.noise_scale == noise_scale
    assert config.data.batch_size == 1024
    assert config.ema.decays == [0.9996, 0.9998, 0.9999]
    assert config.run.max_images == 600 * 1_281_167
    assert config.model.attn_dropout == config.model.proj_dropout == (0.2 if size in "hg" else 0.0)


def test_later_sources_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1.0, beta1: 0.5}\nrun: {max_steps: 7}")
    (tmp_path / "top.yaml").write_text("defaults: [base]\noptim: {lr: 2.0}")
    config = load_config(tmp_path / "top.yaml", ["run.max_steps=9"])
    assert (config.optim.lr, config.optim.beta1, config.run.max_steps) == (2.0, 0.5, 9)


def test_all_refusals_come_in_one_message() -> None:
    overrides = [
        "optm.lr=1e-4",
        "optim.lr=fast",
        "model.image_size=250",
        "model.num_heads=7",
        "data.batch_size=1000",
        "engine.zero_stage=0",
        "nonsense",
    ]
    with pytest.raises(ConfigError) as refused:
        load_config(ROOT / "configs/jit_b_256.yaml", overrides, world_size=3)
    message = str(refused.value)
    assert "7 settings refused" in message
    for part in (
        "optm.lr=0.0001 is not a setting; did you mean optim.lr?",
        "optim.lr=fast has the wrong type",
        "model.image_size=250 must be a multiple of model.patch_size=16; for example 256",
        "model.hidden_size=768 must be a multiple of 4 x model.num_heads=7",
        "data.batch_size=1000 must be a multiple of the number of ranks, 3; for example 1002",
        "engine.zero_stage=0 works in fp32 only",
        "nonsense has no '='",
    ):
        assert part in message, part


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.depth=0", "model.depth=0 must be at least 1"),
        ("model.in_context_start=12", "must lie in [0, model.depth=12)"),
        ("model.proj_dropout=1.0", "must lie in [0, 1)"),
        ("diffusion.prediction=y", "must be one of x, e, v"),
        ("diffusion.sigma=0", "must be greater than 0"),
        ("diffusion.label_drop=0", "needs a network trained without labels too"),
        ("optim.warmup_images=-1", "must not be negative"),
        ("optim.beta2=1.0", "must lie in [0, 1)"),
        ("engine.zero_stage=4", "must be 0, 1, 2 or 3"),
        ("engine.micro_batch_size=48", "must divide a rank's share of the batch, 1024 / 1 = 1024; for example 32"),
        ("ema.decays=[0.9999,1.5]", "ema.decays=1.5 must lie in (0, 1)"),
        ("ema.decays=[0.9999,0.9999]", "names a decay twice"),
        ("ema.power_widths=[0.05,0.3]", "ema.power_widths=0.3 must lie in (0, 0.2887)"),
        ("ema.power_widths=[0.05,0.05]", "names a width twice"),
        ("ema.snapshot_every_images=1000000", "stores power averages, and ema.power_widths=[] has none"),
        ("evaluation.weights=power_0.050", "is not a weight set of this run"),
        ("ema.decays=[0.99]", "evaluation.weights=ema_0.9999 is not a weight set of this run (model, ema_0.99)"),
        ("model.num_classes=0", "guides towards a class"),
        ("evaluation.guidance_interval=[0.9,0.1]", "must be two times 0 <= low < high <= 1"),
        ("evaluation.labels=even", "must be one of balanced, random, data"),
        ("evaluation.sweep_max_share=0", "must be greater than 0"),
        ("evaluation.t_eps=0", "must be greater than 0"),
        ("evaluation.features=null", "evaluation.at_end=True needs a feature network"),
        ("run.max_images=null", "neither it nor run.max_steps"),
        ("run.seed=1.5", "has the wrong type"),
        ("model=5", "is a group of settings"),
    ],
)
def test_refusals(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(ROOT / "configs/jit_b_256.yaml", [override])
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value), "one mistake is one line"


def test_power_averages_are_weight_sets() -> None:
    overrides = ["ema.power_widths=[0.05,0.1]", "evaluation.weights=power_0.050", "ema.snapshot_every_images=1000000"]
    config = load_config(ROOT / "configs/jit_b_256.yaml", overrides)
    assert weight_set_names(config)[-2:] == ["power_0.050", "power_0.100"]
    with pytest.raises(ConfigError, match=r"ema.snapshot_every_images=0 must be greater than 0"):
        load_config(ROOT / "configs/jit_b_256.yaml", [*overrides, "ema.snapshot_every_images=0"])


def test_bf16_needs_hardware_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"engine.precision=autocast needs bfloat16.*engine.precision=fp32"):
        load_config(ROOT / "configs/jit_b_256.yaml", bf16_supported=lambda device: False)
    load_config(ROOT / "configs/jit_b_256.yaml", ["engine.precision=fp32"], bf16_supported=lambda device: False)


def test_a_bare_off_is_a_word(tmp_path: Path) -> None:
    """YAML 1.1 reads it as false."""
    (tmp_path / "quiet.yaml").write_text("tracking: {wandb: off}\nrun: {max_steps: 1}")
    assert load_config(tmp_path / "quiet.yaml").tracking.wandb == "off"
    assert load_config(ROOT / "configs/jit_b_256.yaml", ["tracking.wandb=off"]).tracking.wandb == "off"
    with pytest.raises(ConfigError, match=r"tracking.wandb=on must be one of online, offline, off"):
        load_config(ROOT / "configs/jit_b_256.yaml", ["tracking.wandb=on"])


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "loop.yaml").write_text("defaults: [loop]")
    with pytest.raises(ConfigError, match="lead back to itself"):
        load_config(tmp_path / "loop.yaml")
    (tmp_path / "orphan.yaml").write_text("defaults: [absent]")
    with pytest.raises(ConfigError, match=r"absent.yaml: no such config file \(named in the defaults of .*orphan"):
        load_config(tmp_path / "orphan.yaml")


def test_choices_match_what_exists() -> None:
    assert set(CHOICES["evaluation.more_features"]) == set(FEATURE_NETWORKS)
    with_logits = {name for name, network in FEATURE_NETWORKS.items() if network.num_logits}
    assert set(CHOICES["evaluation.features"]) == with_logits


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, jitscale.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_setting_is_read_by_some_code() -> None:
    """A key that nothing reads falsifies experiments: each must be read as `...group.key` outside config.py, or as an
    attribute of a function argument annotated with the group's class."""
    read: set[str] = set()
    groups = {"ModelConfig": "model", "DiffusionConfig": "diffusion", "OptimConfig": "optim"}
    groups |= {"EmaConfig": "ema", "EvaluationConfig": "evaluation"}
    names = set(setting_names())
    for path in (ROOT / "jitscale").rglob("*.py"):
        tree = ast.parse(path.read_text())
        if path.name == "config.py":  # what config.py itself derives for others
            functions = ("weight_set_names",)
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            annotated = {
                argument.arg: groups[ast.unparse(argument.annotation)]
                for argument in function.args.args
                if argument.annotation is not None and ast.unparse(argument.annotation) in groups
            }
            for node in ast.walk(function):
                if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                    continue
                owner = ast.unparse(node.value)
                group = annotated.get(owner, owner.rsplit(".", 1)[-1])
                # Inside the network `self.config` and `model.config` are a ModelConfig.
                read |= {f"{group}.{node.attr}"} | ({f"model.{node.attr}"} if group == "config" else set())
    assert sorted(names - read) == []
