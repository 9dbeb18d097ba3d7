"""Who this process is among the ranks of a job: from the variables of torchrun, of srun, or of neither.

The variables of a launcher are believed as one set. If only a part is set, it is left over from another command, or the
rest did not get into a container. A guess of the rest would give a run that waits for ranks that nobody starts.
"""

import math
import os
import re
import socket
import stat
from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar

from jitscale.errors import LauncherError

IDENTITY = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
KERNEL_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
TORCHRUN = (*IDENTITY, "MASTER_ADDR", "MASTER_PORT")
MOST_NODES = 65_536  # in a range: no cluster has so many
MOST_DIGITS = 18
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # in the order of IDENTITY


def adopt_launcher_environment() -> int:
    """Give this process torchrun's variables, whoever has started it; returns the world size.

    A task of srun is recognised by its step: a batch script and a shell of salloc have other variables of Slurm, but
    are no tasks. A task that is alone in its step, such as a shell of `srun --pty`, is a world of one. Raises a
    LauncherError if the variables are incomplete, or contradict each other.
    """
    if "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ:
        found = _of_srun()
    elif any(name in os.environ for name in IDENTITY):
        found = _of_torchrun()
    else:
        found = _alone()
    os.environ.update(found)
    return int(found["WORLD_SIZE"])


def make_kernel_caches() -> None:
    """Make this node's folders for compiled kernels, where the environment names some, for this user alone.

    slurm/launch.sh names folders on each node's own disk, where the batch script itself runs on the first node only.
    Raises a LauncherError if a folder cannot be made, or if another user could put code into it, by its own access or
    by that of the folder above, in which it could be replaced.
    """
    remedy = "let JITSCALE_CACHE name a folder of your own on the nodes' own disks"
    for name in KERNEL_CACHES:
        if folder := os.environ.get(name):
            above = os.path.dirname(os.path.abspath(folder))
            try:
                for made in (above, folder):  # makedirs gives its mode to the last folder only
                    os.makedirs(made, mode=0o700, exist_ok=True)
                wrong = _open_to_others(above, sticky=True) or _open_to_others(folder)
            except OSError as error:
                raise LauncherError(f"{name}={folder}: cannot be made ({error.strerror}); {remedy}") from error
            if wrong:
                raise LauncherError(f"{name}={folder}: {wrong}: others could put code into it; {remedy}")
            if not os.access(folder, os.W_OK):
                raise LauncherError(f"{name}={folder}: cannot be written; {remedy}")


def _open_to_others(folder: str, *, sticky: bool = False) -> str:
    """Why another user than root could change what lies in `folder`; empty if none can.

    With `sticky`, others may write into a folder such as /tmp, in which they cannot replace what is not theirs.
    """
    found = os.lstat(folder)
    if stat.S_ISLNK(found.st_mode):
        return f"{folder} is a symbolic link"
    if found.st_uid not in (os.geteuid(), 0):
        return f"{folder} belongs to user {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not (sticky and found.st_mode & stat.S_ISVTX):
        return f"{folder} has mode {stat.S_IMODE(found.st_mode):o}"
    return ""


def hosts_in(variable: str) -> list[str]:
    """The names in one of Slurm's variables for a list of nodes: n[1-2,5] is n1, n2 and n5.

    scontrol would say the same, but is not there in a container. Raises a LauncherError if there is no such list.
    """
    # Slow to import, and needed on clusters only.
    from submitit.slurm.slurm import SlurmJobEnvironment, SlurmParseException  # noqa: PLC0415

    class Environment(SlurmJobEnvironment):
        _env: ClassVar[dict[str, str]] = {"nodes": variable}  # documented in the base class

    listed = os.environ[variable]
    with suppress(SlurmParseException, ValueError):
        # Before a wrong digit makes millions of names.
        sizes = (int(last) - int(first) for first, last in re.findall(r"(\d+)-(\d+)(?=[^\[]*\])", listed))
        if all(size < MOST_NODES for size in sizes):
            hosts = Environment().hostnames
            if hosts and all(hosts):
                return hosts
    raise LauncherError(f"{listed[:200]!r}: no list of nodes' names as Slurm writes it, such as n[1-2,5]")


def required(names: Sequence[str], because: str, remedy: str) -> list[str]:
    """The values of variables that must all be there; `because` says why, as the beginning of a sentence.

    Raises a LauncherError that names all that are missing or empty.
    """
    if missing := [name for name in names if not os.environ.get(name)]:
        raise LauncherError(f"{because}, but there is no value of {', '.join(missing)}; {remedy}")
    return [os.environ[name] for name in names]


def integer(name: str, value: str, least: int = 0, most: int | None = None) -> int:
    """The number in a launcher's variable. Raises a LauncherError if it is none, or outside [least, most]."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS else -1
    if number < least or (most is not None and number > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise LauncherError(
            f"{name}={value[:200]}: must be an integer, {limit}; start with srun or torchrun, or unset it"
        )
    return number


def positive_setting(name: str, default: float) -> float:
    """The positive number in one of the project's own variables, JITSCALE_...; `default` where it is not set.

    Raises a LauncherError if it is no such number.
    """
    text = os.environ.get(name) or str(default)
    with suppress(ValueError):
        value = float(text)
        if 0 < value < math.inf:
            return value
    raise LauncherError(f"{name}={text}: must be a number above 0, such as {default:g}; correct it, or unset it")


def _of_torchrun() -> dict[str, str]:
    set_ones = [f"{name}={os.environ[name]}" for name in IDENTITY if name in os.environ]
    remedy = f"start with torchrun, or set all of {', '.join(TORCHRUN)}, or for one process unset {', '.join(IDENTITY)}"
    values = required(TORCHRUN, f"{' '.join(set_ones)} is set", remedy)
    return _checked(dict(zip(TORCHRUN, values, strict=True)), IDENTITY)


def _of_srun() -> dict[str, str]:
    step = f"SLURM_STEP_ID={os.environ['SLURM_STEP_ID']} is set, as in a task of srun"
    remedy = "pass all SLURM_* variables into the container, or for one process unset SLURM_STEP_ID"
    found = dict(zip(IDENTITY, required(SRUN, step, remedy), strict=True))
    for name, slurm in zip(IDENTITY, SRUN, strict=True):
        other = os.environ.get(name, found[name])
        if other != found[name]:
            raise LauncherError(f"{name}={other}, but {slurm}={found[name]} in this task; unset {name}")
    if found["WORLD_SIZE"] == "1":
        # Other steps of the job may run on the same node: the job's own port would be taken.
        return _alone()
    found |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    if "MASTER_ADDR" not in found:
        required(["SLURM_STEP_NODELIST"], step, remedy)
        found["MASTER_ADDR"] = hosts_in("SLURM_STEP_NODELIST")[0]
    if "MASTER_PORT" not in found:
        job = integer("SLURM_JOB_ID", required(["SLURM_JOB_ID"], step, remedy)[0])
        # In a batch script slurm/launch.sh has chosen one, which changes with each start.
        found["MASTER_PORT"] = str(20_000 + job % 20_000)
    return _checked(found, SRUN)


def _alone() -> dict[str, str]:
    with socket.socket() as probe:  # for a free port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return dict(zip(TORCHRUN, ("0", "1", "0", "127.0.0.1", port), strict=True))


def _checked(found: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Refuse numbers that cannot be; `names` are the launcher's own for those of IDENTITY."""
    rank, size, local_rank = names
    if not found["MASTER_ADDR"]:
        raise LauncherError("MASTER_ADDR is empty; set it to the host of rank 0, or unset it under srun")
    ranks = integer(size, found["WORLD_SIZE"], 1)
    for name, value in ((rank, found["RANK"]), (local_rank, found["LOCAL_RANK"])):
        if integer(name, value) >= ranks:
            raise LauncherError(f"{name}={value} is not below {size}={ranks}; unset what another command has left over")
    integer("MASTER_PORT", found["MASTER_PORT"], 1, 65535)
    return found
