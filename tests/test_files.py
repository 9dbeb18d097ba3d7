"""Limits of folders and paths."""

import tempfile

import pytest

from jitscale.data.workers import start_workers
from jitscale.errors import UserError
from jitscale.files import SOCKET_FOLDER_BYTES, check_socket_folder
from jitscale.preparation.processes import in_processes


def test_a_temporary_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (SOCKET_FOLDER_BYTES - 1))
    check_socket_folder()
    # This character has two bytes.
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (SOCKET_FOLDER_BYTES - 2) + "\u00e9")
    for use in (check_socket_folder, lambda: start_workers([], 1), lambda: list(in_processes(abs, [1, 2], 2))):
        with pytest.raises(UserError, match=r"^TMPDIR=/x+\u00e9: has 76 bytes, but .* at most 75 bytes"):
            use()
