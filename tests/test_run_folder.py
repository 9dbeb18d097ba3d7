"""Exclusive access to a run's folder, and the record of its starts."""

import errno
import json
import os
import pickle
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from jitscale.config import Config
from jitscale.errors import ExitCode, StorageError, UserError, data_error, exit_with_message
from jitscale.parallel import raise_together
from jitscale.run_folder import Attempts, after_the_end, claim, is_complete_under


def test_a_removed_folder_is_noticed_and_claimed_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with ExitStack() as held, ExitStack() as other:
        claimed = claim(run, held)
        assert not claimed.is_lost()
        run.rename(tmp_path / "moved")
        assert claimed.is_lost()
        claimed.take_again()
        assert not claimed.is_lost()
        shutil.rmtree(run)
        claim(run, other)
        assert claimed.is_lost(), "the folder belongs to another run"
        with pytest.raises(UserError, match=r"run: process \d+ on \S+ is at work there"):
            claimed.take_again()


@pytest.mark.parametrize(
    "content",
    [
        b'{"starts": 3, "posi',
        b"\xff",
        b"",
        b"[1]",
        b'{"unknown": 1}',
        b'{"starts": "3"}',
        b'{"excluded": "node1"}',
        b'{"excluded": [1]}',
        b"[" * 100_000,
    ],
)
def test_a_damaged_record_of_starts_is_reset(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "attempts.json").write_bytes(content)
    assert Attempts.begin(tmp_path, 5).starts == 1
    assert f"{tmp_path}/attempts.json: damaged" in caplog.text
    assert "the count of starts begins again" in caplog.text
    assert json.loads((tmp_path / "attempts.json").read_text())["position"] == 5
    assert Attempts.begin(tmp_path, 6).starts == 2


def test_a_damaged_marker_of_completion_is_ignored(tmp_path: Path) -> None:
    config = Config()
    config.run.dir = str(tmp_path)
    for content in (b"[" * 200_000, b"\xff", b"[1]"):
        (tmp_path / "complete_train.json").write_bytes(content)
        assert not is_complete_under(config)


def test_a_failing_file_system_after_the_end_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    def full() -> None:
        with data_error("result.json: cannot be written", "make room"):
            raise OSError(28, "No space left on device")

    assert after_the_end(lambda: None) == ExitCode.DONE
    assert after_the_end(full) == ExitCode.FAILED
    assert "error: result.json: cannot be written (No space left on device); make room; the trained" in caplog.text
    with pytest.raises(StorageError):
        full()


def test_an_error_of_a_file_system_is_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> int:
        raise OSError(28, "No space left on device", "/data/x")

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        exit_with_message(full)
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: '/data/x'\n"
    with pytest.raises(StorageError, match="No space left on device: '/data/x'"):
        raise_together(full)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        *((errno.EIO, ExitCode.FAILED), (errno.ESTALE, ExitCode.FAILED), (errno.ENOSPC, ExitCode.FAILED)),
        *((errno.ENOENT, ExitCode.USER_ERROR), (errno.EACCES, ExitCode.USER_ERROR)),
        *((errno.ENOTDIR, ExitCode.USER_ERROR), (None, ExitCode.USER_ERROR)),
    ],
)
def test_failing_storage_allows_a_restart_and_a_wrong_path_does_not(
    number: int | None, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job's supervisor requeues it unless the exit code is 2."""

    def fail() -> int:
        raise OSError("damaged") if number is None else OSError(number, os.strerror(number))

    def opened() -> int:
        with data_error("/data/x: cannot be read", "restore it"):
            return fail()

    monkeypatch.setattr(os, "_exit", sys.exit)
    for command in (opened, lambda: raise_together(opened), lambda: raise_together(fail)):
        with pytest.raises(SystemExit) as ended:
            exit_with_message(command)
        assert ended.value.code == code
    with pytest.raises(StorageError) as met:
        raise_together(fail)
    assert pickle.loads(pickle.dumps(met.value)).is_wrong == (code == ExitCode.USER_ERROR), (
        "the error must survive the way between ranks"
    )
