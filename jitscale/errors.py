"""The errors that a user can cause, and the exit codes and messages with which a process ends."""

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
        "hangs. Or an error that nobody expected, with a traceback.",
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
    errno.ENXIO,  # of a socket that is opened
    errno.EINVAL,  # of a damaged file, whose numbers no file can have
    None,  # said by a library, not by the system
)


class UserError(ValueError):
    """Something the user can mend. The message says what, where, which limit and the remedy, in one line.

    Secrets in addresses are masked in it.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(masked(part) if isinstance(part, str) else part for part in parts))


class LauncherError(UserError):
    """The launcher's variables do not say which rank this process is, so every process prints it."""


class RendezvousError(RuntimeError):
    """Some ranks did not come. In general this is no mistake of the user's: a new start may succeed."""


class RankLostError(RendezvousError):
    """Another rank has ended, which has a message of its own."""


class ConfigError(UserError):
    """The configuration asks for something unknown or impossible."""


class DataError(UserError):
    """Shards that are missing, damaged, or do not fit the configuration."""


@contextmanager
def data_error(
    what: str, remedy: str, errors: type[Exception] | tuple[type[Exception], ...] = OSError
) -> Iterator[None]:
    """Turn `errors` into a `DataError` that says `what`, the error and the remedy; `what` names the file.

    An OSError becomes a `StorageError`.
    """
    try:
        yield
    except errors as error:
        reason = getattr(error, "strerror", None) or error  # without the file's name, which would stand there twice
        message = f"{what} ({reason}); {remedy}"
        raise (StorageError.of(error, message) if isinstance(error, OSError) else DataError(message)) from error


class StorageError(DataError):
    """A disk or a network behind a file that failed, or is full: mending it helps, not another command.

    A new start may succeed, and a job is put back into the queue (exit code 1), unless the path `is_wrong`.
    """

    is_wrong = False  # the path does not exist, is of another kind, or is forbidden

    @classmethod
    def of(cls, error: OSError, message: str) -> "StorageError":
        """What `error` leads to, in the words of `message`."""
        made = cls(message)
        made.is_wrong = is_wrong_path(error)
        return made


def is_wrong_path(error: OSError) -> bool:
    """Whether the path does not exist, is of another kind, or is forbidden: the storage itself works."""
    return error.errno in _WRONG_PATHS


class StopRequestedError(UserError):
    """A signal asked the process to stop while it measured."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


def unreadable(path: Path, error: object, damage: str, remedy: str = "start again when the storage works") -> UserError:
    """What a read of `path`, a file of weights, leads to: a StorageError with `remedy`, or a CheckpointError, `damage`.

    A storage that fails is no damage: to remove a sound checkpoint or choose another would mend nothing.
    """
    if isinstance(error, OSError) and not is_wrong_path(error):
        return StorageError.of(error, f"{path}: cannot be read ({error.strerror}); {remedy}")
    return CheckpointError(damage)


def first_line(error: BaseException) -> str:
    """The message of an error, without the lines that libraries write below it, such as torch's stack."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def exit_with_message(command: Callable[[], int], *, same_on_all_ranks: bool = True) -> None:
    """Run `command` and leave the process with its exit code.

    A `UserError` becomes one message and exit code 2; a `RendezvousError`, an OSError, or a `StorageError` whose path
    is right, one message and exit code 1. If mistakes are the `same_on_all_ranks`, only global rank 0 prints them: for
    commands that `adopt_launcher_environment` only, because before it RANK may be left over from another command.
    """
    try:
        code = command()
    except (UserError, RendezvousError, OSError) as error:
        may_pass = isinstance(error, StorageError) and not error.is_wrong
        code = ExitCode.USER_ERROR if isinstance(error, UserError) and not may_pass else ExitCode.FAILED
        of_one_rank = isinstance(error, (LauncherError, RendezvousError, OSError)) or not same_on_all_ranks
        if of_one_rank or os.environ.get("RANK", "0") == "0":
            print(f"error: {escaped(str(error))}", file=sys.stderr)
        if not isinstance(error, RankLostError):  # torchrun names one rank as the cause: this is not it
            _tell_torchrun(f"error: {escaped(str(error))}")
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown, in which threads of communication libraries can abort a finished process and
    # turn its exit code 0 into a failure.
    os._exit(int(code))


def _tell_torchrun(message: str) -> None:
    """Let torchrun's summary, which comes last on the terminal, say the message in place of a traceback.

    The file and its form are those of torch.distributed.elastic's ErrorHandler, without an import of torch.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        more = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:  # the message itself is printed already
            json.dump({"message": {"message": message, "extraInfo": more}}, file)


def escaped(message: str) -> str:
    """A message whose values can neither begin a line nor command a terminal; indented lines of a list stay."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]|\n(?!  )", lambda found: repr(found[0])[1:-1], message)
