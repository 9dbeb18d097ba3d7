"""The size of the buckets in which gradients are reduced."""

import math

import pytest

from jitscale.planner.buckets import BUCKETS, reduce_bucket_elements
from jitscale.planner.memory import parameter_shapes
from tests.planner.test_planner import shipped


@pytest.mark.parametrize("name", ["b_256", "l_256", "h_256", "g_256"])
@pytest.mark.parametrize("ranks", [2, 8, 64, 1024])
def test_backward_hides_nine_tenths_of_the_gradients(name: str, ranks: int) -> None:
    sizes = [math.prod(shape) for shape in parameter_shapes(shipped(name).model).values()]
    elements = reduce_bucket_elements(sum(sizes), max(sizes), ranks)
    assert elements >= max(sizes), "DeepSpeed reduces a larger parameter outside of its buckets"
    assert sum(sizes) / elements > BUCKETS - 1


def test_more_ranks_need_larger_buckets_until_there_are_too_few() -> None:
    sizes = [reduce_bucket_elements(1_000_000_000, 10_000_000, ranks) for ranks in (1, 8, 32, 64, 128, 1024)]
    assert sizes == [33_333_333, 33_333_333, 33_333_333, 33_333_333, 64_000_000, 100_000_000]


def test_a_small_network_has_a_bucket_for_its_largest_parameter() -> None:
    assert reduce_bucket_elements(1_000, 300, 64) == 300
    assert reduce_bucket_elements(100_000_000, 1, 2) == 8_000_000
