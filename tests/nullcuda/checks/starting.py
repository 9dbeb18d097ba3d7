"""Starting a run: as a Slurm job, on two ranks, without an installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from tests.nullcuda.bench import (
    CHECKOUT,
    CONFIG,
    EAGER,
    KIT,
    SMALL,
    STEP,
    Bench,
    Finished,
    Outcome,
    check,
    free_port,
    idle,
    to_its_end,
)

SRUN = '''"""srun for one machine: the tasks with Slurm's variables; a task that ends badly ends all."""
import os, subprocess, sys, time
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words.pop(0)
count = int(os.environ["SLURM_NTASKS"])
tasks = []
for number in range(count):
    own = {"SLURM_STEP_ID": "0", "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NTASKS": str(count),
           "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"]}
    tasks.append(subprocess.Popen(words, env={**os.environ, **own}))
while any(task.poll() is None for task in tasks) and not any(task.poll() for task in tasks):
    time.sleep(0.1)
worst = 0
for number, task in enumerate(tasks):
    if task.poll():
        node = os.environ["SLURM_JOB_NODELIST"]
        print(f"srun: error: {node}: task {number}: Exited with exit code {task.returncode}", flush=True)
        worst = max(worst, task.returncode)
for task in tasks:
    if task.poll() is None:
        task.kill()
        task.wait()
sys.exit(worst)
'''
SCONTROL = """case "$1 $2" in "show hostnames") echo "$3" ;; "show job") echo "JobState=RUNNING" ;; esac"""
SINFO = '''echo "$SLURM_JOB_NODELIST idle"'''


@check()
def preflight(bench: Bench) -> Outcome:
    """A Slurm job of two tasks: batch script, supervisor, preflight and training.

    Stand-ins replace srun, scontrol and sinfo.
    """
    programs = bench.scratch / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "srun.py").write_text(SRUN)
    scripts = {"srun": f'exec {sys.executable} {programs}/srun.py "$@"', "scontrol": SCONTROL, "sinfo": SINFO}
    scripts["rank_python"] = f'exec {sys.executable} {KIT}/inside.py "$@"'
    for name, text in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_CPUS_PER_TASK": "1",
    }
    job |= {"SLURM_JOB_PARTITION": "null", "JITSCALE_HOME": str(CHECKOUT), "JITSCALE_PYTHON": sys.executable}
    job |= {"JITSCALE_RANK_PYTHON": str(programs / "rank_python"), "JITSCALE_PREFLIGHT_SECONDS": "60"}
    job |= {"PATH": f"{programs}:{os.environ['PATH']}"}
    places = [f"run.dir={bench.scratch / 'runs/preflight'}", f"data.shards={bench.shards(32)}"]
    done = bench.run("preflight", ["bash", "slurm/train_jit_h.sh", *SMALL, *EAGER, *places], job)
    fit = re.search(r"preflight: .*", done.output) if "are fit" in done.output else None
    if fit is None:
        return Outcome(False, f"the preflight failed, {reason_of_ranks(done, ['gpu'])}")
    if done.code != 0:
        return Outcome(
            False, f"{fit[0].split(';')[0]}; then training failed, {reason_of_ranks(done, ['probe', 'train_step'])}"
        )
    if fault := idle(done):
        return Outcome(False, fault)
    return Outcome(
        True, f"{fit[0].split(';')[0].removeprefix('preflight: ')}; the job ran to its end in {done.seconds:.0f} s"
    )


def reason_of_ranks(done: Finished, needed: Sequence[str]) -> str:
    """The reason of the ranks, without the lines of srun and of the supervisor."""
    lines = [line for line in done.output.splitlines() if not re.search(r"supervisor:|srun: error", line)]
    return Finished(done.code, "\n".join(lines), done.report, 0).why(needed, several=True)


def both_ranks(done: list[Finished]) -> Outcome:
    failed = [one for one in done if one.code != 0]
    # Report the first failed rank: the other one only lost its peer.
    if failed:
        first = min(failed, key=lambda one: one.seconds)
        return Outcome(False, f"rank {done.index(first)}: {first.why()}")
    return to_its_end(done[0], ", 2 ranks")


@check()
def two_ranks(bench: Bench) -> Outcome:
    """Two ranks that see all GPUs."""
    return both_ranks(bench.ranks("two_ranks", EAGER, "8"))


@check()
def own_gpu(bench: Bench) -> Outcome:
    """Two ranks that see one GPU each, as with `--gpus-per-task=1`: LOCAL_RANK=1 and one device."""
    return both_ranks(bench.ranks("own_gpu", EAGER, "1"))


@check()
def uninstalled(bench: Bench) -> Outcome:
    """Training from a checkout without an installation, found by PYTHONPATH only."""
    copy = bench.scratch / "checkout"
    for folder in ("jitscale", "configs"):
        shutil.copytree(CHECKOUT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    names = "[d.metadata['Name'] for d in importlib.metadata.distributions()]"
    asked = f"import importlib.metadata, sys; sys.exit('jitscale' in {names})"
    variables = {"PYTHONPATH": str(copy)}
    if subprocess.run([sys.executable, "-c", asked], env={**os.environ, **variables}, cwd=copy, check=False).returncode:
        return Outcome(False, "jitscale is installed in this environment: pip uninstall jitscale")
    places = [
        f"run.dir={bench.scratch / 'runs/uninstalled'}",
        f"data.shards={bench.shards(32)}",
        f"run.max_steps={STEP}",
    ]
    return to_its_end(
        bench.module("uninstalled", "jitscale.train", ["--config", CONFIG, *SMALL, *EAGER, *places], variables, copy)
    )
