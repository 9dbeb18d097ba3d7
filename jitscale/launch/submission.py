"""Submission of jobs through submitit, their records in a folder, and their states."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedJobError, FailedSubmissionError, pickle_load
from submitit.local.local import LocalExecutor
from submitit.slurm import slurm as submitit_slurm

from jitscale.errors import DataError, UserError, data_error
from jitscale.files import atomic_write
from jitscale.launch.slurm import ask, described_job
from jitscale.launch.stages import Stage
from jitscale.run_folder import is_complete

LONGEST_TEXT = 4096  # characters of a value in a record; paths on Linux are not longer


@dataclass(frozen=True)
class Resources:
    """The resources that each job requests from Slurm."""

    nodes: int
    tasks_per_node: int  # ranks, one per GPU
    gpus_per_node: int  # 0 for none
    cpus_per_task: int  # cores of a rank
    minutes: int  # the time limit; a job that reaches it is requeued and continues
    partition: str | None  # None for Slurm's default
    signal_seconds: int  # time between the signal and the limit, for the last checkpoint
    options: dict[str, str | bool]  # more options of sbatch: {"account": "vision"}; True if it has no value


# Options of sbatch that this project sets, and the options of this command for them.
OWN_OPTIONS = {
    "nodes": "--nodes",
    "ntasks": "--nodes and --tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "gpus-per-node": "--gpus-per-node",
    "cpus-per-task": "--cpus-per-task",
    "time": "--minutes",
    "partition": "--partition",
    "signal": "--signal-seconds",
    "dependency": "--chain",
    "array": "--set",
    "output": "--folder",
    "error": "--folder",
}
# Options that would break this command: requeueing, names, folders, and reading the job's id.
UNFIT_OPTIONS = {"requeue", "no-requeue", "job-name", "chdir", "open-mode", "wrap", "test-only", "parsable"}


@dataclass(frozen=True)
class Record:
    """A submitted job."""

    job: str  # its id; without Slurm `local_` and the id of a process
    stage: str  # the stage's name
    kind: str  # train, upgrade or evaluate
    run_dir: str
    after: str | None  # the job whose success it waits for
    log: str  # the file with its output
    submitted: str  # time, ISO 8601


def parse_options(texts: Sequence[str]) -> dict[str, str | bool]:
    """Options of sbatch, given as account=vision, --account=vision, or exclusive, which has no value.

    Raises a UserError if a text is not a long option of sbatch, occurs twice, or is set by this project.
    """
    options: dict[str, str | bool] = {}
    for text in texts:
        name, equals, value = text.removeprefix("--").partition("=")
        if (
            not re.fullmatch(r"[a-z]+(-[a-z]+)+|[a-z]{2,}|x11", name)
            or (equals and not value)
            or not value.isprintable()
        ):
            raise UserError(f"--sbatch {text!r}: must be a long option of sbatch, such as account=vision or exclusive")
        if name in OWN_OPTIONS:
            raise UserError(f"--sbatch {text}: this command sets it with {OWN_OPTIONS[name]}; leave it out here")
        if name in UNFIT_OPTIONS:
            raise UserError(f"--sbatch {text}: conflicts with options that this command sets; leave it out")
        if name in options:
            raise UserError(f"--sbatch {text}: --{name} is given twice; leave one out")
        options[name] = value if equals else True
    return options


def check_folder(path: Path) -> None:
    """Raise a UserError if the path or a folder above it is a file, or if its name is too long."""
    try:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise UserError(f"{path}: no folder can have this name ({error.strerror}); choose a shorter one") from error
    if not there.is_dir():
        raise UserError(f"{path}: {there} is a file, not a folder; choose another name")


def check_partition(partition: str | None) -> None:
    """Raise a UserError if a partition (sbatch allows several: a,b) does not exist, or if there is no Slurm."""
    names = {name.rstrip("*") for name in ask("sinfo", "--noheader", "--format=%P").split()}
    if partition is not None and (absent := [name for name in partition.split(",") if name not in names]):
        said = f"{', '.join(map(repr, absent))} not on this cluster" if "," in partition else "not on this cluster"
        raise UserError(f"--partition {partition}: {said}; choose one of {', '.join(sorted(names))}")


def submit(chains: Sequence[Sequence[Stage]], resources: Resources, folder: Path) -> None:
    """Submit chains. A stage starts when the stage before it has succeeded. Chains of one stage become one array.

    Logs, submitit's pickles and the records are written to `folder`. Raises a UserError if sbatch refuses a job.
    """
    try:
        _submit(chains, resources, folder)
    except (FailedJobError, FailedSubmissionError) as error:
        said = " ".join(str(error).split()) or "no message"
        raise UserError(f"sbatch refused the job: {said}; correct the options") from error


def _submit(chains: Sequence[Sequence[Stage]], resources: Resources, folder: Path) -> None:
    if len(chains) > 1 and all(len(chain) == 1 for chain in chains):
        executor = _executor(folder, resources, chains[0][0], None)
        with executor.batch():
            jobs = [(executor.submit(stage), stage) for (stage,) in chains]
        for job, stage in jobs:
            _record(job.job_id, stage, None, folder)
        return
    for chain in chains:
        after = None
        for stage in chain:
            job = _executor(folder, resources, stage, after).submit(stage)
            after = _record(job.job_id, stage, after, folder)


def submit_here(chain: Sequence[Stage], folder: Path) -> None:
    """Run a chain on this machine without Slurm, one stage after another, each in a process of submitit.

    Raises a UserError if a stage fails. Later stages are not started.
    """
    after = None
    executor = LocalExecutor(folder)
    executor.update_parameters(timeout_min=60 * 24 * 365)
    for stage in chain:
        job = executor.submit(stage)
        after = _record(f"local_{job.job_id}", stage, after, folder)
        print(f"{stage.name}: process {job.job_id}, log {job.paths.stdout}", flush=True)
        if error := job.exception():
            last = str(error).strip().splitlines()[-1]
            raise UserError(f"{stage.name}: {last}; its log is {job.paths.stderr}")


def batch_script(stage: Stage, resources: Resources, folder: Path, after: str | None = None) -> str:
    """The batch script of a stage."""
    command = f"exec {shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return submitit_slurm._make_sbatch_string(command, folder, **_parameters(resources, stage, after))


def records(folder: Path) -> list[Record]:
    """All jobs submitted from the folder, the oldest first. Raises a DataError if a record is damaged."""
    found = [_read_record(path) for path in (folder / "jobs").glob("*.json")]
    return sorted(found, key=lambda record: (record.submitted, record.job))


def state_of(record: Record, all_records: Sequence[Record]) -> dict[str, Any]:
    """State, number of restarts, last metrics and, if the job has failed, the reason."""
    state, restarts, reason = _state(record)
    run_dir = Path(record.run_dir)
    if record.kind != "upgrade" and state in ("UNKNOWN", "RUNNING", "COMPLETED") and is_complete(run_dir, record.kind):
        state, reason = "COMPLETED", ""
    if state == "CANCELLED" and record.after is not None:
        before = next((other for other in all_records if other.job == record.after), None)
        if before is not None and _state(before)[0] not in ("COMPLETED", "PENDING", "RUNNING"):
            reason = f"{before.stage} (job {before.job}) did not succeed"
    elif state in ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL"):
        reason = _last_error(Path(record.log)) or reason
    last = _last_metrics(run_dir) if record.kind == "train" else {}
    return {"state": state, "restarts": restarts, "reason": reason, **last}


def _executor(folder: Path, resources: Resources, stage: Stage, after: str | None) -> submitit_slurm.SlurmExecutor:
    # exec replaces the batch script's shell, so that Slurm's signals reach the supervisor.
    executor = submitit_slurm.SlurmExecutor(folder, python=f"exec {shlex.quote(sys.executable)}")
    executor.update_parameters(**_parameters(resources, stage, after))
    return executor


def _parameters(resources: Resources, stage: Stage, after: str | None) -> dict[str, Any]:
    """The parameters of sbatch, by submitit's names."""
    additional: dict[str, Any] = {"requeue": True, "signal": f"B:USR1@{resources.signal_seconds}", **resources.options}
    parameters: dict[str, Any] = {
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "partition": resources.partition,
        "dependency": None if after is None else f"afterok:{after}",
        "job_name": stage.name.replace(" ", "-"),
        "time": resources.minutes,
        "cpus_per_task": resources.cpus_per_task,
        "use_srun": False,  # the supervisor starts the ranks
        "stderr_to_stdout": True,
        "setup": [f"cd {shlex.quote(str(stage.home))}", "source slurm/launch.sh"],
        "additional_parameters": additional,
    }
    if stage.kind == "upgrade":  # an upgrade is one process on a CPU
        parameters |= {"nodes": 1, "ntasks_per_node": 1}
    elif resources.gpus_per_node:
        parameters["gpus_per_node"] = resources.gpus_per_node
        # Ranks fill one socket after another, in the order of GPU numbers. Slurm's default alternates between sockets.
        additional.setdefault("distribution", "block:block")
    if after is not None:
        additional["kill-on-invalid-dep"] = "yes"
    return parameters


def _record(job: str, stage: Stage, after: str | None, folder: Path) -> str:
    """Write the record of a submitted job; returns its id, for the stage that waits for it."""
    log = folder / f"{job.removeprefix('local_')}_0_log.out"
    submitted = datetime.now(timezone.utc).isoformat()
    record = Record(job, stage.name, stage.kind, str(stage.run_dir), after, str(log), submitted)
    (folder / "jobs").mkdir(exist_ok=True)
    with atomic_write(folder / "jobs" / f"{job}.json") as file:
        file.write(json.dumps(asdict(record)).encode())
    return job


def _read_record(path: Path) -> Record:
    remedy = "remove it; the job continues, squeue shows it"
    with data_error(f"{path}: is not the record of a job", remedy, (OSError, ValueError, TypeError, RecursionError)):
        record = Record(**json.loads(path.read_bytes()))
    for name, value in vars(record).items():
        if not (isinstance(value, str) and value.isprintable() and len(value) < LONGEST_TEXT) and (name, value) != (
            "after",
            None,
        ):
            raise DataError(f"{path}: its {name} is {str(value)[:50]!r}, not a text of one line; {remedy}")
    return record


def _state(record: Record) -> tuple[str, int, str]:
    """State, restarts and reason, from Slurm's controller or accounting; without Slurm, from submitit's files."""
    job = record.job
    if job.startswith("local_"):
        result = Path(record.log.removesuffix("_log.out") + "_result.pkl")
        if result.exists():
            try:
                return ("COMPLETED" if pickle_load(result)[0] == "success" else "FAILED"), 0, ""
            except Exception as error:  # an incomplete or damaged pickle raises errors of any kind
                return "UNKNOWN", 0, f"{result}: cannot be read ({type(error).__name__}); see its log"
        is_alive = Path("/proc", job.removeprefix("local_")).exists()
        return ("RUNNING" if is_alive else "UNKNOWN"), 0, ""
    try:
        described = described_job(job)
    except UserError:
        try:
            accounted = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
        except UserError:
            return "UNKNOWN", 0, ""
        return (accounted.split() or ["UNKNOWN"])[0], 0, ""
    reason = described.get("Reason", "")
    return described["JobState"], int(described.get("Restarts", 0)), "" if reason == "None" else reason


def _last_metrics(run_dir: Path) -> dict[str, Any]:
    """The last line of training metrics, if it is among the last lines of metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    lines = subprocess.run(
        ["tail", "-n", "3", str(path)], capture_output=True, text=True, errors="replace", check=False
    )
    for line in reversed(lines.stdout.splitlines()):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue  # an incomplete line
        if isinstance(values, dict) and "loss" in values:  # lines without a loss are about held-out samples
            return {
                key: value for key, value in values.items() if isinstance(value, int | float) and abs(value) < 1e300
            }
    return {}


def _last_error(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:  # without its log, the job is still shown in the table
        return ""
    return next((line for line in reversed(lines) if re.match(r"(\w+\.)*\w*[eE]rror: ", line)), "")
