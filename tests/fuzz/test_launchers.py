"""Environment variables of launchers, and command lines of all commands."""

import os
from functools import partial

import pytest

from jitscale.launch.slurm import SlurmJob
from jitscale.launcher_environment import TORCHRUN, adopt_launcher_environment, positive_setting
from tests.support.fuzzing import Command, Fuzzer, Mutator, done, tool
from tests.support.tiny import model_yaml

pytestmark = pytest.mark.slow

SRUN = {"STEP_ID": "0", "PROCID": "1", "STEP_NUM_TASKS": "2", "LOCALID": "1", "STEP_NODELIST": "n[1-2]", "JOB_ID": "17"}
JOB = {"JOB_NODELIST": "n[1-2]", "JOB_PARTITION": "gpu", "NTASKS": "2", "RESTART_COUNT": "0", "ARRAY_JOB_ID": "16"}
SLURM = {f"SLURM_{name}": value for name, value in {**SRUN, **JOB, "ARRAY_TASK_ID": "3"}.items()}
RANKS = dict(zip(TORCHRUN, ("1", "2", "1", "127.0.0.1", "29500"), strict=True))
LISTS = [
    "n[1-",
    "n[1-99999999]",
    "n[3-1]",
    "n[a-b]",
    "[1]",
    "n[1-2",
    "n1,,n2",
    "n[1-2][3-4]",
    "n[]",
    ",",
    "n[001-1000000000000]",
]
OWN = ["JITSCALE_MEETING_SECONDS", "JITSCALE_PREFLIGHT_SECONDS", "JITSCALE_MOST_RETRIES"]
WORDS: dict[str, list[list[object]]] = {
    "convert_checkpoint": [["--checkpoint", "no"], ["--to", "run"], ["--config", "no"], ["--images", 3]],
    "index_shards": [["no"], ["--workers", 1], ["--class-names", "no"]],
    "inspect_shards": [["no"], ["--workers", 1], ["--contact-sheet", "x.png"]],
    "make_shards": [["--input", "no"], ["--resolution", 8], ["--codec", "png"], ["--workers", 1]],
    "plan": [["--config", "no"], ["--gpus", 4], ["--gpu-memory", "80GB"], ["optim.lr=1"]],
    "sample": [["--checkpoint", "no"], ["--classes", 1, 2], ["--seed", 3], ["--steps", 2]],
    "gallery": [["no"]],
}
CONFIG = f"""
{model_yaml()}
data: {{batch_size: 4, num_workers: 0, shards: nowhere}}
run: {{max_steps: 1, device: cpu}}
"""


def test_variables_of_launchers(fuzz: Fuzzer) -> None:
    (fuzz.inputs / "config.yaml").write_text(CONFIG)
    words = ["--config", str(fuzz.inputs / "config.yaml"), f"run.dir={fuzz.output}"]
    outer = [name for name in os.environ if name.startswith(("SLURM_", "JITSCALE_")) or name in RANKS]

    def changed(mutator: Mutator, sound: dict[str, str]) -> dict[str, str]:
        found = dict(sound)
        for _ in range(mutator.random.randint(1, 3) if mutator.active else 0):
            name = mutator.random.choice([*SLURM, *RANKS, *OWN])
            if mutator.often(0.4):
                found.pop(name, None)
            else:
                found[name] = mutator.random.choice(LISTS) if "LIST" in name else mutator.text()
        return {name: value for name, value in found.items() if "\0" not in value}

    def under(variables: dict[str, str], command: Command) -> Command:
        def call() -> int:
            for name in outer:
                os.environ.pop(name, None)
            os.environ.update(
                (name, value.encode(errors="surrogatepass").decode(errors="ignore"))
                for name, value in variables.items()
            )
            return command()

        return call

    def rank(mutator: Mutator) -> Command:
        return under(changed(mutator, mutator.random.choice([SLURM, RANKS])), done(adopt_launcher_environment))

    def job(mutator: Mutator) -> Command:
        return under(
            changed(mutator, SLURM), done(lambda: (SlurmJob.current(), *(positive_setting(name, 1.0) for name in OWN)))
        )

    def print_config(mutator: Mutator) -> Command:
        sound = mutator.random.choice([SLURM, RANKS, {}])
        return under(changed(mutator, sound), tool("jitscale.train", [*words, "--print-config"]))

    def supervised(mutator: Mutator) -> Command:
        return under(
            changed(mutator, SLURM),
            tool("jitscale.launch.supervisor", [mutator.random.choice(["train", "evaluate"]), *words]),
        )

    fuzz.run("variables: who is a rank", 600, rank)
    fuzz.run("variables: a batch script's", 400, job)
    fuzz.run("variables: train", 100, print_config)
    fuzz.run("variables: supervisor", 100, lambda m: supervised(m) if m.active else print_config(m))
    fuzz.finish()


def test_command_lines(fuzz: Fuzzer) -> None:
    """No file that they name exists, so each command line is refused, or answered with help."""

    def command(name: str, mutator: Mutator) -> Command:
        output = [] if name in ("plan", "index_shards", "inspect_shards") else [["--output", fuzz.output / "x"]]
        return tool(name, mutator.arguments(*WORDS[name], *output) if mutator.active else ["--help"])

    for name in WORDS:
        fuzz.run(f"words: {name}", 40, partial(command, name))
    fuzz.finish()
