"""One training step of JiT-H/16, 64 images of 256 px, on one H200, over time."""

from pathlib import Path

from figures.canvas import BLUE, GREEN, LINE, LINE_HEIGHT, ORANGE, PURPLE, QUIET, Canvas, canvas

# Milliseconds, all from docs/performance.md. First the sums of "Where a step of H goes".
PRODUCTS, ATTENTION, FUSED, COMPILED, OPTIMIZER, COPIES = 94, 23, 25, 10, 15, 6
STEP = 177  # "On a GPU"
LAUNCHES = 529  # "Launches and waits of the host", on one rank
HOST = 72  # "The host limits small shares": an upper bound for these launches
BACKWARD = 2  # forward passes that a backward pass is worth: counted from shapes, not measured
BUCKETS = 30  # number of buckets of H's gradients, by jitscale.planner.buckets

KINDS = {  # label: time, colour, its share on white, and the line below the bar on which the label stands
    "matrix products": (PRODUCTS, BLUE, 0.5, 0),
    "attention": (ATTENTION, BLUE, 0.36, 0),
    "fused kernels": (FUSED, BLUE, 0.25, 0),
    "compiled": (COMPILED, BLUE, 0.14, 1),
    "optimizer, EMA": (OPTIMIZER, PURPLE, 0.4, 2),
    "copies": (COPIES, LINE, 0.55, 0),
}
NOTES = (
    "Measured: the step, the kernels by kind. Counted: launches and their bound, backward : forward = 2 : 1, buckets.",
    "Not measured: the widths of loader, copy and network.",
)

WIDTH, START, END = 8.4, 1.42, 8.32  # inches: the figure, and the step on the axis of time
FIRST, LANE, TALL = 0.42, 0.54, 0.36  # the first lane, from lane to lane, and the height of a bar


def draw(path: Path) -> None:
    """The lanes, and below them the GPU's time by kind of kernel."""
    forward = sum((PRODUCTS, ATTENTION, FUSED, COMPILED)) / (1 + BACKWARD)
    backward = forward * (1 + BACKWARD)  # its end
    updated = backward + OPTIMIZER
    lanes = [FIRST + LANE * number for number in range(5)]
    kinds = lanes[-1] + LANE + 0.36
    with canvas(path, WIDTH, kinds + TALL + 1.18) as drawing:
        for time in (0, STEP):
            drawing.line((_at(time), 0.3), (_at(time), lanes[-1] + TALL + 0.08), colour=LINE, width=0.9, dashed=True)
        drawing.text(START, 0.17, f"Step n: {STEP} ms", size=10, bold=True, align="left")
        drawing.text(END, 0.17, "JiT-H/16, 64 images of 256 px, one H200", colour=QUIET, align="right")

        _lane(drawing, lanes[0], "Loader", "processes")
        _bar(drawing, lanes[0], 0, STEP, "read and decode the batches of later steps", GREEN, 0.22)
        _lane(drawing, lanes[1], "Copy", "to the GPU")
        _bar(drawing, lanes[1], 0, 5, "", GREEN, 0.5)
        drawing.text(_at(7.5), lanes[1] + TALL / 2, "batch of step n + 3, 13 MB, from page-locked memory", align="left")
        _lane(drawing, lanes[2], "Host", "one thread")
        _bar(drawing, lanes[2], 0, HOST, f"step n + 2: {LAUNCHES} launches, at most {HOST} ms", ORANGE, 0.32)
        _bar(drawing, lanes[2], HOST, STEP, "waits for the end of step n", ORANGE, 0.08)
        _lane(drawing, lanes[3], "GPU", "kernels")
        _bar(drawing, lanes[3], 0, forward, "forward", BLUE, 0.25)
        _bar(drawing, lanes[3], forward, backward, "backward", BLUE, 0.42)
        _bar(drawing, lanes[3], backward, updated, "update", PURPLE, 0.4)
        _bar(drawing, lanes[3], updated, updated + COPIES, "", LINE, 0.55)
        _lane(drawing, lanes[4], "Network", "several GPUs")
        each = (backward - forward) / BUCKETS
        for number in range(BUCKETS):
            _bar(drawing, lanes[4], forward + each * (number + 1), forward + each * (number + 1.75), "", PURPLE, 0.4)
        drawing.text(_at(forward), lanes[4] + TALL / 2, f"gradients, in {BUCKETS} buckets  ", align="right")

        drawing.text(START, kinds - 0.15, "The same kernels by kind, ms", bold=True, align="left")
        start = 0.0
        for label, (time, colour, share, line) in KINDS.items():
            _bar(drawing, kinds, start, start + time, str(time), colour, share)
            middle, under = _at(start + time / 2), kinds + TALL + 0.14 + LINE_HEIGHT * line
            drawing.text(middle, under, label)
            if line:  # the labels of narrow bars stand lower, side by side they would touch
                drawing.line((middle, kinds + TALL + 0.03), (middle, under - 0.08), colour=LINE, width=0.9)
            start += time
        for number, note in enumerate(NOTES):
            drawing.text(0.08, kinds + TALL + 0.8 + LINE_HEIGHT * number, note, size=8.5, colour=QUIET, align="left")


def _at(time: float) -> float:
    return START + (END - START) * time / STEP


def _lane(drawing: Canvas, y: float, name: str, detail: str) -> None:
    drawing.text(0.08, y + TALL / 2 - 0.08, name, bold=True, align="left")
    drawing.text(0.08, y + TALL / 2 + 0.09, detail, size=8.5, colour=QUIET, align="left")


def _bar(drawing: Canvas, y: float, start: float, end: float, label: str, colour: str, share: float) -> None:
    drawing.bar(_at(start), y, _at(end) - _at(start), TALL, colour, share)
    drawing.text((_at(start) + _at(end)) / 2, y + TALL / 2, label)
