"""Communication between ranks in real processes."""

from pathlib import Path

from tests.support.processes import PROGRAMS, run_ranks


def test_three_ranks_share_one_exchange_and_the_work_of_one(tmp_path: Path) -> None:
    run_ranks(3, str(PROGRAMS / "sharing.py"), str(tmp_path))
    assert not list((tmp_path / "tmp").iterdir()), "the shared file is removed"
