"""Requests to Slurm. Each has a time limit, so that a busy controller cannot block a job."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from jitscale.errors import UserError
from jitscale.launcher_environment import hosts_in, integer, required

SECONDS = 60.0  # for one command
COMMANDS = ("srun", "scontrol", "sinfo")  # the commands that the supervisor needs


@dataclass(frozen=True)
class SlurmJob:
    """The job that this process runs in."""

    id: str  # for a task of an array with the task's number, as in 17_3
    nodes: tuple[str, ...]  # their names
    tasks: int  # tasks of the whole job
    restarts: int  # number of times that Slurm has restarted the job
    partition: str

    @classmethod
    def current(cls) -> "SlurmJob":
        """The job of a batch script's environment. Raises a UserError outside of a job, or if variables are missing."""
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError("not inside a Slurm job; submit a script: sbatch slurm/train_jit_h.sh")
        names = ["SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION"]
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            # One task of an array has the array's own id as its job id. With that id, Slurm would requeue all tasks.
            names += ["SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"]
        because = f"SLURM_JOB_ID={os.environ['SLURM_JOB_ID']} is set, as in a batch script"
        job, _, partition, *array = required(names, because, "submit the script with sbatch")
        nodes = hosts_in("SLURM_JOB_NODELIST")
        tasks = integer("SLURM_NTASKS", os.environ.get("SLURM_NTASKS", str(len(nodes))), 1)
        restarts = integer("SLURM_RESTART_COUNT", os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls("_".join(array) or job, tuple(nodes), tasks, restarts, partition)


def check_commands() -> None:
    """Check that Slurm's commands are on PATH. Raises a UserError that names the missing ones."""
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        outside = "start the batch script outside of the container, since it needs Slurm's commands"
        inside = "set JITSCALE_RANK_PYTHON to a script that enters the container (docs/train.md)"
        raise UserError(f"{', '.join(missing)}: not on PATH; {outside}, and {inside}")


def described_job(job: str) -> dict[str, str]:
    """The fields of a job in Slurm's controller, such as JobState. Raises as `ask`, so also for unknown jobs."""
    return dict(re.findall(r"(\S+?)=(\S*)", ask("scontrol", "show", "job", job)))


def usable_nodes(partition: str) -> set[str]:
    """The nodes of a partition that can run jobs now or later. Raises as `ask`."""
    listed = ask("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %t")
    gone = ("down", "drain", "drng", "fail", "maint", "unk", "inval")
    pairs = (line.split() for line in listed.splitlines())
    return {name for name, state in pairs if not (state.startswith(gone) or state.endswith("*"))}


def failed_tasks(text: str) -> list[str]:
    """The nodes of failed tasks in srun's messages, in order. Tasks that srun killed as a consequence are ignored."""
    found = re.findall(r"^srun: error: ([\w.-]+): tasks? [\d,\-]+: (.+)$", text, re.MULTILINE)
    return list(dict.fromkeys(node for node, what in found if "Terminated" not in what))


def ask(*command: str) -> str:
    """The output of a Slurm command. Raises a UserError if the command does not exist, fails, or does not answer."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{command[0]}: not found; is Slurm installed on this machine?") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{' '.join(command)}: no answer in {SECONDS:.0f} s") from error
    if finished.returncode != 0:
        raise UserError(f"{' '.join(command)}: {finished.stderr.strip() or finished.returncode}")
    return finished.stdout
