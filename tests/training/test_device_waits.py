"""The replacements for DeepSpeed's waits give the same numbers and keep the same order on the device."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jitscale.training.device_waits import (
    clip_by_norm,
    gradient_norm,
    order_after_reductions,
    replaced,
    whole_gradient_norm,
)

CPU = torch.device("cpu")


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((70, 91), (5000,), (3,))]


@pytest.mark.parametrize("norm", [gradient_norm, whole_gradient_norm])
def test_the_norm_covers_all_gradients(norm: Callable[..., torch.Tensor]) -> None:
    found = norm(CPU, gradients())
    assert found == pytest.approx(float(torch.cat([g.flatten() for g in gradients()]).double().norm()), rel=1e-6)
    assert found.dtype == torch.float32
    padding = torch.ones(9)
    padding._zero_padding = True  # type: ignore[attr-defined]
    assert norm(CPU, [*gradients(), padding]) == found
    assert norm(CPU, []) == 0
    assert norm(CPU, [torch.tensor([1.0, float("nan")])]) == -1


@pytest.mark.parametrize("largest", [0.5, 1e6])
def test_clipping_equals_torchs(largest: float) -> None:
    parameters = [torch.zeros_like(gradient) for gradient in gradients()]
    for parameter, gradient in zip(parameters, gradients(), strict=True):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, largest)
    own = gradients()
    assert clip_by_norm(own, largest, norm) is norm
    for parameter, gradient in zip(parameters, own, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


class Base:
    inherited = 1


def test_replaced_attributes_are_restored() -> None:
    thing: Any = Base()
    thing.own = 2

    def fail() -> None:
        with replaced((thing, "own", 3), (thing, "inherited", 4)):
            assert (thing.own, thing.inherited) == (3, 4)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert vars(thing) == {"own": 2}
    assert thing.inherited == 1


def test_the_current_stream_waits_instead_of_the_host() -> None:
    """This happens where DeepSpeed has reduced everything and has not read the results.

    Elsewhere the stream can be synchronised.
    """
    done: list[Any] = []

    class Stream:
        def synchronize(self) -> None:
            done.append("host waits for the stream")

    stream = Stream()

    current = SimpleNamespace(wait_stream=lambda other: done.append(("current stream waits for", other)))

    def end_backward() -> None:
        done.append("reduces")
        stream.synchronize()
        done.append("reads")

    optimizer = SimpleNamespace(independent_gradient_partition_epilogue=end_backward)
    order_after_reductions(optimizer, SimpleNamespace(current_stream=lambda: current), stream)
    optimizer.independent_gradient_partition_epilogue()
    stream.synchronize()
    waited = ("current stream waits for", stream)
    assert done == ["reduces", waited, "reads", "host waits for the stream"]
