"""The rank of this process in its job, from the variables of torchrun, of srun, or without a launcher.

The variables of a launcher count only as a complete set. If only a part is set, it is a leftover of another command, or
the rest did not get into a container. If the rest were guessed, the run could wait for ranks that were never started.
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
MOST_NODES = 65_536  # in one range of node names
MOST_DIGITS = 18  # limit for an integer in a variable
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")  # in the order of IDENTITY


def adopt_launcher_environment() -> int:
    """Set torchrun's variables in this process, under any launcher; returns the world size.

    SLURM_STEP_ID marks a task of srun: a batch script and a shell of salloc have other variables of Slurm, but are not
    tasks. A task that is alone in its step, such as a shell of `srun --pty`, is a world of one. Raises a LauncherError
    if the variables are incomplete or contradict each other.
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
    """Create this node's folders for compiled kernels, if the environment names them, with access for this user only.

    slurm/launch.sh names folders on each node's own disk. It cannot create them itself: a batch script runs on the
    first node only. Raises a LauncherError if a folder cannot be created, or if another user could put code into it:
    by writing into the folder, or by replacing it in the folder above.
    """
    remedy = "set JITSCALE_CACHE to a folder of your own on the nodes' own disks"
    for name in KERNEL_CACHES:
        if folder := os.environ.get(name):
            above = os.path.dirname(os.path.abspath(folder))
            try:
                for made in (above, folder):  # makedirs gives its mode to the last folder only
                    os.makedirs(made, mode=0o700, exist_ok=True)
                wrong = _open_to_others(above, sticky=True) or _open_to_others(folder)
            except OSError as error:
                raise LauncherError(f"{name}={folder}: cannot be created ({error.strerror}); {remedy}") from error
            if wrong:
                raise LauncherError(f"{name}={folder}: {wrong}: others could put code into it; {remedy}")
            if not os.access(folder, os.W_OK):
                raise LauncherError(f"{name}={folder}: cannot be written; {remedy}")


def _open_to_others(folder: str, *, sticky: bool = False) -> str:
    """Why a user other than root could change the content of `folder`; empty if nobody can.

    `sticky` allows a folder such as /tmp: others may write into it, but its sticky bit protects files of this user.
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
    """The node names in a Slurm variable that holds a list of nodes: n[1-2,5] is n1, n2 and n5.

    `scontrol show hostnames` does the same, but a container may lack it. Raises a LauncherError if the value is not
    such a list.
    """
    # This import is slow, and only clusters need it.
    from submitit.slurm.slurm import SlurmJobEnvironment, SlurmParseException  # noqa: PLC0415

    class Environment(SlurmJobEnvironment):
        _env: ClassVar[dict[str, str]] = {"nodes": variable}  # documented in the base class

    listed = os.environ[variable]
    with suppress(SlurmParseException, ValueError):
        # This check comes first: one wrong digit could expand to millions of names.
        sizes = (int(last) - int(first) for first, last in re.findall(r"(\d+)-(\d+)(?=[^\[]*\])", listed))
        if all(size < MOST_NODES for size in sizes):
            hosts = Environment().hostnames
            if hosts and all(hosts):
                return hosts
    raise LauncherError(f"{listed[:200]!r}: is not a list of nodes as Slurm writes it, such as n[1-2,5]")


def required(names: Sequence[str], because: str, remedy: str) -> list[str]:
    """The values of the variables `names`, which must all be set; `because` is the reason and begins the message.

    Raises a LauncherError that names every variable that is missing or empty.
    """
    if missing := [name for name in names if not os.environ.get(name)]:
        raise LauncherError(f"{because}, but there is no value of {', '.join(missing)}; {remedy}")
    return [os.environ[name] for name in names]


def integer(name: str, value: str, least: int = 0, most: int | None = None) -> int:
    """The integer in a launcher's variable. Raises a LauncherError if it is not an integer in [least, most]."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS else -1
    if number < least or (most is not None and number > most):
        limit = f"at least {least}" if most is None else f"from {least} to {most}"
        raise LauncherError(
            f"{name}={value[:200]}: must be an integer, {limit}; start with srun or torchrun, or unset it"
        )
    return number


def positive_setting(name: str, default: float) -> float:
    """The positive number in one of the project's own variables (JITSCALE_...), or `default` if it is not set.

    Raises a LauncherError if the value is not a positive number.
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
        # Other steps of the job may run on the same node and use the job's port, so this task takes a free one.
        return _alone()
    found |= {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    if "MASTER_ADDR" not in found:
        required(["SLURM_STEP_NODELIST"], step, remedy)
        found["MASTER_ADDR"] = hosts_in("SLURM_STEP_NODELIST")[0]
    if "MASTER_PORT" not in found:
        job = integer("SLURM_JOB_ID", required(["SLURM_JOB_ID"], step, remedy)[0])
        # Outside of slurm/launch.sh, which chooses another port at each start of a batch script.
        found["MASTER_PORT"] = str(20_000 + job % 20_000)
    return _checked(found, SRUN)


def _alone() -> dict[str, str]:
    with socket.socket() as probe:  # finds a free port
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return dict(zip(TORCHRUN, ("0", "1", "0", "127.0.0.1", port), strict=True))


def _checked(found: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Refuse impossible numbers; `names` are the launcher's own names for IDENTITY, for messages."""
    rank, size, local_rank = names
    if not found["MASTER_ADDR"]:
        raise LauncherError("MASTER_ADDR is empty; set it to the host of rank 0, or unset it if srun starts the ranks")
    ranks = integer(size, found["WORLD_SIZE"], 1)
    for name, value in ((rank, found["RANK"]), (local_rank, found["LOCAL_RANK"])):
        if integer(name, value) >= ranks:
            raise LauncherError(f"{name}={value} is not below {size}={ranks}; unset what another command left")
    integer("MASTER_PORT", found["MASTER_PORT"], 1, 65535)
    return found
