"""Errors that a user can cause, and the exit code and the message at the end of a process."""

import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path

from jitscale.addresses import masked


class ExitCode(IntEnum):
    """Exit codes of every command of the project; schedulers and scripts rely on them.

    Each has its `meaning` and its `remedy`, which docs/reference.md shows.
    """

    meaning: str
    remedy: str  # what the user does next

    def __new__(cls, number: int, meaning: str, remedy: str) -> "ExitCode":
        """A code with its words."""
        code = int.__new__(cls, number)
        code._value_, code.meaning, code.remedy = number, meaning, remedy
        return code

    DONE = 0, "The command has done all its work.", "Nothing."
    FAILED = (
        1,
        "A failure that a new start may survive: a disk or network that fails or is full, a lost rank, a rank that "
        "hangs, a GPU whose memory another process holds. Or an error that nobody expected, with a traceback.",
        "Read the line that begins with `error:`, or the traceback. Repair the cause and start the same command again. "
        "A Slurm job of this project returns to the queue by itself.",
    )
    USER_ERROR = (
        2,
        "A mistake in the command, its settings, its paths or its data. One line says what, where and the remedy.",
        "Follow the line. A new start alone repeats the mistake.",
    )
    # 75 is EX_TEMPFAIL of sysexits.h, 130 is 128 + SIGINT as in shells.
    REQUEUE = (
        75,
        "A signal (SIGTERM, SIGUSR1, SIGUSR2) asked the run to stop, and its state is saved.",
        "Start the same command again: it resumes. A Slurm job of this project is already back in the queue.",
    )
    INTERRUPTED = (
        130,
        "Ctrl-C (SIGINT) stopped the command. Training saved its state first.",
        "Start the same command again: it resumes. A Slurm job does not return to the queue.",
    )


_WRONG_PATHS = (
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    errno.ENXIO,  # the path is a socket
    errno.EINVAL,  # a damaged file states impossible offsets or sizes
    None,  # the error comes from a library, not from the system
)


class UserError(ValueError):
    """An error that the user can correct. The message is one line: what, where, which limit and the remedy.

    The message masks secrets in addresses.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in parts))


class LauncherError(UserError):
    """The launcher's variables do not determine this process's rank, so every process prints the error."""


class RendezvousError(RuntimeError):
    """Some ranks did not connect. The user is usually not the cause, and a new start may succeed."""


class RankLostError(RendezvousError):
    """Another rank has ended. That rank prints the cause."""


class GPUMemoryError(RuntimeError):
    """A GPU's memory is full.

    If this process holds most of it, the settings ask for too much: `from_settings`, exit code 2. Otherwise another
    process holds memory on this GPU, and a new start may succeed: exit code 1, so that a job is requeued.
    """

    def __init__(self, message: str, *, from_settings: bool) -> None:
        super().__init__(message)
        self.from_settings = from_settings


class ConfigError(UserError):
    """A setting is unknown or impossible."""


class DataError(UserError):
    """Shards are missing or damaged, or do not fit the configuration."""


@contextmanager
def data_error(
    what: str, remedy: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError
) -> Iterator[None]:
    """Turn `errors` into a `DataError` whose message is `what`, the error and the remedy; `what` names the file.

    An OSError becomes a `StorageError`.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or error  # without the file's name, which `what` has already
        message = f"{what} ({reason}); {remedy}"
        raise (StorageError.of(error, message) if isinstance(error, OSError) else DataError(message)) from error


class StorageError(DataError):
    """The disk or the network behind a file failed, or the disk is full. The storage must be repaired.

    A new start may succeed, so a job is requeued (exit code 1), unless the path `is_wrong`.
    """

    is_wrong = False  # the path does not exist, is of another kind, or is forbidden

    @classmethod
    def of(cls, error: OSError, message: str) -> "StorageError":
        """The StorageError for `error`, with this `message`."""
        made = cls(message)
        made.is_wrong = is_wrong_path(error)
        return made


def is_wrong_path(error: OSError) -> bool:
    """Whether the path does not exist, is of another kind, or is forbidden: the storage itself works."""
    return error.errno in _WRONG_PATHS


class StopRequestedError(UserError):
    """A signal stopped the process during a measurement."""


class CheckpointError(UserError):
    """A checkpoint is missing or damaged, or belongs to another model."""


def unreadable(path: Path, error: object, damage: str, remedy: str = "start again when the storage works") -> UserError:
    """The error to raise if the weights in `path` cannot be read.

    If the storage fails, it is a StorageError with `remedy`: the checkpoint may be sound, and removing it would not
    help. Otherwise it is a CheckpointError with the message `damage`.
    """
    if isinstance(error, OSError) and not is_wrong_path(error):
        return StorageError.of(error, f"{path}: cannot be read ({error.strerror}); {remedy}")
    return CheckpointError(damage)


def first_line(error: BaseException) -> str:
    """The first line of an error's message. Libraries add more, such as torch's stack."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_with_message(command: Callable[[], int], *, same_on_all_ranks: bool = True) -> None:
    """Run `command` and leave the process with its exit code.

    A `UserError` becomes one message and exit code 2. A `RendezvousError`, an OSError, or a `StorageError` whose path
    is right becomes one message and exit code 1. A `GPUMemoryError` becomes one message and either code.

    If errors are the `same_on_all_ranks`, only global rank 0 prints them. Only commands that call
    `adopt_launcher_environment` may pass True: without it, RANK may be a leftover of another command.
    """
    try:
        code = command()
    except (UserError, RendezvousError, GPUMemoryError, OSError) as error:
        may_pass = isinstance(error, StorageError) and not error.is_wrong
        mistaken = error.from_settings if isinstance(error, GPUMemoryError) else isinstance(error, UserError)
        code = ExitCode.USER_ERROR if mistaken and not may_pass else ExitCode.FAILED
        own = (LauncherError, RendezvousError, GPUMemoryError, OSError)
        of_one_rank = isinstance(error, own) or not same_on_all_ranks
        if of_one_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {escaped(str(error))}", file=sys.stderr)
        if not isinstance(error, RankLostError):  # torchrun must name the other rank as the cause
            _tell_torchrun(f"error: {escaped(str(error))}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    # This skips the interpreter's teardown. There, threads of communication libraries can abort a finished process and
    # turn its exit code 0 into a failure.
    os._exit(int(code))


def _tell_torchrun(message: str) -> None:
    """Make torchrun's summary, the last output on the terminal, show the message and not a traceback.

    The file has the format of torch.distributed.elastic's ErrorHandler. Writing it here avoids an import of torch.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:  # the message itself is printed already
            json.dump({"message": {"message": message, "extraInfo": more}}, file)


def escaped(message: str) -> str:
    """The message with its control characters escaped, also line breaks unless an indented line follows."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]|\n(?!  )", lambda found: repr(found[0])[1:-1], message)
