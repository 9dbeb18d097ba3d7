"""From images to a result: the parts of the system, and what goes from one to the next."""

from itertools import pairwise
from pathlib import Path

from figures.canvas import GREEN, LINE, LINE_HEIGHT, ORANGE, QUIET, canvas, tint

EDGE, INSIDE = 0.08, 0.16  # the margin of the figure; from the job's frame to its boxes
LEFT, BOX, GAP, TALL = EDGE + INSIDE, 1.74, 0.36, 0.98  # boxes: the first column, width, space between, height
ROWS = 0.94, 2.22, 3.5  # the upper edges of the boxes
FRAME = LEFT + BOX + 0.24  # the left edge of the job, whose result lies further left
WIDTH = FRAME + 2 * INSIDE + 3 * BOX + 2 * GAP + EDGE
HEIGHT = ROWS[2] + TALL + INSIDE + EDGE
NOTE = (
    "Slurm, torchrun or one process.",
    "On Slurm, it checks the nodes,",
    "and starts again and resumes",
    "after faults and time limits.",
)


def draw(path: Path) -> None:
    """The README's figure."""
    columns = [LEFT, *(FRAME + INSIDE + (BOX + GAP) * number for number in range(3))]
    first, second, third = (row + TALL / 2 for row in ROWS)
    with canvas(path, WIDTH, HEIGHT) as drawing:
        drawing.frame(EDGE, 0.08, WIDTH - 2 * EDGE, 0.46, LINE, fill=tint(QUIET, 0.07))
        drawing.text(EDGE + 0.14, 0.31, "Settings", size=10, bold=True, align="left")
        drawing.text(1.02, 0.31, "configs/*.yaml + group.key=value", size=8.7, mono=True, align="left")
        promise = "checked before the start: all mistakes in one message"
        drawing.text(WIDTH - EDGE - 0.14, 0.31, promise, align="right")

        top, right_edge, bottom = ROWS[0] - INSIDE, WIDTH - EDGE, HEIGHT - EDGE
        step_in = ROWS[2] - INSIDE  # the frame is wider below, around the result
        drawing.line(
            *((FRAME + BOX, top), (right_edge, top), (right_edge, bottom), (EDGE, bottom), (EDGE, step_in)),
            *((FRAME, step_in), (FRAME, top), (FRAME + BOX, top)),
            colour=LINE,
            width=1.1,
            dashed=True,
        )
        drawing.text(columns[1], ROWS[0] + 0.1, "One job", size=10, bold=True, colour=QUIET, align="left")
        for number, line in enumerate(NOTE):
            drawing.text(columns[1], ROWS[0] + 0.34 + LINE_HEIGHT * number, line, colour=QUIET, align="left")

        drawing.box(columns[0], ROWS[0], BOX, TALL, "Images", ["folders, tars,", "zip archives, tables"], QUIET)
        drawing.box(columns[0], ROWS[1], BOX, TALL, "Shards", ["tar files with", "manifest and indexes"], QUIET)
        drawing.box(
            columns[1],
            ROWS[1],
            BOX,
            TALL,
            "Feed",
            ["the position in the run", "decides image, flip,", "time, noise, label drop"],
        )
        drawing.box(columns[2], ROWS[1], BOX, TALL, "Step", ["network, loss,", "ZeRO engine,", "averages (EMA)"])
        drawing.box(
            columns[3],
            ROWS[1],
            BOX,
            TALL,
            "Checkpoint",
            ["fragments that any", "number of GPUs and any", "ZeRO stage can read"],
        )
        drawing.box(
            columns[2],
            ROWS[0],
            BOX,
            TALL,
            "Upgrade",
            ["to a higher resolution:", "larger patches,", "the same function"],
            ORANGE,
        )
        drawing.box(columns[3], ROWS[2], BOX, TALL, "Samples", ["generated in blocks,", "shared among all GPUs"], GREEN)
        drawing.box(
            columns[2],
            ROWS[2],
            BOX,
            TALL,
            "Features",
            ["of Inception or others,", "one file per block"],
            GREEN,
        )
        drawing.box(
            columns[1], ROWS[2], BOX, TALL, "Measures", ["FID and others,", "the best guidance", "and average"], GREEN
        )
        drawing.box(columns[0], ROWS[2], BOX, TALL, "result.json", ["every measure", "and its protocol"], GREEN)

        drawing.arrow((LEFT + BOX / 2, ROWS[0] + TALL), (LEFT + BOX / 2, ROWS[1]))
        for left, right in pairwise(columns):
            drawing.arrow((left + BOX, second), (right, second))
            drawing.arrow((right, third), (left + BOX, third))
        last, step = columns[3] + BOX / 2, columns[2] + BOX / 2
        drawing.arrow((last, ROWS[1] + TALL), (last, ROWS[2]))
        drawing.arrow((last, ROWS[1]), (last, first), (columns[2] + BOX, first))
        drawing.arrow((step, ROWS[0] + TALL), (step, ROWS[1]))
