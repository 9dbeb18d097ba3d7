"""GPUs are hidden from all tests, except those that a user runs on a GPU."""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.support import ROOT

FILE = "tests/model/test_execution.py"
OTHER = "tests/model/test_fused.py"


@pytest.mark.parametrize(
    ("arguments", "visible"),
    [
        ([FILE], True),
        ([str(ROOT / FILE)], True),
        (
            [
                f"{FILE}::test_compiled_blocks_read_parameters_from_any_address",
                f"{FILE}::test_cuda_graphs_change_nothing",
            ],
            True,
        ),
        ([FILE, OTHER], True),
        ([OTHER], True),
        ([FILE, "tests/model/test_training_graphs.py"], True),
        (["tests"], False),
        (["tests/model"], False),
        ([FILE, "tests/training/test_ema.py"], False),
        ([], False),
    ],
)
def test_gpus_are_visible_only_to_tests_that_need_one(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], visible: bool
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    config: Any = SimpleNamespace(args=arguments)
    conftest.pytest_configure(config)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("0" if visible else "")


def test_a_rank_in_the_process_of_the_tests() -> None:
    os.environ |= {"MASTER_PORT": "1", "RANK": "0"}


def test_leaves_nothing_to_the_next_test() -> None:
    assert not {"MASTER_PORT", "RANK"} & set(os.environ)
