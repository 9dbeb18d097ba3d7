"""The decisions of a Slurm job, and the exit codes of its batch script (jitscale/launch/supervisor.py)."""

from pathlib import Path
from typing import NamedTuple

from figures.canvas import BLUE, GREEN, ORANGE, QUIET, Canvas, canvas, tint
from jitscale.errors import ExitCode


class Decision(NamedTuple):
    """The continuation of a job."""

    says: str
    colour: str
    code: int | None  # exit code of the batch script, if it lives to end with one


DONE = Decision("done", GREEN, ExitCode.DONE)
STOP = Decision("stop, one line says why", ORANGE, ExitCode.USER_ERROR)
SAVED = Decision("stop, the state is saved", ORANGE, ExitCode.INTERRUPTED)
AGAIN = Decision("requeue", BLUE, ExitCode.REQUEUE)
WITHOUT = Decision("requeue without the node", BLUE, ExitCode.REQUEUE)
BY_SLURM = Decision("Slurm starts it again", BLUE, None)
CANCELLED = Decision("the job ends", ORANGE, None)

ANY_TIME = "At any time"
STAGES = (  # a stage, what it does, how it may end, and what follows
    (
        "Start",
        ("reads the settings", "and the record of", "earlier starts"),
        (
            ("the run is complete already", DONE),
            ("a wrong setting", STOP),
            ("5 starts in a row without a newer checkpoint", STOP),
        ),
    ),
    (
        "Preflight",
        ("code, GPUs, shards,", "folders and network", "of all ranks"),
        (
            ("missing shards, or the same fault on all nodes", STOP),
            ("a storage fails on all nodes", AGAIN),
            ("a node has a fault, or does not answer", WITHOUT),
        ),
    ),
    (
        "Run",
        ("one rank per GPU, from", "the newest checkpoint", "to the final evaluation"),
        (
            ("the run has recorded its end", DONE),
            ("a mistake in settings or data", STOP),
            ("Ctrl-C: the ranks save", SAVED),
            ("the time limit is near: the ranks save", AGAIN),
            ("a rank dies or hangs; a disk or network fails", WITHOUT),
        ),
    ),
    (
        ANY_TIME,
        ("Slurm ends the job",),
        (
            ("a node fails, preemption, scontrol requeue", BY_SLURM),
            ("scancel; the same command goes on later", CANCELLED),
        ),
    ),
)

LEFT, STAGE, CASES, CHIPS, CHIP = 0.1, 1.76, 2.04, 5.3, 2.36  # inches: edges and widths of the columns
RETURN = CHIPS + CHIP + 0.3  # the line that leads back
WIDTH = RETURN + 0.12
ROW, TALL, BETWEEN, TOP = 0.31, 0.26, 0.22, 0.52  # from row to row, a chip, between stages, above the first one
LANE = 0.14  # the height of the line back


def draw(path: Path) -> None:
    """A row for each end of each stage; the line at the right leads back to the start."""
    height = TOP + sum(ROW * len(cases) + BETWEEN for _, _, cases in STAGES)
    with canvas(path, WIDTH, height) as drawing:
        drawing.text(CASES, 0.36, "How it ends", bold=True, align="left", colour=QUIET)
        drawing.text(CHIPS + 0.1, 0.36, "What follows", bold=True, align="left", colour=QUIET)
        drawing.text(CHIPS + CHIP - 0.1, 0.36, "Exit code", bold=True, align="right", colour=QUIET)
        middle, y, above, lowest = LEFT + STAGE / 2, TOP, 0.0, 0.0
        for name, lines, cases in STAGES:
            tall = ROW * len(cases)
            drawing.box(LEFT, y, STAGE, tall, name, lines, QUIET)
            if above and name != ANY_TIME:
                drawing.arrow((middle, above), (middle, y))
            above = y + tall
            for number, (case, decision) in enumerate(cases):
                level = y + ROW * (number + 0.5)
                drawing.text(CASES, level, case, align="left")
                _chip(drawing, level, decision)
                if decision.colour == BLUE:
                    drawing.line((CHIPS + CHIP, level), (RETURN, level), colour=BLUE)
                    lowest = level
            y = above + BETWEEN
        drawing.arrow((RETURN, lowest), (RETURN, LANE), (middle, LANE), (middle, TOP), colour=BLUE)


def _chip(drawing: Canvas, level: float, decision: Decision) -> None:
    drawing.frame(CHIPS, level - TALL / 2, CHIP, TALL, decision.colour, fill=tint(decision.colour))
    drawing.text(CHIPS + 0.1, level, decision.says, colour=decision.colour, align="left")
    if decision.code is not None:
        drawing.text(CHIPS + CHIP - 0.1, level, str(decision.code), colour=decision.colour, bold=True, align="right")
