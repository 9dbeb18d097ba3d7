"""The decisions of a job, and the facts it reads from Slurm's messages."""

import errno
import itertools
import os
import re
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wandb

from jitscale import parallel
from jitscale.config import Config, RunConfig, load_config
from jitscale.errors import CheckpointError, ConfigError, ExitCode, UserError
from jitscale.launch import preflight
from jitscale.launch.preflight import Fault, Finding, compare, faults_of, mistakes
from jitscale.launch.slurm import SlurmJob, failed_tasks
from jitscale.launch.supervisor import Supervisor, Work, work_of
from jitscale.run_folder import Attempts, forget_completion, is_complete, is_complete_under, mark_complete
from tests.support import ROOT
from tools.make_shards import parser as packing_parser


@pytest.fixture
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipes record online, and this machine has no key for W&B."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()  # wandb caches the environment of an earlier test.
    yield
    wandb.teardown()


def test_starts_without_progress_are_counted(tmp_path: Path) -> None:
    for position in (0, 10, 10, 20, 20, 20):
        attempts = Attempts.begin(tmp_path, position, most=3)
        attempts.last_reason = "a rank died"
        attempts.write(tmp_path)
    assert (attempts.starts, attempts.without_progress) == (6, 2)
    with pytest.raises(UserError, match=r"3 starts in a row brought no progress beyond 20 \(a rank died\)"):
        Attempts.begin(tmp_path, 20, most=3)
    assert Attempts.begin(tmp_path, 20, most=3).without_progress == 0  # A manual restart resets the count.


def test_each_node_is_excluded_once() -> None:
    attempts = Attempts()
    assert attempts.exclude(["b", "a", "b"]) == ["b", "a"]
    assert attempts.exclude(["a", "c"]) == ["c"]
    assert attempts.excluded == ["b", "a", "c"]


def test_the_first_node_that_srun_names_is_the_failed_one() -> None:
    text = (
        "train: 10%\n"
        "srun: error: node-2.site: task 3: Killed\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=7.1\n"
        "slurmstepd: error: *** STEP 7.1 ON node-1 CANCELLED ***\n"
        "srun: error: node-1: tasks 0-1: Terminated\n"
        "srun: error: node-3: tasks 4,6: Exited with exit code 1\n"
    )
    assert failed_tasks(text) == ["node-2.site", "node-3"]
    assert failed_tasks("") == []


def test_a_task_of_an_array_is_distinguished_from_the_array(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"JOB_ID": "17", "JOB_NODELIST": "n[1-2]", "JOB_PARTITION": "gpu", "NTASKS": "4", "RESTART_COUNT": "2"}
    for name, value in script.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert SlurmJob.current() == SlurmJob("17", ("n1", "n2"), 4, 2, "gpu")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert SlurmJob.current().id == "17_3"


def test_differences_between_ranks_are_reported() -> None:
    sound = Finding("a", (), "code", "config", "cuda")
    assert compare([sound, sound]) == []
    broken = replace(sound, node="b", faults=(Fault("/scratch: full"),))
    assert compare([sound, broken]) == [("b", "/scratch: full")]
    other = compare([sound, sound, Finding("c", (), "old", "config", "cuda")])
    assert [(node, what.split(" than")[0]) for node, what in other] == [("c", "another code")]
    other = compare([sound, sound, Finding("c", (), "code", "config", "cpu")])
    assert [(node, what.split(" than")[0]) for node, what in other] == [("c", "another kind of device (cuda or cpu)")]


def test_a_fault_of_one_node_is_not_a_user_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message about a full disk names a temporary file with a random name.

    In a job of one node all ranks report it.
    """

    def full(**named: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{named['dir']}/.preflight{next(numbers)}")

    numbers = itertools.count()
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", full)
    config = load_config(ROOT / "configs/jit_b_256.yaml", [f"run.dir={tmp_path}", "run.device=cpu"])
    found = [faults_of(config) for _ in range(2)]
    assert found[0] == found[1]
    assert "No space left on device" in found[0][0].message
    alone = [Finding("a", faults, "code", "config", "cpu") for faults in found]
    assert mistakes(alone) == []
    assert compare(alone) == [("a", fault.message) for fault in found[0]]
    everywhere = [alone[0], replace(alone[1], node="b")]
    assert mistakes(everywhere) == [found[0][0].message]
    assert mistakes([alone[0], Finding("b", (), "code", "config", "cpu")]) == []


@pytest.mark.parametrize("where", ["folders", "shards"])
def test_failing_storage_on_all_nodes_is_neither_a_user_mistake_nor_a_node_fault(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The supervisor requeues the job and excludes no node. If only some nodes report the fault, it excludes them."""

    def fail(*arguments: object, **named: object) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def two_nodes(finding: Finding) -> list[Finding]:
        return [replace(finding, node="a"), replace(finding, node="b", faults=finding.faults if everywhere else ())]

    def said() -> str:
        assert preflight.main(command) == ExitCode.FAILED
        return capsys.readouterr().out

    command = ["--config", str(ROOT / "configs/jit_b_256.yaml"), f"run.dir={tmp_path}", "run.device=cpu"]
    monkeypatch.setenv("JITSCALE_PREFLIGHT_SECONDS", "1")
    if where == "folders":
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", fail)
    else:
        (tmp_path / "a.tar").touch()
        command.append(f"data.shards={tmp_path}/a.tar")
        monkeypatch.setattr("jitscale.data.tar_index._read_members", fail)
    monkeypatch.setattr(preflight, "_rendezvous", lambda *arguments: object())
    monkeypatch.setattr(preflight.dist, "init_process_group", lambda *arguments, **named: None)
    monkeypatch.setattr(parallel, "gather_objects", two_nodes)
    everywhere = True
    assert said().startswith(f"preflight: all nodes: {tmp_path}")
    everywhere = False
    assert said().startswith(f"preflight: node a: {tmp_path}")


def test_the_preflight_names_the_nodes_to_exclude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work, job = Work("train", [], Config(run=RunConfig(dir=str(tmp_path))), [], is_done=False), ("n1", "n2")
    monkeypatch.setattr("jitscale.launch.supervisor.check_commands", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(Supervisor, "_again", lambda self, reason, nodes: nodes)
    srun = "srun: error: n1: task 0: Exited with exit code 1\n"
    for line, nodes in (("preflight: all nodes: x", []), ("preflight: node n2: x", ["n2"]), ("x", ["n1"])):
        monkeypatch.setattr(
            Supervisor, "_srun", lambda *given, line=line, **named: (ExitCode.FAILED, f"{line}\n{srun}")
        )
        assert Supervisor(SlurmJob("7", job, 2, 0, "batch"), work).run() == nodes


def test_missing_shards_are_a_user_mistake_on_one_node_too(tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}", "run.device=cpu", f"data.shards={tmp_path}/absent"]
    faults = faults_of(load_config(ROOT / "configs/demo.yaml", settings))
    found = mistakes([Finding("a", faults, "code", "config", "cpu")])
    assert len(found) == 1
    assert "absent" in found[0]


def test_the_command_line_determines_the_work(
    tmp_path: Path, wandb_offline: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ROOT / "configs/jit_b_256.yaml"
    words = ["--config", str(config), f"run.dir={tmp_path}", "data.shards=/data"]
    work = work_of("train", words, tasks=8)
    assert (work.run_dir, work.progress_mark) == (tmp_path, 0)
    assert work.preflight_arguments == [
        "--work",
        "train",
        "--config",
        str(config),
        f"run.dir={tmp_path}",
        "data.shards=/data",
    ]
    with pytest.raises(ConfigError, match=r"data\.batch_size=1024"):
        work_of("train", words, tasks=7)
    with pytest.raises(SystemExit, match="2"):
        work_of("train", [], tasks=8)
    assert "required: --config" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="no run there"):
        work_of("evaluate", ["--run", str(tmp_path)], tasks=8)
    (tmp_path / "config.yaml").write_text(f"run: {{dir: {tmp_path}, max_steps: 1}}")
    (tmp_path / "evaluation/samples_1").mkdir(parents=True)
    (tmp_path / "evaluation/samples_1/block_000000.npz").write_bytes(b"")
    work = work_of("evaluate", ["--run", str(tmp_path), "--weights", "model", "evaluation.steps=3"], tasks=7)
    assert (work.run_dir, work.progress_mark) == (tmp_path, 1)
    assert "model" not in work.preflight_arguments
    work = work_of("evaluate", ["--checkpoint", "theirs.pth", "--config", str(config), f"run.dir={tmp_path}"], tasks=7)
    assert work.run_dir == tmp_path


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("evaluate", [], "evaluate needs --run RUN, or --checkpoint FILE with --config FILE$"),
        ("evaluate", ["runs/h"], "evaluate needs .*; write --run runs/h$"),
        ("evaluate", ["--config", "configs/jit_b_256.yaml"], "evaluate needs --run"),
        ("evaluate", ["--checkpoint", "theirs.pth", "evaluation.steps=3"], "evaluate needs --run"),
        ("evaluate", ["--run-dir", "runs/absent"], "runs/absent: no run there"),
        ("train", ["--config", "configs/jit_b_256.yaml", "runs/h", "data.shards=/data"], "runs/h has no '='"),
    ],
)
def test_wrong_arguments_are_refused(command: str, arguments: list[str], said: str) -> None:
    """The same rule holds for `sbatch slurm/evaluate.sh runs/h`."""
    with pytest.raises(UserError, match=said) as refused:
        work_of(command, arguments, tasks=8)
    assert "\n" not in str(refused.value)


def in_one_line(text: str) -> str:
    """`text` with each command in one line. Continued lines are joined, inside and outside of comments."""
    return re.sub(r" \\\n#? *", " ", text)


EXAMPLES = [
    (path.name, line)
    for path in [*sorted((ROOT / "slurm").glob("*.sh")), ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for line in re.findall(
        r"^(?:#.*?)?sbatch (?:--\S+ )*slurm/(\S+\.sh .*?)(?: +#.*| \[.*)?$", in_one_line(path.read_text()), re.MULTILINE
    )
]


@pytest.mark.parametrize(("where", "line"), EXAMPLES)
def test_the_examples_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb_offline: None, where: str, line: str
) -> None:
    """These are the commands in the scripts' headers, README and docs, with the number of nodes of the script."""
    monkeypatch.chdir(tmp_path)  # The examples name runs in this folder.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    name, *words = shlex.split(line)
    script = (ROOT / "slurm" / name).read_text()
    if name == "pack_shards.sh":
        packing_parser().parse_args(words)
        return
    command, given = re.findall(r'^supervise (train|evaluate) (.*)"\$@"$', script, re.MULTILINE)[0]
    tasks = int(re.findall(r"--nodes=(\d+)", script)[0]) * int(re.findall(r"--ntasks-per-node=(\d+)", script)[0])
    if name == "upgrade_and_finetune.sh":
        low, config, new, *words = words
        given = given.replace('"$config"', config).replace('"run.dir=$new"', f"run.dir={new}")
        assert '--checkpoint "$low" --to "$config" --output "$new"' in script
        assert low != new
    if command == "evaluate":
        run = tmp_path / words[words.index("--run") + 1]
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"run: {{dir: {run}, max_steps: 1}}")
    work_of(command, [*given.split(), *words], tasks)


@pytest.mark.parametrize("name", ["new[1]", "new *", "plain"])
def test_a_requeued_upgrade_continues_from_existing_output(tmp_path: Path, name: str) -> None:
    """The name of the run's folder may contain special characters."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/launch.sh").write_text("set -euo pipefail\nsupervise() { echo supervise; }\n")
    environment = {**os.environ, "JITSCALE_HOME": str(tmp_path), "JITSCALE_PYTHON": "echo"}
    command = ["bash", str(ROOT / "slurm/upgrade_and_finetune.sh"), "low", "config", name]

    def said() -> list[str]:
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return [line.split()[0] for line in finished.stdout.splitlines()]

    (tmp_path / "new1/checkpoints/step_00000000").mkdir(parents=True)
    (tmp_path / "new1/checkpoints/step_00000000/COMPLETE").touch()
    assert said() == ["tools/upgrade_resolution.py", "supervise"]
    (tmp_path / name / "checkpoints/step_00000000").mkdir(parents=True)
    assert said() == ["tools/upgrade_resolution.py", "supervise"], "the checkpoint is not complete"
    (tmp_path / name / "checkpoints/step_00000000/COMPLETE").touch()
    assert said() == ["supervise"]


def test_ctrl_c_in_the_ranks_ends_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is not requeued, and no node is excluded."""
    job = SlurmJob("7", ("node1",), 1, 0, "batch")
    work = Work("train", [], Config(run=RunConfig(dir=str(tmp_path))), [], is_done=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)}
    monkeypatch.setattr("jitscale.launch.supervisor.check_commands", lambda: None)
    monkeypatch.setattr(
        Supervisor,
        "_srun",
        lambda self, what, *others, **more: (
            ExitCode.INTERRUPTED if what == "train" else 0,
            "srun: error: node1: task 0: Exit",
        ),
    )
    try:
        assert Supervisor(job, work).run() == ExitCode.INTERRUPTED
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert Attempts.read(tmp_path).excluded == []


@pytest.mark.parametrize(("code", "ends_with"), [(ExitCode.FAILED, 99), (ExitCode.USER_ERROR, ExitCode.USER_ERROR)])
def test_failing_storage_requeues_the_job_and_a_mistake_does_not(
    code: int, ends_with: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Work("train", [], Config(run=RunConfig(dir=str(tmp_path))), [], is_done=False)
    monkeypatch.setattr("jitscale.launch.supervisor.check_commands", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(Supervisor, "_srun", lambda self, what, *others, **more: (code if what == "train" else 0, ""))
    monkeypatch.setattr(Supervisor, "_again", lambda self, reason, nodes: 99)
    assert Supervisor(SlurmJob("7", ("node1",), 1, 0, "batch"), work).run() == ends_with


def test_every_script_has_an_example() -> None:
    scripts = {path.name for path in (ROOT / "slurm").glob("*.sh")} - {"launch.sh"}
    assert {line.split()[0] for where, line in EXAMPLES if where in scripts} == scripts


def test_the_cores_of_a_rank_are_near_its_gpu() -> None:
    """This holds for every script with GPUs, unless the sbatch command overrides it."""
    texts = [path.read_text() for path in (ROOT / "slurm").glob("*.sh")]
    expected = ["\n#SBATCH --gpus-per-node" in text for text in texts]
    assert ["\n#SBATCH --distribution=block:block\n" in text for text in texts] == expected


def test_launch_names_folders_on_the_node_and_interfaces(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "TMPDIR": str(tmp_path), "JITSCALE_PYTHON": "echo", "GLOO_SOCKET_IFNAME": "ib0"}
    bare = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "USER": "me"}
    command = ["bash", "-c", "source slurm/launch.sh; supervise train"]
    said = subprocess.run(command, cwd=ROOT, env={**bare, **job}, capture_output=True, text=True, check=True).stdout
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    assert f"TRITON_CACHE_DIR={tmp_path}/jitscale-cache-{user}/triton" in said
    assert f"TORCHINDUCTOR_CACHE_DIR={tmp_path}/jitscale-cache-{user}/inductor" in said
    assert "SLURM_CPU_BIND=cores" in said
    assert "GLOO_SOCKET_IFNAME=ib0" in said


def test_a_missing_key_of_wandb_is_reported_before_the_preflight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    wandb.teardown()
    words = ["--config", str(ROOT / "configs/jit_b_256.yaml"), f"run.dir={tmp_path}", "data.shards=/data"]
    with pytest.raises(UserError, match=r"tracking\.wandb=online: no API key"):
        work_of("train", words, tasks=8)
    work_of("train", [*words, "tracking.wandb=offline"], tasks=8)
    monkeypatch.setenv("JITSCALE_RANK_PYTHON", "in_a_container.sh")
    work_of("train", words, tasks=8)


def test_progress_on_real_images_is_counted_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics grow next to the shards, however that path is written, or in the configured cache."""
    config = str(ROOT / "configs/demo.yaml")
    for setting, folder in (
        (f"data.shards={tmp_path}/shards", "shards"),
        (f"data.shards={tmp_path}/of_{{resolution}}/shard-{{000..007}}.tar", "of_32"),
        (f"data.shards={tmp_path}/some/*.tar", "some"),
        (f"evaluation.reference={tmp_path}/real", "real"),
        (f"evaluation.cache_dir={tmp_path}/asked", "asked"),
    ):
        work = work_of("train", ["--config", config, f"run.dir={tmp_path}/run", "data.shards=/data", setting], tasks=1)
        place = tmp_path / folder / ("digits_0" if folder == "asked" else "real_images/digits_0")
        place.mkdir(parents=True)
        before = work.progress_mark
        (place / "part_000.npz").write_bytes(b"")
        assert work.progress_mark == before + 1, setting


def test_profiling_a_finished_run_has_nothing_to_do(tmp_path: Path) -> None:
    config = load_config(ROOT / "configs/demo.yaml", [f"run.dir={tmp_path}", "evaluation.at_end=false"])
    (tmp_path / "checkpoints").mkdir()
    profiled = replace(config, run=replace(config.run, profile=True))
    mark_complete(tmp_path, "train", profiled)
    assert is_complete_under(config)
    assert not is_complete_under(replace(config, run=replace(config.run, max_images=1)))


def test_the_end_is_recorded(tmp_path: Path) -> None:
    forget_completion(tmp_path, "train")
    assert not is_complete(tmp_path, "train")
    mark_complete(tmp_path / "run", "train")
    assert is_complete(tmp_path / "run", "train")
    assert not is_complete(tmp_path / "run", "evaluate")
    forget_completion(tmp_path / "run", "train")
    assert not is_complete(tmp_path / "run", "train")
