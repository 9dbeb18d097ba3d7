"""The rank of this process: with torchrun, srun and plain python, and with variables that only look like theirs."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from jitscale.errors import ConfigError, ExitCode, LauncherError, exit_with_message
from jitscale.launch.slurm import SlurmJob, check_commands
from jitscale.launcher_environment import (
    TORCHRUN,
    adopt_launcher_environment,
    hosts_in,
    make_kernel_caches,
    positive_setting,
)
from tests.support import ROOT
from tests.support.forking import PYTHONPATH, Process

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NODELIST": "node[07-10]",
    "SLURM_JOB_NODELIST": "node[01-10]",
    "SLURM_NTASKS": "16",
}
RANK = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "7"}
PORT = str(20_000 + 123_456 % 20_000)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name in TORCHRUN or name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in TORCHRUN:  # monkeypatch then restores the variables that the code sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def adopted(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> tuple[str, ...]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT after the call."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert adopt_launcher_environment() == int(os.environ["WORLD_SIZE"])
    return tuple(os.environ[name] for name in TORCHRUN)


def without(variables: dict[str, str], *names: str, **others: str) -> dict[str, str]:
    return {**{name: value for name, value in variables.items() if name not in names}, **others}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (RANK, ("3", "8", "1", "n1", "7")),
        (TASK, ("5", "8", "1", "node07", PORT)),
        (without(TASK, MASTER_ADDR="head", MASTER_PORT="29500"), ("5", "8", "1", "head", "29500")),
        (without(TASK, WORLD_SIZE="8"), ("5", "8", "1", "node07", PORT)),  # A batch script exported a correct value.
        ({**TASK, **RANK}, ("3", "8", "1", "n1", "7")),  # srun started torchrun.
    ],
    ids=["torchrun", "srun", "srun with an address", "srun with its world size", "torchrun in srun"],
)
def test_ranks_come_from_the_launcher(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[str, ...]
) -> None:
    assert adopted(monkeypatch, variables) == expected
    assert adopted(monkeypatch, {}) == expected, "a second call gives the same rank"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "8"},
        without(TASK, "SLURM_STEP_ID"),
        {"SLURM_PROCID": "3"},
        {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
        {"MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"},
        {**TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "29500"},
    ],
    ids=["plain", "salloc", "batch script", "left over", "srun --pty", "address only", "a task that is alone"],
)
def test_a_single_process_is_a_world_of_size_one(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    monkeypatch.setenv("PATH", "")  # so that there is no scontrol
    *identity, address, port = adopted(monkeypatch, variables)
    assert (*identity, address) == ("0", "1", "0", "127.0.0.1")
    assert 1023 < int(port) != 29500


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (without(RANK, "LOCAL_RANK"), "no value of LOCAL_RANK; start with torchrun, or set all of"),
        (without(RANK, "MASTER_PORT"), "no value of MASTER_PORT;"),
        ({"RANK": "0", "LOCAL_RANK": "0"}, "no value of WORLD_SIZE, MASTER_ADDR, MASTER_PORT;"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8 is set, but there is no value of RANK, LOCAL_RANK,"),
        ({"LOCAL_RANK": "0"}, "for one process unset RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "", "WORLD_SIZE": ""}, "no value of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (without(RANK, RANK="8"), "RANK=8 is not below WORLD_SIZE=8"),
        (without(RANK, LOCAL_RANK="9"), "LOCAL_RANK=9 is not below WORLD_SIZE=8"),
        (without(RANK, RANK="first"), "RANK=first: must be an integer, at least 0"),
        (without(RANK, WORLD_SIZE="0"), "WORLD_SIZE=0: must be an integer, at least 1"),
        (without(RANK, MASTER_PORT="65536"), "MASTER_PORT=65536: must be an integer, from 1 to 65535"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "no value of SLURM_STEP_NUM_TASKS, SLURM_LOCALID; pass all"),
        (without(TASK, "SLURM_PROCID"), "no value of SLURM_PROCID;"),
        (without(TASK, "SLURM_STEP_NODELIST"), "no value of SLURM_STEP_NODELIST;"),
        (without(TASK, "SLURM_JOB_ID"), "no value of SLURM_JOB_ID;"),
        (without(TASK, SLURM_JOB_ID="12_3"), "SLURM_JOB_ID=12_3: must be an integer"),
        (without(TASK, SLURM_PROCID="8"), "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
        (without(TASK, SLURM_STEP_NODELIST="node[1-"), "'node[1-': is not a list of nodes as Slurm writes it"),
        (without(TASK, SLURM_STEP_NODELIST="node[2-1]"), "'node[2-1]': is not a list of nodes as Slurm writes it"),
        (without(TASK, SLURM_STEP_NODELIST="node[1-99999999999]"), "is not a list of nodes as Slurm writes it"),
        (without(TASK, SLURM_STEP_NODELIST=f"node[{'9' * 5000}-1]"), "is not a list of nodes as Slurm writes it"),
        (without(RANK, RANK="9" * 5000), "999: must be an integer, at least 0"),
        (without(RANK, WORLD_SIZE="-1"), "WORLD_SIZE=-1: must be an integer, at least 1"),
        (without(RANK, RANK="\u0663"), "RANK=\u0663: must be an integer, at least 0"),
        (without(TASK, MASTER_ADDR=""), "MASTER_ADDR is empty"),
        (without(TASK, WORLD_SIZE="4"), "WORLD_SIZE=4, but SLURM_STEP_NUM_TASKS=8 in this task; unset WORLD_SIZE"),
    ],
)
def test_an_incomplete_set_of_variables_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    with pytest.raises(LauncherError) as caught:
        adopted(monkeypatch, variables)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("localhost", ["localhost"]),
        ("n[1-3,5]", ["n1", "n2", "n3", "n5"]),
        ("gpu[098-101],login-2.site", ["gpu098", "gpu099", "gpu100", "gpu101", "login-2.site"]),
        ("rack[1-2]-n[08,10]", ["rack1-n08", "rack1-n10", "rack2-n08", "rack2-n10"]),
    ],
)
def test_lists_of_nodes_are_expanded_like_by_scontrol(
    monkeypatch: pytest.MonkeyPatch, nodelist: str, hosts: list[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", nodelist)
    assert hosts_in("SLURM_JOB_NODELIST") == hosts


def test_a_job_needs_the_whole_environment_of_its_script(monkeypatch: pytest.MonkeyPatch) -> None:
    script = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_PARTITION": "gpu"}
    for name, value in script.items():
        monkeypatch.setenv(name, value)
    assert SlurmJob.current() == SlurmJob("17", ("n1", "n2"), 2, 0, "gpu")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with pytest.raises(LauncherError, match="no value of SLURM_ARRAY_JOB_ID"):
        SlurmJob.current()
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    with pytest.raises(LauncherError, match="no value of SLURM_JOB_NODELIST, SLURM_ARRAY_JOB_ID"):
        SlurmJob.current()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Exception, match=r"^srun, scontrol, sinfo: not on PATH; .*JITSCALE_RANK_PYTHON"):
        check_commands()


@pytest.mark.parametrize(
    ("variables", "error", "printed"),
    [
        ({"SLURM_PROCID": "3"}, ConfigError("wrong"), True),
        ({"RANK": "0"}, ConfigError("wrong"), True),
        ({"RANK": "3"}, ConfigError("wrong"), False),  # Rank 0 reports the mistake.
        ({"RANK": "3"}, LauncherError("wrong"), True),  # There may be no rank 0.
    ],
)
def test_which_rank_reports_a_mistake(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    variables: dict[str, str],
    error: Exception,
    printed: bool,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    def command() -> int:
        raise error

    exit_with_message(command)
    assert codes == [ExitCode.USER_ERROR]
    assert capsys.readouterr().err == ("error: wrong\n" if printed else "")


def test_torchruns_summary_contains_the_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another rank may find the mistake first: torchrun ends rank 0 before it can print it."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(os, "_exit", lambda code: None)

    def command() -> int:
        raise ConfigError("optim.lr=-1 is wrong")

    exit_with_message(command)
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert "traceback : error: optim.lr=-1 is wrong\n===" in ChildFailedError("train", {1: failure}).format_msg()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "absent" / "error.json"))
    exit_with_message(command)


@pytest.mark.slow
def test_a_real_torchrun_prints_the_mistake_last() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "jitscale.train", "--config", str(ROOT / "configs/demo.yaml"), "optim.lr=-1"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    finished = subprocess.run([*command, "data.shards=x"], env=environment, capture_output=True, text=True, check=False)
    *_, last, border = finished.stderr.rstrip().splitlines()
    assert last.startswith("  traceback : error: ")
    assert "optim.lr=-1.0 must be greater than 0" in last
    assert not border.strip("=")


MEET = """
import torch
from jitscale import parallel
from jitscale.errors import exit_with_message
parallel.FIRST_WORD, parallel.NEXT_WORD, parallel.OTHERS_WORD = 0.5, 0.5, 0.5
exit_with_message(lambda: parallel.start(torch.device("cpu")).size)
"""


def test_missing_ranks_are_awaited_with_messages_and_a_limit() -> None:
    """One rank of four, as in `srun -n4 --pty bash`. Rank 0, which the others would contact, and rank 3 wait alone."""
    started = {}
    for rank, port in ((0, 29587), (3, 29588)):
        own = {"RANK": str(rank), "WORLD_SIZE": "4", "LOCAL_RANK": "0"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "JITSCALE_MEETING_SECONDS": "3"}
        started[port] = Process(["-c", MEET], {**os.environ, **own, "PYTHONPATH": PYTHONPATH})
    for port, process in started.items():
        said, _ = process.communicate(timeout=120)
        assert process.returncode == ExitCode.FAILED
        assert said.count(f"waiting for 4 ranks at 127.0.0.1:{port}\n") >= 2
        assert "Traceback" not in said
        assert said.splitlines()[-1].startswith(f"error: 4 ranks did not meet at 127.0.0.1:{port} within 3 s (")


@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan", "inf"])
def test_the_projects_own_variables_are_checked(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("JITSCALE_MEETING_SECONDS", text)
    with pytest.raises(LauncherError, match=rf"JITSCALE_MEETING_SECONDS={text}: must be a number above 0, such as 600"):
        positive_setting("JITSCALE_MEETING_SECONDS", 600.0)
    for unset in ("", "2.5"):
        monkeypatch.setenv("JITSCALE_MEETING_SECONDS", unset)
        assert positive_setting("JITSCALE_MEETING_SECONDS", 600.0) == (2.5 if unset else 600.0)


def test_each_node_has_caches_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    folder = tmp_path / "jitscale-cache-me/inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    usual = os.umask(0o002)  # Sites where each user has a group use this mask.
    try:
        make_kernel_caches()
    finally:
        os.umask(usual)
    make_kernel_caches()
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file/inductor"))
    with pytest.raises(LauncherError, match=r"cannot be created \(.*\); set JITSCALE_CACHE to a folder"):
        make_kernel_caches()


@pytest.mark.parametrize("which", ["leaf", "parent"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("owner", "belongs to user 4242: "),
        ("link", "is a symbolic link: "),
        (0o770, "has mode 770: "),
        (0o702, "has mode 702: "),
    ],
)
def test_caches_into_which_others_could_put_code_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, which: str, change: str | int, message: str
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    folder = tmp_path / "jitscale-cache-me/triton"
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o700)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    make_kernel_caches()
    path = folder if which == "leaf" else folder.parent
    if change == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif isinstance(change, int):
        path.chmod(change)
    else:
        lstat = os.lstat

        def of_another(asked: str | Path) -> os.stat_result:
            found = list(lstat(asked))
            if Path(asked) == path:
                found[stat.ST_UID] = 4242
            return os.stat_result(found)

        monkeypatch.setattr(os, "lstat", of_another)
    with pytest.raises(LauncherError, match=message) as caught:
        make_kernel_caches()
    said = str(caught.value)
    assert said.startswith(f"TRITON_CACHE_DIR={folder}: {path} ")
    assert said.endswith(
        "others could put code into it; set JITSCALE_CACHE to a folder of your own on the nodes' own disks"
    )


def test_a_cache_may_lie_in_a_folder_for_everyone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder with the sticky bit, such as TRITON_CACHE_DIR=/tmp/mine, users cannot replace files of others."""
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    make_kernel_caches()
    tmp_path.chmod(0o777)
    with pytest.raises(LauncherError, match="has mode 777"):
        make_kernel_caches()
    tmp_path.chmod(0o700)
