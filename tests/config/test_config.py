"""Configuration: composition, overrides, and all refusals."""

import ast
import math
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from jitscale.config import CHOICES, SETTINGS, Config, explained_yaml, load_config, to_yaml, weight_set_names
from jitscale.errors import ConfigError
from jitscale.evaluation.networks import FEATURE_NETWORKS
from tests.support import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
TYPES = {
    f"{group}.{name}": {kind, *get_args(kind)}
    for group, settings in vars(Config()).items()
    for name, kind in get_type_hints(type(settings)).items()
}
NUMBERS = sorted(key for key, types in TYPES.items() if types & {int, float})
# The limits are written down a second time, so that the test finds a lost or mistyped limit. One line lists all
# numbers.
LIMITS = """
none: diffusion.mu evaluation.guidance_scale model.route_blocks
one of 0, 1, 2, 3: engine.zero_stage
one of 1, 3: model.in_channels
at least 0: data.num_workers engine.activation_checkpointing evaluation.every_images evaluation.grid_every_images
at least 0: diffusion.middle_weight diffusion.rank evaluation.held_out_every_images evaluation.internal_guidance
at least 0: model.in_context_start model.middle_head run.route_until_images
at least 0: optim.grad_clip optim.warmup_images optim.weight_decay run.hang_timeout run.max_images run.max_rollbacks
at least 0: run.max_steps
at least 1: checkpoint.every_images checkpoint.keep_every_images checkpoint.keep_last data.streams
at least 1: data.window ema.snapshot_every_images engine.hpz_group_size engine.micro_batch_size evaluation.block_size
at least 1: evaluation.reference_size evaluation.sweep_keep
at least 1: progressive.images progressive.resolutions run.rollback_after tracking.log_every_steps
at least 10: evaluation.few_images evaluation.num_images evaluation.sweep_images
greater than 0: data.cache_gb diffusion.noise_scale diffusion.sigma diffusion.t_eps evaluation.sweep_max_share
greater than 0: evaluation.t_eps optim.lr optim.lr_factor_embeddings
greater than 0: optim.lr_factor_output optim.lr_factor_patch_embedding optim.lr_factor_vectors
in (0, 0.2887): ema.power_widths
in (0, 1): ema.decays
in [0, 1): data.max_bad_fraction model.attn_dropout model.proj_dropout model.route_share optim.beta1 optim.beta2
in [0, 1): optim.muon_momentum
in [0, 1]: diffusion.label_drop evaluation.guidance_interval evaluation.internal_interval
in [0.01, 100]: evaluation.time_shift
in [0, 9223372036854775807]: evaluation.seed run.seed
in [0, 131072]: model.in_context_len
in [0, 1073741824]: model.num_classes
in [1, 512]: model.depth
in [1, 10000]: evaluation.steps
in [1, 16384]: model.image_size model.patch_size model.position_grid
in [1, 131072]: model.bottleneck_dim model.hidden_size model.num_heads
in [1, 1048576]: data.batch_size
"""


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


@pytest.mark.parametrize("size", "blh")
def test_the_recipe_with_additions_differs_from_the_papers_in_them_only(size: str) -> None:
    paper, plus = (load_config(ROOT / f"configs/jit_{size}_256{recipe}.yaml") for recipe in ("", "_plus"))
    # The recipe names the other settings of the additions too, with their defaults: rank 8, blocks [2, -2].
    changed = {
        f"{group}.{name}"
        for group, settings in vars(paper).items()
        for name, value in vars(settings).items()
        if getattr(getattr(plus, group), name) != value
    }
    assert changed - {"model.attn_dropout"} == {
        *("diffusion.prediction", "model.middle_head", "model.route_share"),
        *("evaluation.method", "evaluation.t_eps", "evaluation.internal_guidance"),
        *("evaluation.guidance_scale", "evaluation.sweep", "run.route_until_images", "run.dir"),
    }
    assert ("model.attn_dropout" in changed) == (size == "h")
    assert plus.run.route_until_images == 480 * 1_281_167
    assert plus.model.middle_head == pytest.approx(plus.model.depth * 8 / 28, abs=0.5), (
        "the published blocks for a depth of 28"
    )


def test_an_explained_config_loads_and_names_every_setting(tmp_path: Path) -> None:
    config = load_config(CONFIGS[0], ["run.dir='a: b # c'", "evaluation.guide='x  y'"])
    (tmp_path / "explained.yaml").write_text(text := explained_yaml(config))
    assert load_config(tmp_path / "explained.yaml") == config
    assert all(f"\n  # {setting.described}\n" in text for setting in SETTINGS.values())


def test_later_sources_override_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("optim: {lr: 1.0, beta1: 0.5}\nrun: {max_steps: 7}")
    (tmp_path / "top.yaml").write_text("defaults: [base]\noptim: {lr: 2.0}")
    config = load_config(tmp_path / "top.yaml", ["run.max_steps=9"])
    assert (config.optim.lr, config.optim.beta1, config.run.max_steps) == (2.0, 0.5, 9)


def test_every_number_has_its_limit() -> None:
    lines = [line.rsplit(": ", 1) for line in LIMITS.strip().splitlines()]
    expected = {key: limit for limit, keys in lines for key in keys.split()}
    assert {key: SETTINGS[key].limit or "none" for key in NUMBERS} == expected


def message_of(values: dict[str, Any]) -> str:
    """The message about all `values` together."""
    written = {key: [value] if isinstance(SETTINGS[key].default, list) else value for key, value in values.items()}
    try:
        load_config(ROOT / "configs/jit_b_256.yaml", [f"{key}={value}" for key, value in written.items()])
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("outwards", [-math.inf, math.inf])
def test_every_limit_is_enforced_to_the_smallest_step(outwards: float) -> None:
    allowed, refused = {}, {}
    for key in NUMBERS:
        one = SETTINGS[key]
        excluded, included = (one.above, one.at_least) if outwards < 0 else (one.below, one.at_most)
        for limit, toward, at, beyond in (
            (excluded, -outwards, refused, allowed),
            (included, outwards, allowed, refused),
        ):
            if limit is not None:
                whole = int in TYPES[key]
                at[key] = limit if whole else float(limit)
                beyond[key] = limit + int(math.copysign(1, toward)) if whole else math.nextafter(limit, toward)
    said = message_of(refused)
    for key, value in refused.items():
        assert f"{key}={value} must be {SETTINGS[key].limit}" in said, key
    assert f"{len(refused)} settings refused" in said
    said = message_of(allowed)
    for key in allowed:
        assert f"must be {SETTINGS[key].limit}" not in said, key


def test_only_listed_choices_are_accepted() -> None:
    for nothing in ("other", 4, -1):
        said = message_of(dict.fromkeys(CHOICES, nothing))
        assert all(f"{key}={nothing} " in said for key in CHOICES)
    for index in range(max(map(len, CHOICES.values()))):
        said = message_of({key: choices[index % len(choices)] for key, choices in CHOICES.items()})
        assert "must be one of" not in said


def test_numbers_that_are_not_finite_are_refused() -> None:
    for value in (math.nan, math.inf, -math.inf):
        floats = [key for key in NUMBERS if float in TYPES[key]]
        said = message_of(dict.fromkeys(floats, value))
        assert all(f"{key}={value} must be finite" in said for key in floats)


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
        "optm.lr=1e-4 is not a setting; did you mean optim.lr?",
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
        ("model.image_size=0", "model.image_size=0 must be in [1, 16384] (pixels); the default is 256"),
        ("run.max_images=1" + "0" * 400, "has too many digits (must be below 2^63)"),
        ("model.in_context_start=12", "must be in [0, model.depth=12)"),
        (
            "model.middle_head=12",
            "must be in [0, model.depth=12): the output layer follows the last block; for example 4",
        ),
        ("model.route_share=0.999", "leaves none of the 256 tokens of an image; lower it"),
        ("model.route_share=0.001", "is less than one of the 256 tokens of an image; raise it, or set"),
        ("model.route_blocks=[2]", "must be two numbers, the first block and the end of a slice; for example [2,10]"),
        (
            "model.route_share=0.5 model.depth=4 model.in_context_len=0",
            "names no block of model.depth=4; for example [2,4]",
        ),
        ("diffusion.prediction=asym diffusion.rank=769", "must be in [0, 768], the numbers of a patch of 16 pixels"),
        ("diffusion.prediction=asym model.in_channels=1 diffusion.rank=257", "must be in [0, 256], the numbers of"),
        (
            "evaluation.internal_guidance=1.5",
            "guides away from a middle output layer, and model.middle_head=0 has none",
        ),
        ("diffusion.prediction=y", "must be one of x, e, v"),
        ("diffusion.label_drop=0", "needs a network that was also trained without labels"),
        ("engine.hpz_group_size=2", "needs ZeRO stage 3"),
        ("engine.offload_optimizer=true optim.name=muon", "does not work with Muon"),
        ("engine.offload_optimizer=true engine.zero_stage=0 engine.precision=fp32", "needs a ZeRO stage from 1 on"),
        ("engine.cuda_graphs=true engine.zero_stage=3", "ZeRO stage 3 gathers them at new ones each time; set"),
        (
            "engine.cuda_graphs=true engine.offload_optimizer=true",
            "host computes the optimizer step; set one of them",
        ),
        ("engine.micro_batch_size=48", "must divide a rank's share of the batch, 1024 / 1 = 1024; for example 32"),
        ("ema.decays=[0.9999,1.5]", "ema.decays=1.5 must be in (0, 1)"),
        ("ema.decays=[0.9999,0.9999]", "ema.decays=[0.9999, 0.9999] names 0.9999 twice; remove one"),
        ("ema.power_widths=[0.05,0.3]", "ema.power_widths=0.3 must be in (0, 0.2887); give such a"),
        ("ema.power_widths=[0.05,0.05]", "names 0.05 twice"),
        ("ema.snapshot_every_images=1000000", "stores power averages, and ema.power_widths=[] has none"),
        ("evaluation.weights=power_0.050", "is not a weight set of this run"),
        ("ema.decays=[0.99]", "evaluation.weights=ema_0.9999 is not a weight set of this run (model, ema_0.99)"),
        ("model.num_classes=0", "guides towards a class"),
        ("evaluation.guidance_interval=[0.9,0.1]", "must be two times 0 <= low < high <= 1"),
        ("evaluation.labels=even", "must be one of balanced, random, data"),
        ("evaluation.features=null", "evaluation.features=null names no feature network, and"),
        ("run.max_images=null", "run.max_images=null leaves the run without an end"),
        ("run.seed=1.5", "has the wrong type"),
        ("model=5", "is a group of settings"),
    ],
)
def test_refusals(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(ROOT / "configs/jit_b_256.yaml", override.split())
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value), "one mistake gives one line"


def test_settings_that_are_refused_at_the_start_of_a_run() -> None:
    with pytest.raises(
        ConfigError, match=r"hpz_group_size=3 must divide the 2 ranks; .*\n  data\.shards='' is not set"
    ):
        load_config(
            ROOT / "configs/jit_b_256.yaml",
            ["engine.zero_stage=3", "engine.hpz_group_size=3"],
            world_size=2,
            needs_shards=True,
        )


def test_power_averages_are_weight_sets() -> None:
    overrides = ["ema.power_widths=[0.05,0.1]", "evaluation.weights=power_0.050", "ema.snapshot_every_images=1000000"]
    config = load_config(ROOT / "configs/jit_b_256.yaml", overrides)
    assert weight_set_names(config)[-2:] == ["power_0.050", "power_0.100"]
    with pytest.raises(ConfigError, match=r"ema.snapshot_every_images=0 must be at least 1"):
        load_config(ROOT / "configs/jit_b_256.yaml", [*overrides, "ema.snapshot_every_images=0"])


def test_bf16_needs_hardware_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"engine.precision=autocast needs bfloat16.*engine.precision=fp32"):
        load_config(ROOT / "configs/jit_b_256.yaml", bf16_supported=lambda device: False)
    load_config(ROOT / "configs/jit_b_256.yaml", ["engine.precision=fp32"], bf16_supported=lambda device: False)


def test_a_bare_off_is_read_as_a_word(tmp_path: Path) -> None:
    """YAML 1.1 reads a bare `off` as false."""
    (tmp_path / "quiet.yaml").write_text("tracking: {wandb: off}\nrun: {max_steps: 1}")
    assert load_config(tmp_path / "quiet.yaml").tracking.wandb == "off"
    assert load_config(ROOT / "configs/jit_b_256.yaml", ["tracking.wandb=off"]).tracking.wandb == "off"
    with pytest.raises(ConfigError, match=r"tracking.wandb=on must be one of online, offline, off"):
        load_config(ROOT / "configs/jit_b_256.yaml", ["tracking.wandb=on"])


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        load_config(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("model: [unclosed")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "loop.yaml").write_text("defaults: [loop]")
    with pytest.raises(ConfigError, match="lead back to this file"):
        load_config(tmp_path / "loop.yaml")
    (tmp_path / "orphan.yaml").write_text("defaults: [absent]")
    with pytest.raises(ConfigError, match=r"absent.yaml: no such config file \(named in the defaults of .*orphan"):
        load_config(tmp_path / "orphan.yaml")


def test_choices_match_the_implementations() -> None:
    assert set(CHOICES["evaluation.more_features"]) == set(FEATURE_NETWORKS)
    assert set(CHOICES["evaluation.features"]) == {*FEATURE_NETWORKS, "auto"}


def test_importing_config_does_not_import_torch() -> None:
    code = "import sys, jitscale.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_setting_is_read_by_some_code() -> None:
    """A setting without a reader falsifies experiments. Each one must be read outside config/, in one of two ways:

    as `...group.key`, or as an attribute of a name that stands for the group (an argument annotated with its class,
    or a variable that was assigned the group).
    """
    read: set[str] = set()
    groups = {"ModelConfig": "model", "DiffusionConfig": "diffusion", "OptimConfig": "optim"}
    groups |= {"EmaConfig": "ema", "EvaluationConfig": "evaluation"}
    for path in (ROOT / "jitscale").rglob("*.py"):
        tree = ast.parse(path.read_text())
        # shapes.py derives numbers for other modules, so it counts as a reader.
        if path.parent.name == "config" and path.name != "shapes.py":
            functions = ("weight_set_names",)
            tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in functions]
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            annotated = {
                argument.arg: groups[ast.unparse(argument.annotation)]
                for argument in function.args.args
                if argument.annotation is not None and ast.unparse(argument.annotation) in groups
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                    annotated |= {ast.unparse(target): node.value.attr for target in node.targets}
                if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)):
                    continue
                owner = ast.unparse(node.value)
                group = annotated.get(owner, owner.rsplit(".", 1)[-1])
                # Inside the network `self.config` and `model.config` are a ModelConfig.
                read |= {f"{group}.{node.attr}"} | ({f"model.{node.attr}"} if group == "config" else set())
    assert sorted(SETTINGS.keys() - read) == []
