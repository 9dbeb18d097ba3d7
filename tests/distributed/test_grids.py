"""Sample grids while training: rank 0 builds a network and draws; the other ranks only send their weights."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.processes import PROGRAMS, run_ranks


def test_rank_0_alone_builds_a_network_and_draws(tmp_path: Path) -> None:
    """The picture is bit-equal on any number of ranks. Every rank reports an error in the grid."""
    pictures = []
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
        said = run_ranks(ranks, str(PROGRAMS / "grids.py"), str(tmp_path))
        main, *others = json.loads(said.splitlines()[-1])
        assert main["built"] == 2, "rank 0 builds the network and its guide"
        assert all(other["built"] == 0 for other in others)
        assert all("not finite" in one["error"] for one in (main, *others))
        (drawn,) = (tmp_path / str(ranks) / "samples").iterdir()
        pictures.append(np.asarray(Image.open(drawn)))
    assert pictures[0].std() > 10, "the samples differ from each other"
    assert np.array_equal(*pictures)
