"""How ranks agree, and on what they compute."""

from __future__ import annotations

import pytest

from jitscale import parallel
from jitscale.errors import ConfigError


def test_cuda_that_is_not_there_is_refused() -> None:
    assert parallel.choose_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="PyTorch sees no GPU"):
        parallel.choose_device("cuda")


def test_everything_works_in_one_process() -> None:
    assert parallel.gather_objects("a") == ["a"]
    assert parallel.broadcast_object("a") == "a"
    assert parallel.any_rank(True)
    assert not parallel.any_rank(False)
    assert parallel.together(lambda: 3) == 3
