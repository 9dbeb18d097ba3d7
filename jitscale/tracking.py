"""Records of a run's numbers: files in its folder, and Weights & Biases if `tracking.wandb` is set.

metrics.jsonl holds steps and held-out losses. evaluations.jsonl holds the measurements while the run trains. The
folders `samples` and `best_samples` hold pictures. wandb_id holds the id of the W&B record. The package wandb is
imported only if the run records there: its import takes most of a second.
"""

import importlib.util
import json
import logging
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from mmap import MAP_PRIVATE, PROT_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from jitscale.addresses import masked
from jitscale.config import Config, to_dict
from jitscale.errors import ConfigError
from jitscale.files import atomic_write

logger = logging.getLogger(__name__)

NOT_MEASURED = ("num_images", "num_real_images", "protocol", "reference")  # keys of a result that are not metrics
WANDB_TIMEOUT = 30.0  # seconds to wait for the server at the start
WANDB_FINISH_TIMEOUT = 30.0  # seconds to wait for the last uploads: a stopped job must end before Slurm kills it
SWEEP_COLUMNS = (  # followed by the distance, and by the Inception Score if it was measured
    *("weights", "guidance_scale", "guidance_interval", "internal_guidance", "internal_interval"),
    "num_images",
)
LONGEST_LINE = 2**20  # bytes; a longer line is damaged
HELD_OUT = "held_out/"  # prefix of the numbers of a held-out loss
_KEY_REMEDY = "Run `wandb login`, set WANDB_API_KEY, or set tracking.wandb=offline"
# Names and folders of pictures: samples during training, and samples of the best setting of the final evaluation.
SAMPLES, BEST_SAMPLES = "samples", "best_samples"


def check_wandb(config: Config) -> None:
    """Refuse `tracking.wandb=online` if W&B finds no key: the run would record offline, which the user did not request.

    W&B looks into the environment, netrc and its settings files. It does not ask the server here, so a key that the
    server rejects is found only when the run begins. Raises a ConfigError if there is no key, if W&B cannot use the key
    that it finds, or if wandb is not installed.
    """
    if config.tracking.wandb != "off" and importlib.util.find_spec("wandb") is None:
        what = f"tracking.wandb={config.tracking.wandb}: the package wandb is not installed in {sys.executable}"
        raise ConfigError(f"{what}; install it (make install), or set tracking.wandb=off")
    if config.tracking.wandb != "online":
        return
    import wandb  # noqa: PLC0415

    if wandb.run is not None:  # an open record has its key already
        return
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        if wandb.login(prompt=False, verify=False):
            return
        settings = wandb.setup().settings
        wandb.teardown()  # ends the service process that setup starts
    except (wandb.errors.Error, ValueError) as error:
        raise ConfigError(f"tracking.wandb=online: {' '.join(str(error).split())} {_KEY_REMEDY}") from error
    # With WANDB_MODE=offline or disabled, the user has decided for this machine, and no key is needed.
    if settings.mode in ("online", "run", "shared"):
        raise ConfigError(f"tracking.wandb=online: no API key for {settings.base_url}. {_KEY_REMEDY}")


class Tracker:
    """Writes the measurements of rank 0. On the other ranks, every method does nothing.

    If W&B or the connection to it fails, training continues. All numbers are written to metrics.jsonl first.
    """

    def __init__(self, config: Config, run_dir: Path, active: bool, resumed_step: int | None) -> None:
        """Open the record of the run in `run_dir`, if `active` (on rank 0).

        Lines after `resumed_step` are dropped, since those steps are run again. With None the files stay as they are,
        because another process may be writing them.
        """
        self._active = active
        self._record: Any = None  # W&B's record; kept until `close`
        self._wandb: Any = None  # the same object; None after W&B has failed
        self._offline = False
        self._unwritten = False
        self._metrics, self._evaluations = run_dir / "metrics.jsonl", run_dir / "evaluations.jsonl"
        if active:
            if resumed_step is not None:
                self.rewind(resumed_step)
            self._metrics.open("a").close()  # fails now if the file cannot be written
            if config.tracking.wandb != "off":
                self._start_wandb(config, run_dir)

    def log(self, values: dict[str, float | int | None]) -> None:
        """Record the numbers of a step, or of held-out samples after it. Values that are not finite become null."""
        clean = {key: _finite(value) for key, value in values.items()}
        self._append(self._metrics, clean)
        self._to_wandb(lambda record: record.log(_known(clean)))

    def _append(self, path: Path, line: dict[str, Any]) -> None:
        if self._active:
            with self._tolerating_full_disks(), path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    @contextmanager
    def _tolerating_full_disks(self) -> Iterator[None]:
        """If the disk is full, lines are lost, but the run continues."""
        try:
            yield
        except OSError as error:
            if not self._unwritten:
                logger.error("%s: cannot be written (%s); lines are lost, training continues", self._metrics, error)
            self._unwritten = True

    def log_image(self, name: str, image: npt.NDArray[np.uint8], images: int) -> None:
        """Record a picture after `images` images seen; it is also saved as a PNG in the run's folder.

        Its shape is (height, width, 3), or (height, width) if it is grey.
        """
        if not self._active:
            return
        path = self._metrics.parent / name / f"images_{images:012d}.png"
        with self._tolerating_full_disks():
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(image).save(path)
        self._to_wandb(lambda record: _send_image(record, name, image, images))

    def log_result(self, result: dict[str, Any], step: int, images: int) -> None:
        """Record the numbers of an evaluation after `step` steps, `images` images seen, in evaluations.jsonl."""
        numbers, weights = _numbers(result), result["protocol"]["weights"]
        self._append(self._evaluations, {"step": step, "images": images, "weights": weights, **numbers})
        named = {f"evaluation/{key}": value for key, value in _known(numbers).items()}
        self._to_wandb(lambda record: record.log({**named, "images": images}))

    def log_few(self, result: dict[str, Any], step: int, images: int) -> None:
        """Record a measurement on few images while training. Its names state the number of images: `fid_5k`."""
        used = result["num_images"]
        count = f"{used // 1000}k" if used % 1000 == 0 else str(used)
        of_samples = {key for key in result if key not in NOT_MEASURED and not key.endswith("_floor")}
        named = {f"{key}_{count}" if key in of_samples else key: value for key, value in result.items()}
        self.log_result(named, step, images)

    def log_final(self, result: dict[str, Any]) -> None:
        """Send the run's final evaluation to W&B: its numbers into the summary, the sweep as a table and a curve.

        `result` holds the metrics; `best`, the setting that they were measured with (weights, guidance_scale and so
        on); and `table`, a row of SWEEP_COLUMNS for each measured setting. Distance and Inception Score of a row may be
        None.
        """
        self._to_wandb(lambda record: _send_final(record, result))

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, since those steps are run again. An incomplete last line is dropped too."""
        for path in (self._metrics, self._evaluations):
            if self._active and path.exists():
                with self._tolerating_full_disks():
                    end, damaged = end_of(path, step)
                    if damaged:
                        left = "the lines before them stay" if end > 0 else "no line is left, the file begins again"
                        logger.warning("%s: %d damaged lines at its end are dropped; %s", path, damaged, left)
                    os.truncate(path, end)

    def close(self) -> None:
        """End the record."""
        if self._record is not None:
            folder = Path(self._record.dir).parent
            sent = self._guarded(self._record.finish)
            # Slurm kills all processes that a rank leaves behind. W&B's service could then still be writing.
            self._guarded(_end_service)
            if self._offline:
                logger.info("to upload the offline record of W&B: wandb sync %s/offline-run-*", folder.parent)
            elif not sent:
                logger.warning("to upload the rest of the record of W&B: wandb sync --include-online %s", folder)

    def _start_wandb(self, config: Config, run_dir: Path) -> None:
        """Begin or continue the run's W&B record under the same id; offline if the server cannot be reached."""
        os.environ.setdefault("WANDB_SILENT", "true")

        def start(offline: bool) -> None:
            import wandb  # noqa: PLC0415

            own = _own_id(run_dir / "wandb_id")
            if not offline:
                check_wandb(config)  # on a terminal, wandb.init would ask for a key and wait
            with _arguments_without_secrets():
                record = wandb.init(
                    project=config.tracking.project,
                    name=config.tracking.name or run_dir.name,
                    id=own,
                    resume="allow",
                    dir=run_dir,
                    mode="offline" if offline else None,  # None: online, unless WANDB_MODE says otherwise
                    config=to_dict(config),
                    settings=wandb.Settings(
                        init_timeout=WANDB_TIMEOUT, finish_timeout=WANDB_FINISH_TIMEOUT, finish_timeout_raises=True
                    ),
                )
            if record.id != own:  # the environment sets another id, as in a sweep of W&B
                logger.warning("W&B records under the id %s of its sweep, not under %s of RUN/wandb_id", record.id, own)
            # The axis is `images`, not W&B's own step counter, which refuses the steps that a resume repeats.
            record.define_metric("*", step_metric="images")
            self._record = self._wandb = record
            self._offline = record.offline

        if config.tracking.wandb == "online":
            if not self._guarded(lambda: start(offline=False)):
                logger.warning("W&B records offline from now on")
                self._guarded(_end_service)  # its service still uses the run's id, which must not be used twice
            elif self._offline or self._wandb.disabled:
                logger.warning("W&B records nothing online: its own settings (WANDB_MODE) disable it")
        if self._wandb is None:
            self._guarded(lambda: start(offline=True))

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        if self._wandb is not None:
            self._guarded(lambda: send(self._wandb))

    def _guarded(self, call: Callable[[], object]) -> bool:
        """Call into W&B. If it raises any error, training continues without W&B. Returns whether the call worked."""
        try:
            call()
        except Exception as error:
            logger.warning("W&B failed (%s: %s); metrics.jsonl continues", type(error).__name__, error)
            self._wandb = None
            return False
        return True


@contextmanager
def _arguments_without_secrets() -> Iterator[None]:
    """Mask the secrets of addresses in sys.argv, because W&B records the command line."""
    words = sys.argv
    sys.argv = [masked(word) for word in words]
    try:
        yield
    finally:
        sys.argv = words


def _own_id(path: Path) -> str:
    """The id in the file `path`. If there is none, or W&B would refuse it, a new id is written."""
    kept = path.read_bytes() if path.exists() else b""
    if not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", kept.strip()):
        if kept:
            logger.warning("%s: damaged, not an id of W&B; the run gets a new id, and so a new record there", path)
        kept = secrets.token_hex(4).encode()
        with atomic_write(path) as file:
            file.write(kept)
    return kept.strip().decode()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl about steps."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if not _is_held_out(line)]


def read_held_out(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl about held-out samples."""
    return [line for line in read_lines(run_dir / "metrics.jsonl") if _is_held_out(line)]


def read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Measurements made while the run trained."""
    return read_lines(run_dir / "evaluations.jsonl")


def held_out_after(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """As `read_held_out`, but only the lines after `step`."""
    return [line for line in _lines_after(run_dir / "metrics.jsonl", step) if _is_held_out(line)]


def evaluations_after(run_dir: Path, step: int) -> list[dict[str, Any]]:
    """As `read_evaluations`, but only the lines after `step`."""
    return _lines_after(run_dir / "evaluations.jsonl", step)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects with a `step`, one per line, without damaged or incomplete lines; empty if there is no file."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        lines = [_parsed(text) for text in file]
    found = [line for line in lines if line is not None]
    if len(found) < len(lines):
        logger.warning("%s: %d lines are damaged or incomplete; they are left out", path, len(lines) - len(found))
    return found


def end_of(path: Path, step: int) -> tuple[int, int]:
    """The byte after the last sound line up to `step`, and the number of damaged lines after it.

    A run writes steps in order. So this reads from the end of the file, and the size of the file costs no time.
    """
    damaged = 0
    for end, line in _from_the_end(path):
        if line is None:
            damaged += 1
        elif line["step"] <= step:
            return end, damaged
    return 0, damaged


def _lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    sound = (line for _, line in _from_the_end(path) if line is not None)
    return list(takewhile(lambda line: line["step"] > step, sound))[::-1]


def _from_the_end(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The end and the content (None: damaged) of each complete line, the last line first."""
    size = path.stat().st_size
    if size == 0:
        return
    with path.open("rb") as file, mmap(file.fileno(), size, flags=MAP_PRIVATE, prot=PROT_READ) as text:
        end = text.rfind(b"\n") + 1
        while end > 0:
            begin = text.rfind(b"\n", 0, end - 1) + 1
            yield end, _parsed(text[begin:end]) if end - begin <= LONGEST_LINE else None
            end = begin


def _parsed(text: bytes) -> dict[str, Any] | None:
    """The object of a line, None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):  # bad bytes are a ValueError too
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _is_held_out(line: dict[str, Any]) -> bool:
    return any(key.startswith(HELD_OUT) for key in line)


def _numbers(result: dict[str, Any]) -> dict[str, float | int | None]:
    """The metrics of an evaluation. Values that are not finite become null."""
    return {name: _finite(value) for name, value in result.items() if isinstance(value, float | int)}


def _end_service() -> None:
    import wandb  # noqa: PLC0415

    wandb.teardown()


def _send_image(record: Any, name: str, image: npt.NDArray[np.uint8], images: int) -> None:
    import wandb  # noqa: PLC0415

    record.log({name: wandb.Image(image), "images": images})


def _send_final(record: Any, result: dict[str, Any]) -> None:
    import wandb  # noqa: PLC0415

    rows, distance = result["table"], distance_of(result)
    if len(rows) > 1:
        scores = ["inception_score"] if "inception_score" in rows[0] else []
        columns: list[str | int] = [*SWEEP_COLUMNS, distance, *scores]
        data = [[_cell(row.get(str(column))) for column in columns] for row in rows]
        record.log({"sweep": wandb.Table(columns=columns, data=data)})
        along, lines = sweep_lines(rows)
        if lines:
            curve = wandb.plot.line_series(
                xs=[[row[along] for row in line] for line in lines.values()],
                ys=[[row[distance] for row in line] for line in lines.values()],
                keys=list(lines),
                title=f"{distance_title(distance)} over {along.replace('_', ' ')}",
                xname=along,
            )
            record.log({f"{distance}_over_{along.removesuffix('_scale')}": curve})
    best = {f"best/{name}": _cell(value) for name, value in result["best"].items()}
    record.summary.update(_known({**_numbers(result), **best}))


def _known(values: dict[str, Any]) -> dict[str, Any]:
    """`values` without nulls, which W&B would show as text."""
    return {name: value for name, value in values.items() if value is not None}


def _cell(value: Any) -> Any:
    """The cell of a table: an interval becomes `low:high`, because W&B can neither filter nor sort lists."""
    return ":".join(f"{end:g}" for end in value) if isinstance(value, list | tuple) else value


def distance_of(measured: Mapping[str, Any]) -> str:
    """The name of the distance that ranks settings: `fid`, or else `fd_<network>` of the main network."""
    return "fid" if "fid" in measured else next((key for key in measured if key.startswith("fd_")), "fid")


def distance_title(distance: str) -> str:
    """The name of a distance for titles. Only the distance of Inception is called FID."""
    return distance.upper() if distance == "fid" else distance.replace("fd_", "FD ")


def sweep_lines(rows: Iterable[dict[str, Any]]) -> tuple[str, dict[str, list[dict[str, Any]]]]:
    """The coarse part of a sweep as lines of a plot: the setting on the x axis, and the rows of each line by its name.

    The x axis is the guidance scale, or internal guidance if only that is swept. The name of a line states its weights,
    and the other settings that differ. Rows without a distance are left out.
    """
    measured = [row for row in rows if row.get(distance_of(row)) is not None]
    fewest = min((row["num_images"] for row in measured), default=0)
    coarse = [row for row in measured if row["num_images"] == fewest]
    texts = {"guidance_interval": "", "internal_guidance": "internal ", "internal_interval": "internal in "}
    differing = [name for name in ("guidance_scale", *texts) if len({_cell(row.get(name)) for row in coarse}) > 1]
    inner = "internal_guidance" in differing and "guidance_scale" not in differing
    along = "internal_guidance" if inner else "guidance_scale"
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in coarse:
        others = [f"{texts[name]}{_cell(row.get(name))}" for name in differing if name in texts and name != along]
        lines.setdefault(", ".join([row["weights"], *others]), []).append(row)
    return along, {name: sorted(line, key=lambda row: row[along]) for name, line in lines.items()}


def _finite(value: float | int | None) -> float | int | None:
    return value if value is None or math.isfinite(value) else None
