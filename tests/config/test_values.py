"""How texts and YAML values become settings. Which interpolations are evaluated. What stored settings may contain."""

from pathlib import Path

import pytest

from jitscale.command import evaluate_parser, path_text
from jitscale.config import SETTINGS, Config, RunConfig, TrackingConfig, from_dict, load_config, to_dict, to_yaml
from jitscale.config.values import TEXTS as TEXT_SETTINGS
from jitscale.errors import ConfigError

WORDS = """2026_11_23 007 0123 1e3 12:30:45 on off yes 0x10 1. 1.10 1_000 2026-11-23 true Null .nan -1 = <<
{a,b}/0.tar /x/{000..007}.tar [a a: - 'quoted' "quoted" #1 &a *a !a %a @a `a a\\b é\u3000x \U0001f600"""
TEXTS = [*WORDS.split(), "/data/x #1", "a: b # c", " led", "trailed ", "x  y", "word " * 60, "a\u00a0b\u2028c"]
EVALUATED = ["${oc.env:HOME}", "a/${model.depth}", "${", r"\${a}", r"\\${", "${oc.create:x}", "$${}", "${a} ${b"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A configuration file of a user."""
    (tmp_path / "own.yaml").write_text("run: {max_steps: 1}")
    return tmp_path / "own.yaml"


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_config(path, overrides)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_text_after_the_equals_sign_is_taken_literally(own: Path) -> None:
    for text in TEXTS:
        config = load_config(own, [f"run.dir={text}", f"tracking.name={text}", f"data.shards={text}"])
        assert (config.run.dir, config.tracking.name, config.data.shards) == (text, text, text)
    config = load_config(own, ["tracking.name=null", "run.dir=null", "evaluation.sweep=null"])
    assert (config.tracking.name, config.run.dir, config.evaluation.sweep) == (None, "null", None)
    assert load_config(own, ['evaluation.sweep=["007", on, 1e3, null]']).evaluation.sweep == [
        "007",
        "on",
        "1e3",
        "null",
    ]


@pytest.mark.parametrize("text", TEXTS + EVALUATED)
def test_every_text_survives_a_round_trip_through_a_file(text: str, own: Path) -> None:
    config = Config(run=RunConfig(dir=text, max_steps=1), tracking=TrackingConfig(name=text))
    config.evaluation.sweep = [text]
    own.write_text(to_yaml(config))
    assert load_config(own) == load_config(own, stored=True) == from_dict(to_dict(config)) == config


@pytest.mark.parametrize(
    ("written", "seen"),
    [
        ("2026_11_23", "20261123 has the wrong type (YAML reads a number"),
        ("007", "7 has the wrong type (YAML reads a number"),
        ("0x10", "16 has the wrong type (YAML reads a number"),
        ("12:30:45", "45045 has the wrong type (YAML reads a number"),
        ("1.10", "1.1 has the wrong type (YAML reads a number"),
        ("on", "true has the wrong type (YAML reads true or false"),
        ("", "null has the wrong type (YAML reads null"),
        ("[a]", "['a'] has the wrong type (YAML reads a structure"),
    ],
)
def test_a_file_must_quote_texts_that_yaml_reads_as_another_type(written: str, seen: str, own: Path) -> None:
    own.write_text(f"run: {{max_steps: 1, dir: {written}}}")
    assert refusal(own).endswith(f"run.dir={seen} here, not text); quote it, as in dir: '...'")
    own.write_text(f"run: {{max_steps: 1, dir: '{written or 'x'}'}}")
    assert load_config(own).run.dir == (written or "x")


def test_numbers_and_words_of_files_and_the_command_line(own: Path) -> None:
    own.write_text(
        "optim: {lr: 1e-4}\r\ndata: {flip: off, batch_size: 128}\r\nrun: {dir: 2026-11-23, max_steps: 5}\r\n"
    )
    config = load_config(own)
    found = config.optim.lr, config.data.flip, config.data.batch_size, config.run.dir
    assert found == (1e-4, False, 128, "2026-11-23")
    config = load_config(own, ["data.batch_size=1_000", "data.flip=yes", "ema.decays=[0.9, 0.9999]", "optim.lr=1"])
    assert load_config(own, ["run.seed=0", "optim.beta1=0.0", "optim.weight_decay=0e5"]).run.seed == 0
    assert (config.data.batch_size, config.data.flip, config.ema.decays) == (1000, True, [0.9, 0.9999])
    assert isinstance(config.optim.lr, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("run.dir=", "run.dir='' is empty; the default is runs/jit"),
        ("tracking.name=", "tracking.name='' is empty; give such a value, or null for none"),
        ("run.max_steps=", "run.max_steps='' is empty"),
        ("optim.lr=", "optim.lr='' is empty; the default is 0.0002"),
        ("run.max_images=1e6", "(not an integer); write 1000000"),
        ("data.batch_size=12.5", "(not an integer); the default is 1024"),
        ("data.batch_size=true", "(not an integer)"),
        ("data.flip=2", "(neither true nor false); the default is true"),
        ("optim.lr=true", "(not a number)"),
        ("data.batch_size=0064", "data.batch_size=0064 is not a decimal number; write 64"),
        ("run.seed=-010", "write -10"),
        ("run.seed=08", "write 8"),
        ("data.batch_size=0b100", "write 4"),
        ("data.batch_size=0x10", "write 16"),
        ("optim.lr=1:30", "optim.lr=1:30 is not a decimal number; the default is 0.0002"),
        ("run.max_images=1:30", "is not a decimal number"),
        ("progressive.resolutions=[064,128]", "has 064, which is not a decimal number; write 64"),
        ("run.seed=0" + "1" * 5000, "is not a decimal number; the default is 0"),
        ("engine.compile=2", "(neither true nor false)"),
        ("evaluation.sweep=ema=averages", "(not a list); write [ema=averages]"),
        ("ema.decays=0.999", "(not a list); write [0.999]"),
        ("ema.decays=[0.999", "cannot be read (while parsing a flow sequence)"),
        ("ema.decays=[[0.9]]", "ema.decays=[[...]] has the wrong type (a structure)"),
        ("run.dir=a\nb", "has control characters or bytes that are not UTF-8; remove them"),
        ("run.dir=a\udcff", "has control characters or bytes that are not UTF-8; remove them"),
        ("run.dir=~nobody-at-all/x", "begins with ~nobody-at-all, and there is no such user"),
    ],
)
def test_refused_values(override: str, expected: str, own: Path) -> None:
    assert expected in refusal(own, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("optim.leraning_rate=1", "did you mean optim.lr?"),
        ("lr=1", "did you mean optim.lr?"),
        ("optim.wd=1", "did you mean optim.weight_decay?"),
        ("optim.warmup=1", "did you mean optim.warmup_images?"),
        ("optim.batch_size=1", "did you mean data.batch_size?"),
        ("train.epochs=1", "did you mean run.max_images?"),
        ("model.n_layers=1", "did you mean model.depth?"),
        ("model.numHeads=1", "did you mean model.num_heads?"),
        ("evaluation.cfg=1", "did you mean evaluation.guidance_scale?"),
        ("checkpoint.every=1", "did you mean checkpoint.every_images?"),
        ("diffusion.probability=1", "did you mean diffusion.label_drop?"),  # The hint goes by the meaning of the word.
        ("optm.lr=1", "did you mean optim.lr?"),
        ("evaluation.dinov2=1", "did you mean evaluation.more_features?"),
        ("evaluation.fid=1", "did you mean evaluation.features?"),
        ("evaluation.sampler=1", "did you mean evaluation.method?"),
        ("diffusion.P_std=1", "did you mean diffusion.sigma?"),
        ("diffusion.steps=1", "did you mean evaluation.steps?"),
        ("optim.grad_accum=1", "did you mean engine.micro_batch_size?"),
        ("optim.min_lr=1", "optim has name, muon_momentum,"),
        ("optim.eps=1", "optim has name, muon_momentum,"),
        ("evaluation.batch=1", "evaluation has weights, method,"),
        ("engine.compile_mode=1", "engine has zero_stage,"),
        ("1=2", "the groups are model, diffusion, data,"),
        ("=2", "the groups are model, diffusion, data,"),
        ("foo.bar=1", "the groups are model, diffusion, data,"),
        ("checkpoint.xyz=1", "checkpoint has every_images, keep_last, keep_every_images, asynchronous"),
        ("optim.lr", "optim.lr has no '='; write optim.lr=VALUE"),
        ("model=b", "is a group of settings; write model.NAME=value"),
        ("evaluation.more_features=[auto]", "write evaluation.features=auto (feature network of FID"),
        ("evaluation.features=other", "give such a value, or null for none"),
    ],
)
def test_unknown_settings_get_a_hint(override: str, expected: str, own: Path) -> None:
    assert expected in refusal(own, override)


def test_home_folders_are_expanded_in_every_path(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    paths = [key for key, setting in SETTINGS.items() if setting.path]
    assert len(paths) == 11
    others = {"evaluation.weights", "evaluation.guide_weights", "run.init_weights", "tracking.project", "tracking.name"}
    free = {key for key in TEXT_SETTINGS if not SETTINGS[key].choices}
    assert free == {*paths, *others}, "each new text setting must state whether it is a path"
    config = load_config(own, [f"{key}=~/x/{{a,b}}.tar" for key in paths])
    for key in paths:
        group, name = key.split(".")
        assert getattr(getattr(config, group), name) == "/home/me/x/{a,b}.tar"
    assert load_config(own, ["tracking.name=~/x", "data.shards=/a/~/b"]).tracking.name == "~/x"
    (own.parent / "top.yaml").write_text("defaults: [~/base]")
    assert "/home/me/base.yaml: no such config file" in refusal(own.parent / "top.yaml")
    options = evaluate_parser().parse_args(["--checkpoint=~/a", "--config", "~root/b"])
    assert (options.checkpoint, options.config) == (Path("/home/me/a"), Path("~root/b").expanduser())
    assert (path_text("~/a*.tar"), path_text("s3://a/~b")) == ("/home/me/a*.tar", "s3://a/~b")
    with pytest.raises(SystemExit):
        evaluate_parser().parse_args(["--run", "~nobody-at-all/x"])
    assert "argument --run/--run-dir: '~nobody-at-all/x' begins with ~nobody-at-all, and" in capsys.readouterr().err


def test_interpolation_sees_defaults_and_the_environment(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_CACHE", "/scratch")
    monkeypatch.setenv("OWN_STEPS", "7")
    own.write_text(
        'data: {shards: "/data/${model.image_size}", cache_dir: "${oc.env:OWN_CACHE}"}\n'
        'run: {max_steps: "${oc.env:OWN_STEPS}", dir: "runs/${model.num_classes}_${optim.lr}"}\n'
        'evaluation: {reference_size: "${model.image_size}", cache_dir: "${oc.env:OWN_OTHER,null}"}\n'
    )
    config = load_config(own)
    assert (config.data.shards, config.data.cache_dir) == ("/data/256", "/scratch")
    assert (config.run.max_steps, config.run.dir) == (7, "runs/1000_0.0002")
    assert (config.evaluation.reference_size, config.evaluation.cache_dir) == (256, None)
    config = load_config(own, ["model.image_size=64", "run.dir=${data.shards}/${tracking.project}"])
    assert (config.data.shards, config.run.dir) == ("/data/64", "/data/64/jitscale")
    monkeypatch.setenv("OWN_CACHE", "${model.depth}")
    assert load_config(own).data.cache_dir == "${model.depth}", "the result of an interpolation is not evaluated again"
    monkeypatch.delenv("OWN_CACHE")
    assert "Environment variable 'OWN_CACHE' not found" in refusal(own)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${oc.create:x}", "has ${oc.create:...}, which is not evaluated; write"),
        ("${oc.decode:1}", "has ${oc.decode:...}, which is not evaluated"),
        ("${model}", "has the wrong type (a structure)"),
        ("???", "has the text ???, which stands for a missing value; choose another"),
        ("${oc.env:${run.dir}}", "cannot be evaluated (Recursive interpolation detected)"),
        ("a${", "cannot be evaluated (no viable alternative at input"),
        ("${run.dir}", "cannot be evaluated (Recursive interpolation detected)"),
    ],
)
def test_no_other_interpolation_is_evaluated(text: str, expected: str, own: Path) -> None:
    assert expected in refusal(own, f"run.dir={text}")


@pytest.mark.parametrize("beside", ["checkpoints", "index.json", "model.safetensors"])
def test_interpolations_in_a_stored_configuration_are_not_evaluated(
    beside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", "secret-of-mine")
    stored = tmp_path / "config.yaml"
    for content, expected in (
        ("data: {shards: 'https://a/${oc.env:TOKEN}'}", "data.shards=https://a/${oc.env:TOKEN} has an interpolation"),
        (
            "evaluation: {sweep: ['${model.depth}']}",
            "has an interpolation, but a run has written this file, so",
        ),
        ("defaults: [../other]", "has defaults, ['../other'], but a run has written this file"),
        ("defaults: /etc/x", "has defaults, /etc/x, but a run has written this file"),
    ):
        stored.write_text(f"run: {{max_steps: 1}}\n{content}")
        with pytest.raises(ConfigError) as refused:
            load_config(stored, stored=True)
        assert expected in str(refused.value)
        assert "secret-of-mine" not in str(refused.value)
        (tmp_path / beside).touch()
        assert expected in refusal(stored), "no caller has to ask for it"
        (tmp_path / beside).unlink()
    stored.write_text("data: {shards: '${oc.env:TOKEN}'}\nrun: {max_steps: 1}")
    assert load_config(stored).data.shards == "secret-of-mine", "a user's own file may have this name"


def test_interpolations_in_a_described_network_are_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for config.json of Hugging Face and for the metadata of .safetensors."""
    monkeypatch.setenv("TOKEN", "secret-of-mine")
    assert from_dict({"run": {"dir": "${oc.env:TOKEN}"}}).run.dir == "${oc.env:TOKEN}"
    for values, expected in (
        ({"model": {"depth": "${oc.env:TOKEN}"}}, r"model.depth=\$\{oc.env:TOKEN\} has the wrong type"),
        ({"model": {"depths": 2}}, "model.depths=2 is not a setting; did you mean model.depth?"),
        ({"model": 5}, "model=5 is a group of settings"),
    ):
        with pytest.raises(ConfigError, match=expected):
            from_dict(values)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: {max_steps: 1, max_steps: 2}", "found duplicate key max_steps"),
        (b"run: {max_steps: 1}\nrun: {dir: a}", "found duplicate key run"),
        (b"run: {\xff: 1}", "cannot be read as YAML"),
        (b"run: " + b"[" * 5000, "cannot be read as YAML"),
        (b"run: {max_steps: 1" + b"0" * 5000 + b"}", "cannot be read as YAML"),
        (b"run: {seed: 1" + b"0" * 400 + b"}", "must be in [0, 9223372036854775807]"),
        (b"optim: {lr: 1" + b"0" * 400 + b"}", "has the wrong type (not a number)"),
        (b"data: {batch_size: 0064}", "a.yaml: data.batch_size=0064 is not a decimal number; write 64"),
        (
            b"progressive: {resolutions: [064, 128]}",
            "progressive.resolutions=[...] has 064, which is not a decimal",
        ),
        (b"run: {seed: 0" + b"1" * 5000 + b"}", "is not a decimal number; the default is 0"),
        (b"run: {dir: 0" + b"1" * 5000 + b"}", "has the wrong type (YAML reads a number here, not text)"),
        (b"5", "cannot be read as YAML: Invalid loaded object type: int"),
        (b"- 5", "found a list"),
        (b"1: 2", "1=2 is not a setting"),
        (b"model: {depth: {a: 1}}", "model.depth={...} has the wrong type"),
        (b"a: &a [x]\nb: &b [*a,*a]\nmodel: {depth: [*b,*b]}", "has the wrong type (a structure)"),
        (b"defaults: x", "defaults: x is not a list"),
        (b"defaults: [5]", "is not the name of a file"),
        (b"defaults: ['']", "is not the name of a file"),
        (b"#" * 2**21, "has more than 1048576 bytes"),
    ],
)
def test_files_that_are_not_a_configuration_are_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "a.yaml", ["run.max_images=1"])
    assert expected in str(refused.value)
