"""Fixtures that several files share: evaluations."""

from typing import Any

import pytest

from tests.support.evaluations import Evaluation


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    return Evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def alone(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.run("alone")
