"""Requests to Slurm. Each has a time limit: a controller that is busy must not hold a job."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from jitscale.errors import UserError
from jitscale.launcher_environment import hosts_in, integer, required

SECONDS = 60.0  # for one command
COMMANDS = ("srun", "scontrol", "sinfo")  # what a job of several starts needs


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process runs in."""

    id: str  # an array's task has its number behind it, as in 17_3
    nodes: tuple[str, ...]  # their names
    tasks: int  # of the whole job
    restarts: int  # how often Slurm has started it again
    partition: str

    @classmethod
    def current(cls) -> "SlurmJob":
        """From a batch script's environment. Raises a UserError elsewhere, or if only a part of it is here."""
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("not inside a Slurm job; submit a script: sbatch slurm/train_jit_h.sh")
        names = ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION"]
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            # The job id of one of an array's tasks may be the array's own, by which Slurm would requeue them all.
            names += ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"]
        because = f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']} is set, as in a batch script"
        job, _, partition, *array = required(names, because, "submit the script with sbatch")
        nodes = hosts_in("SLURM_JOB_NODELIST")
        tasks = integer("SLURM_NTASKS", os.environ.get("SLURM_NTASKS", str(len(nodes))), 1)
        restarts = integer("SLURM_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls("_".join(array) or job, tuple(nodes), tasks, restarts, partition)


def check_commands() -> None:
    """Slurm's commands are on PATH. Raises a UserError that names those that are not."""
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        outside = "start the batch script outside of a container, where Slurm's commands are"
        inside = "name a script that enters the container in JITSCALE_RANK_PYTHON (docs/train.md)"
        raise UserError(f"{', '.join(missing)}: not on PATH; {outside}, and {inside}")


def described_job(job: str) -> dict[str, str]:
    """What Slurm's controller says of a job, such as its JobState. Raises what `ask` does, so for unknown jobs too."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "show", "job", job)))


def usable_nodes(partition: str) -> set[str]:
    """The nodes of a partition that are, or will again be, there for jobs. Raises what `ask` does."""
    listed = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %t")
    gone = ("down", "drain", "drng", "fail", "maint", "unk", "inval")
    pairs = (line.split() for line in listed.splitlines())
    return {name for name, state in pairs if not (state.startswith(gone) or state.endswith("*"))}


def failed_tasks(text: str) -> list[str]:
    """The nodes that srun's messages name for failed tasks, in order, without tasks that srun killed in consequence."""
    found = re.findall(r"^srun: error: ([\w.-]+): tasks? [\d,\-]+: (.+)$", text, re.MULTILINE)
    return list(dict.fromkeys(node for node, what in found if "Terminated" not in what))


def ask(*command: str) -> str:
    """What a command of Slurm prints. Raises a UserError if it is not there, fails, or does not answer."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: not found; is Slurm installed on this machine?") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command)}: no answer in {SECONDS:.0f} s") from error
    if finished.returncode != 0:
        raise UserError(f"{' '.join(command)}: {finished.stderr.strip() or finished.returncode}")
    return finished.stdout
