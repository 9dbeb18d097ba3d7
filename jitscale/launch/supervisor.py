"""The work of the batch script inside a Slurm job: check the nodes, start the ranks, decide how to continue.

    python -m jitscale.launch.supervisor train --config configs/jit_h_256.yaml optim.lr=1e-4
    python -m jitscale.launch.supervisor evaluate --run runs/jit_h_256 evaluation.guidance_scale=2.2

The run itself records that it is complete. If the ranks end for another reason (the time limit's signal, a dead node, a
crash), the job is requeued: it starts with the same command and continues from its newest checkpoint. After an error of
the user's, or after several starts without progress, the job ends with a message. Nodes that the preflight or a crash
names are excluded from the next start, if the partition has enough other nodes.
"""

import argparse
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from jitscale import run_folder
from jitscale.checkpoints.format import complete_checkpoints
from jitscale.command import Parser, complete_source, evaluate_parser, train_parser
from jitscale.config import Config, load_config
from jitscale.errors import ExitCode, exit_with_message
from jitscale.evaluation.real_images import finished_parts
from jitscale.launch.preflight import FAULT, SHARED_FAULT
from jitscale.launch.slurm import SlurmJob, ask, check_commands, described_job, failed_tasks, usable_nodes
from jitscale.launcher_environment import TORCHRUN, positive_setting
from jitscale.progressive import run_dirs
from jitscale.tracking import check_wandb

logger = logging.getLogger(__name__)

LEFT_OVER = set(TORCHRUN) - {"MASTER_PORT"}  # slurm/launch.sh sets the port
PREFLIGHT_LIMIT = 600.0  # seconds; a longer preflight is killed
TAIL_LINES = 2000  # lines at the end of the ranks' output that are searched for failed tasks


@dataclass
class Work:
    """The work of the ranks."""

    command: str  # train or evaluate
    arguments: list[str]  # arguments of the command
    config: Config
    preflight_arguments: list[str]
    is_done: bool  # an earlier job has completed it

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.run.dir)

    @property
    def progress_mark(self) -> int:
        """The progress: steps of the newest checkpoints of all stages, plus finished parts of evaluations."""
        trained = run_dirs(self.run_dir) if self.command == "train" else []
        newest = [folder for run_dir in trained for folder in complete_checkpoints(run_dir)[-1:]]
        return finished_parts(self.config) + sum(1 + int(folder.name.removeprefix("step_")) for folder in newest)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and supervise; returns the batch script's exit code."""
    parser = Parser(__doc__, prog="python -m jitscale.launch.supervisor")
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the arguments of python -m jitscale.COMMAND")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s supervisor: %(message)s", stream=sys.stdout)
    job = SlurmJob.current()
    return Supervisor(job, work_of(options.command, options.arguments, job.tasks)).run()


def work_of(command: str, arguments: list[str], tasks: int) -> Work:
    """The work for the arguments, which are checked before the ranks start.

    Raises a UserError if the configuration is impossible or W&B has no key. Raises as `complete_source`.
    """
    done = False
    if command == "train":
        options = train_parser().parse_intermixed_args(arguments)
        overrides = options.overrides
        config = load_config(options.config, overrides, world_size=tasks, needs_shards=True)
        done = run_folder.is_complete_under(config)
        if not done and "JITSCALE_RANK_PYTHON" not in os.environ:  # a container may have the key; its ranks check
            check_wandb(config)
    else:
        options = evaluate_parser().parse_intermixed_args(arguments)
        complete_source(options)
        overrides = [*options.overrides, *([] if options.run is None else [f"run.dir={options.run}"])]
        config = load_config(options.config, overrides)
    preflight = ["--work", command, "--config", str(options.config), *overrides]
    return Work(command, arguments, config, preflight, done)


class Supervisor:
    """One start of a job."""

    def __init__(self, job: SlurmJob, work: Work) -> None:
        self.job, self.work = job, work
        self.attempts = run_folder.Attempts()
        self.srun: subprocess.Popen[str] | None = None
        self.forwards = False  # signals go to the ranks, but not to the preflight, which has nothing to save
        self.asked_to_stop = False  # by the time limit's warning, or by the user
        self.ended_by_slurm = False  # cancelled or preempted; Slurm decides whether the job is requeued
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._forward)

    def run(self) -> int:
        """Check, start, decide; returns the exit code of the batch script.

        Raises a UserError if several starts in a row brought no progress, or if Slurm's commands are missing.
        """
        check_commands()
        work = self.work
        if work.is_done or (self.job.restarts > 0 and run_folder.is_complete(work.run_dir, work.command)):
            logger.info("%s is complete; there is no work left", work.run_dir)
            return ExitCode.DONE
        retries = int(positive_setting("JITSCALE_MOST_RETRIES", run_folder.MOST_WITHOUT_PROGRESS))
        self.attempts = run_folder.Attempts.begin(work.run_dir, work.progress_mark, retries)
        start = f"start {self.attempts.starts} of {work.run_dir} at progress mark {self.attempts.position}"
        logger.info("job %s, %s on %s", self.job.id, start, ",".join(self.job.nodes))
        code, output = self._srun("preflight", "launch.preflight", work.preflight_arguments, limit=PREFLIGHT_LIMIT)
        if code == ExitCode.USER_ERROR:
            return code
        if self.asked_to_stop:
            return self._again("asked to stop before the first step", [])
        if code != ExitCode.DONE:
            named = [line.split()[2].rstrip(":") for line in output.splitlines() if line.startswith(FAULT)]
            shared = any(line.startswith(SHARED_FAULT) for line in output.splitlines())
            return self._again("the preflight failed", [] if shared else named or failed_tasks(output))
        run_folder.forget_completion(work.run_dir, work.command)
        code, output = self._srun(work.command, work.command, work.arguments)
        if run_folder.is_complete(work.run_dir, work.command):
            logger.info("%s is complete", work.run_dir)
            return ExitCode.DONE
        if code == ExitCode.USER_ERROR:
            logger.error("%s: the error above would come again; correct it and submit the job again", work.run_dir)
            return code
        if code == ExitCode.INTERRUPTED:
            logger.info("%s: stopped by Ctrl-C (SIGINT); the state is saved, submit it again to continue", work.run_dir)
            return code
        if code == ExitCode.REQUEUE:
            return self._again("asked to stop; the state is saved", [])
        if self.asked_to_stop:
            return self._again("asked to stop before the ranks could save", [])
        return self._again(f"{work.command} ended with code {code} before its end", failed_tasks(output)[:1])

    def _srun(self, what: str, module: str, arguments: list[str], limit: float | None = None) -> tuple[int, str]:
        """Start a module of the package on all ranks; returns its exit code and the last lines of output."""
        if self.asked_to_stop:
            return ExitCode.REQUEUE, ""
        # The ranks are tasks of srun, so they must not inherit the variables of another launcher.
        environment = {name: value for name, value in os.environ.items() if name not in LEFT_OVER}
        environment["JITSCALE_NODES"] = ",".join(self.job.nodes)
        self.forwards = limit is None
        python = os.environ.get("JITSCALE_RANK_PYTHON", sys.executable)
        # If a rank fails, srun must end all ranks: the others would wait for it in a collective.
        command = ["srun", "--kill-on-bad-exit=1", f"--job-name={what}", python, "-u", "-m"]
        command += [f"jitscale.{module}", *arguments]
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as self.srun:
            stdout = self.srun.stdout
            assert stdout is not None

            def pass_on() -> None:
                for line in stdout:
                    print(line, end="", flush=True)
                    tail.append(line)

            reader = threading.Thread(target=pass_on, daemon=True)
            reader.start()
            try:
                code = self.srun.wait(limit)
            except subprocess.TimeoutExpired:
                logger.error("%s: not finished after %.0f s; it is killed", what, limit)
                self.srun.kill()
                code = self.srun.wait()
            reader.join(timeout=10.0)
        self.srun = None
        logger.info("%s: srun ended with code %d", what, code)
        return code, "".join(tail)

    def _again(self, reason: str, nodes: list[str]) -> int:
        """Requeue the job, without the failed `nodes`."""
        self.attempts.last_reason = reason
        job = self.job.id
        if self.ended_by_slurm and described_job(job).get("JobState") not in ("RUNNING", "COMPLETING"):
            self.attempts.write(self.work.run_dir)
            logger.info("%s; Slurm has ended this start", reason)
            return ExitCode.REQUEUE
        new = self.attempts.exclude([node for node in nodes if node in self.job.nodes])
        excluded = self.attempts.excluded
        if len(usable_nodes(self.job.partition) - set(excluded)) < len(self.job.nodes):
            # Too few nodes are left, so failed nodes get another chance.
            missing = f"the partition has no {len(self.job.nodes)} nodes without {', '.join(excluded)}"
            logger.warning("%s; these nodes are allowed again", missing)
            self.attempts.excluded = []
        self.attempts.write(self.work.run_dir)
        logger.info("%s%s; the job is requeued", reason, f"; excluded: {', '.join(new)}" if new else "")
        # Requeuing sends SIGTERM to all processes of this script, and scontrol must still finish.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ask("scontrol", "requeue", job)
        if self.attempts.excluded:
            ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(self.attempts.excluded)}")
        return ExitCode.REQUEUE

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop = True
        self.ended_by_slurm = self.ended_by_slurm or number == signal.SIGTERM
        if self.srun is not None and self.srun.poll() is None and self.forwards:
            self.srun.send_signal(number)


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
