"""tools/submit.py: the jobs that it would submit, and the mistakes that it refuses before."""

import json
import pickle
import shutil
from pathlib import Path

import pytest

from jitscale.errors import UserError
from jitscale.launch.stages import Stage, parse_chain, parse_settings
from jitscale.launch.submission import Record, parse_options
from tests.support import ROOT
from tests.support.runs import write_chain_inputs
from tools import submit
from tools.submit import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_chain_inputs(tmp_path, samples=10, steps=3)
    return tmp_path


def words(folder: Path, *more: str) -> list[str]:
    return [
        f"--config={folder / 'tiny_16.yaml'}",
        f"--run-dir={folder / 'runs' / 'tiny_16'}",
        f"--folder={folder / 'submissions'}",
        "--tasks-per-node=2",
        *more,
    ]


CHAIN = "--chain=train:16,upgrade:32,train:32"


def shards(folder: Path) -> list[str]:
    return [word for size in (16, 32) for word in ("--set", f"{size}/data.shards={folder / f'shards_{size}'}")]


def test_settings_make_variants() -> None:
    variants, at = parse_settings(["optim.lr=1e-4,2e-4", "ema.decays=[0.9,0.99]", "512/optim.lr=1e-5"])
    assert variants == {
        "_optim.lr=1e-4": ("optim.lr=1e-4", "ema.decays=[0.9,0.99]"),
        "_optim.lr=2e-4": ("optim.lr=2e-4", "ema.decays=[0.9,0.99]"),
    }
    assert at == {"512": ["optim.lr=1e-5"]}
    assert parse_settings([])[0] == {"": ()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.b=/data/a,s3://b c", {"_a.b=-data-a": ("a.b=/data/a",), "_a.b=s3-b-c": ("a.b=s3://b c",)}),
        ("a.b=/a/{0,1}.tar,/b", {"_a.b=-a-0,1-.tar": ("a.b=/a/{0,1}.tar",), "_a.b=-b": ("a.b=/b",)}),
        ("a.b=[0.9,0.99],[0.5]", {"_a.b=[0.9,0.99]": ("a.b=[0.9,0.99]",), "_a.b=[0.5]": ("a.b=[0.5]",)}),
    ],
)
def test_folders_are_named_after_values(text: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert parse_settings([text])[0] == expected


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["optim.lr=1e-4,1e-4"], "optim.lr=1e-4 occurs twice"),
        (["optim.lr=1e-4,"], "a value is empty"),
        (["optim.lr=1e-4,,2e-4"], "a value is empty"),
        (["optim.lr=1e-4", "optim.lr=2e-4"], "optim.lr is set twice"),
        (["512/optim.lr=1e-4", "512/optim.lr=2e-4"], "512/optim.lr is set twice"),
        (["data.shards=a/b,a b"], r"would both end in _data\.shards=a-b;"),
    ],
)
def test_impossible_sweeps_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_settings(texts)


def test_options_are_passed_to_sbatch() -> None:
    given = ["account=vision", "--qos=high", "exclusive", "x11", "mail-type=BEGIN,END", "comment=a=b c"]
    assert parse_options(given) == {
        "account": "vision",
        "qos": "high",
        "exclusive": True,
        "x11": True,
        "mail-type": "BEGIN,END",
        "comment": "a=b c",
    }
    for texts, message in (
        ([""], "must be a long option"),
        (["=x"], "must be a long option"),
        (["account="], "must be a long option"),
        (["N=2"], "must be a long option"),
        (["account vision"], "must be a long option"),
        (["comment=a\n#SBATCH --nodes=9"], "must be a long option"),
        (["nodes=2"], "this command sets it with --nodes"),
        (["--time=5"], "sets it with --minutes"),
        (["qos=a", "--qos=b"], "--qos is given twice"),
        (["no-requeue"], "conflicts with options that this command sets; leave it out"),
        (["--job-name=x"], "conflicts with options that this command sets"),
    ):
        with pytest.raises(UserError, match=message):
            parse_options(texts)


def test_a_chain_goes_through_resolutions(caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage("train", ROOT / "configs/jit_h_256.yaml", Path("runs/h"), ("optim.lr=1e-4",))
    stages = parse_chain("train:256,upgrade:512,train:512,evaluate", stage, {"512": ["optim.lr=1e-5"]})
    assert [s.kind for s in stages] == ["train", "upgrade", "train", "evaluate"]
    assert [s.run_dir.name for s in stages] == ["h_256", "h_512", "h_512", "h_512"]
    assert [s.config.name for s in stages] == ["jit_h_256.yaml"] + ["finetune_h_512.yaml"] * 3
    back = parse_chain("train:256,upgrade:512,train:256,train:512", stage, {})
    assert back[-1].config.name == "finetune_h_512.yaml", "it has been upgraded before"
    assert parse_chain("train:512", stage, {})[0].config.name == "jit_h_512.yaml"
    assert not caplog.records
    assert parse_chain("train:512,upgrade:1024,train", stage, {})[-1].config.name == "jit_h_1024.yaml"
    (said,) = (record.getMessage() for record in caplog.records)
    assert "there is no" in said
    assert "jit_h_1024.yaml: a whole training" in said
    assert stages[1].source == Path("runs/h_256")
    assert stages[2].overrides == ("optim.lr=1e-4", "optim.lr=1e-5")
    for chain, message in (
        ("train:256,polish", "'polish' is not a stage"),
        ("train", "the first stage needs a resolution"),
        ("train:x", "'x' is not a resolution"),
        ("upgrade:512", "needs a stage of another resolution before it"),
        ("train:256,upgrade:300", "no such config file"),
    ):
        with pytest.raises(UserError, match=message):
            parse_chain(chain, stage, {})


def test_the_dry_run_shows_the_commands_of_sbatch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [CHAIN, "--nodes=3", "--gpus-per-node=2", "--minutes=30", "--sbatch=account=vision"]
    more += ["--partition=gpu,cpu", "--sbatch", "exclusive", *shards(folder)]
    assert main(words(folder, "--dry-run", *more)) == 0
    first, upgrade, second = capsys.readouterr().out.split("#!/bin/bash")[1:]
    for line in (
        "#SBATCH --nodes=3",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --distribution=block:block",
        "#SBATCH --time=30",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --account=vision",
        "#SBATCH --partition=gpu,cpu\n",
        "#SBATCH --exclusive\n",
        "source slurm/launch.sh",
    ):
        assert line in first, line
    assert "dependency" not in first
    assert "exec " in first
    assert "#SBATCH --nodes=1" in upgrade
    assert "gpus" not in upgrade
    assert "#SBATCH --dependency=afterok:ID_OF_THE_JOB_BEFORE" in second
    assert "#SBATCH --kill-on-invalid-dep=yes" in second
    assert not (folder / "submissions").exists()


def test_mistakes_are_refused_before_a_job_is_queued(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    for more, message in (
        (["optim.leraning_rate=1"], r"optim\.leraning_rate=1 is not a setting"),
        (["data.shards=absent"], "absent"),
        ([], r"data\.shards='' is not set"),
        (["--tasks-per-node=5", f"data.shards={folder / 'shards_16'}"], r"data\.batch_size=12"),
        (["--set", "optim.lr"], "has no '='"),
        (["--set", "32/optim.lr=1e-5", f"data.shards={folder / 'shards_16'}"], "one resolution of a chain; add"),
        ([CHAIN, "--set", f"16/data.shards={folder / 'shards_16'}"], r"data\.shards='' is not set"),
        ([CHAIN, "--set", "64/optim.lr=1", *shards(folder)], "no stage of --chain .* is at 64 px"),
        (["--sbatch=nodes=2"], "sets it with --nodes"),
        (["--sbatch", "--account=x"], "begins as an option of this command; write --sbatch=--account=x"),
        (
            ["--set", "data.shards=https://a:s3cret@h/x,https://h/y?t=s3cret"],
            r"shards=https://\*\*\*@h/x: contains a secret",
        ),
        (
            [CHAIN, "--set", "16/data.held_out=https://h/y?t=s3cret"],
            r"\?t=\*\*\*: contains a secret, .* write \$\{oc\.env:NAME",
        ),
        (["data.shards=https://a:s3cret@h/${run.seed}"], r"shards=https://\*\*\*@h/\$\{run.seed\}: contains a secret"),
        (["--minutes=5"], "--signal-seconds 300: must be less than the time limit, --minutes 5"),
        ([f"--run-dir={folder / 'tiny_16.yaml' / 'run'}"], r"tiny_16\.yaml is a file, not a folder"),
        ([f"--folder={folder / 'tiny_16.yaml'}"], r"tiny_16\.yaml is a file, not a folder"),
        ([f"--run-dir={'x' * 300}"], "no folder can have this name"),
        ([f"--config={folder}"], "no such config file"),
    ):
        with pytest.raises(UserError, match=message):
            main(words(folder, "--dry-run", *more))
        assert {path.name for path in folder.iterdir()} == before, more
    (folder / "jobs").mkdir()
    for damaged in ("{", "[" * 200_000, "9" * 5000):
        (folder / "jobs/1.json").write_text(damaged)
        with pytest.raises(UserError, match=r"jobs/1\.json: is not the record of a job .*; remove it"):
            main(["status", f"--folder={folder}"])
    shutil.rmtree(folder / "jobs")
    with pytest.raises(UserError, match="no job was submitted from here"):
        main(["status", f"--folder={folder}"])


@pytest.mark.parametrize(
    ("stage", "result", "log", "state", "reason"),
    [
        ("train a_sweep=[ema=x]", ("error", "x"), "error: sweep=[ema=x] fails", "FAILED", "sweep=[ema=x] fails"),
        ("train a", ("error", "x"), "error: data.shards=[/data/x.tar]: absent", "FAILED", "=[/data/x.tar]: absent"),
        ("train new[bold] :x:", ("error", "x"), "a.B_Error: x [red]y[/]\\", "FAILED", "a.B_Error: x [red]y[/]\\"),
        ("train a", ("error", "x"), None, "FAILED", ""),
        ("train a", ("success", 0), "error: x", "COMPLETED", ""),
        ("train a", None, "error: x", "UNKNOWN", "local_result.pkl: cannot be read (EOFError)"),
    ],
)
def test_the_table_shows_texts_unchanged(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    result: object,
    log: str | None,
    state: str,
    reason: str,
) -> None:
    (tmp_path / "local_result.pkl").write_bytes(b"" if result is None else pickle.dumps(result))
    output = tmp_path / "local_log.out"
    output.mkdir() if log is None else output.write_text(f"{log}\nas said\n")
    (tmp_path / "jobs").mkdir()
    record = Record("local_x", stage, "train", str(tmp_path / "run"), None, str(output), "2026")
    (tmp_path / "jobs/local_x.json").write_text(json.dumps(vars(record)))
    # A long name of the folder must not wrap a reason.
    monkeypatch.setattr(submit, "PIPE_COLUMNS", 2000)
    assert main(["status", f"--folder={tmp_path}"]) == 0
    _, *cells, _ = (cell.strip() for cell in capsys.readouterr().out.splitlines()[3].split("│"))
    assert cells[:3] == ["local_x", stage, state]
    assert reason in cells[-1]


@pytest.mark.parametrize("option", ["--nodes", "--minutes", "--tasks-per-node", "--cpus-per-task", "--signal-seconds"])
@pytest.mark.parametrize("value", ["0", "-5", "1.5", "x", ""])
def test_numbers_are_positive(folder: Path, capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words(folder, option, value))
    assert capsys.readouterr().err == f"error: argument {option}: {value!r} is not a positive integer; see --help\n"


def test_a_refusal_of_sbatch_is_one_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = folder / "bin"
    commands.mkdir()
    refusal = "echo 'error: bad account' >&2; exit 1"
    for name, does in (("sinfo", "echo 'gpu*'; echo cpu"), ("srun", "exit 0"), ("sbatch", refusal)):
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=":")
    for partition, message in (
        ("gpu", "sbatch refused the job: error: bad account; correct"),
        ("gpu,cpu", "sbatch refused the job"),
        ("gpus", "--partition gpus: not on this cluster; choose one of cpu, gpu"),
        ("cpu,gpus,", "--partition cpu,gpus,: 'gpus', '' not on this cluster; choose one of cpu, gpu"),
    ):
        with pytest.raises(UserError, match=message):
            main(words(folder, f"--partition={partition}", f"data.shards={folder / 'shards_16'}"))


@pytest.mark.slow
def test_a_chain_on_this_machine(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real jobs train, upgrade and train on. Then a stage fails, and the chain ends with the stage's reason."""
    assert main(words(folder, "--local", f"{CHAIN},evaluate", *shards(folder))) == 0
    assert (folder / "runs/tiny_32/complete_train.json").exists()
    assert (folder / "runs/tiny_32/complete_evaluate.json").exists()
    assert capsys.readouterr().out.count("COMPLETED") == 4
    assert main(["status", f"--folder={folder / 'submissions'}"]) == 0
    assert "train tiny_32" in capsys.readouterr().out
    monkeypatch.setenv("JITSCALE_FAULTS", "kill:step=1")
    with pytest.raises(UserError, match=r"train again_16: .*its log is"):
        main([*words(folder, "--local", CHAIN, *shards(folder)), f"--run-dir={folder / 'again_16'}"])
