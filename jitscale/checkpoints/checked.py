"""Checks weights that a tool writes: they are opened again, compared with their config, and only then renamed."""

import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from jitscale.checkpoints.format import MARKER
from jitscale.checkpoints.opening import open_weights
from jitscale.checkpoints.weights import check_finite, check_fits
from jitscale.config import Config
from jitscale.errors import CheckpointError, UserError


@contextmanager
def checked_output(output: Path, config: Config, sets: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary path for weights, a file or a folder, which is renamed to `output` after a check.

    After the `with` block, the weights are opened as any reader opens them. They must belong to the network of `config`
    and have its noise scale, be finite, and hold exactly the weight sets `sets` (moments included). If the folder
    `output` exists, its other files stay. After an error or a kill, nothing new is visible.

    Raises a CheckpointError if the check fails, or `output` cannot be written.
    """
    parent = output if output.is_dir() else output.parent
    aside = parent / f".{output.name}.{socket.gethostname()}.{os.getpid()}.partial"
    staged = aside / (output.name or "output")
    try:
        aside.mkdir(parents=True)
        yield staged
        _check(staged, config, sets)
        _move(staged, output)
    except UserError as error:
        error.args = tuple(part.replace(str(staged), str(output)) for part in error.args)
        raise
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(f"{output}: cannot be written ({reason}); choose another --output") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _check(written: Path, config: Config, sets: Sequence[str]) -> None:
    stored = open_weights(written, config)
    stored.verify()
    check_fits(stored, config)
    found = [*stored.weight_sets, *stored.moments]
    if set(found) != set(sets):
        what = f"{written}: holds the weight sets {', '.join(found)} instead of {', '.join(sets)}"
        raise CheckpointError(f"{what}; nothing was kept")
    check_finite(stored, found)


def _move(source: Path, target: Path) -> None:
    """Rename `source` to `target`; if both are folders, rename its content. A checkpoint replaces an incomplete one."""
    if (source / MARKER).exists():
        shutil.rmtree(target, ignore_errors=True)
    if not (source.is_dir() and target.is_dir()):
        source.replace(target)
        return
    for child in sorted(source.iterdir()):
        _move(child, target / child.name)
