"""Networks built around given weights: they equal built and loaded networks, but nothing is drawn or copied."""

from dataclasses import replace

import pytest
import torch

from jitscale.checkpoints.opening import open_weights
from jitscale.config import DiffusionConfig
from jitscale.model.jit import JiT, network_holding
from tests.support.evaluations import CHECKPOINT
from tests.support.tiny import MODEL


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(p) * 0.05 for name, p in JiT(MODEL).named_parameters()}


def inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([3, MODEL.num_classes])


def test_it_equals_the_network_that_was_built_and_loaded() -> None:
    """The network is bit-equal, including its tables. Its parameters are the given tensors themselves."""
    given = weights()
    plain = JiT(MODEL, DiffusionConfig())
    plain.load_state_dict(given)
    before = torch.get_rng_state()
    network = network_holding(given, MODEL, DiffusionConfig())
    assert torch.equal(torch.get_rng_state(), before), "no random numbers are drawn"
    assert not network.training
    assert all(p.data_ptr() == given[name].data_ptr() for name, p in network.named_parameters())
    assert all(p.requires_grad for p in network.parameters()), (
        "autocast caches casts only of weights that require a gradient"
    )
    expected, found = dict(plain.named_buffers()), dict(network.named_buffers())
    assert found.keys() == expected.keys() == {"pos_embed", "rope"}
    assert all(torch.equal(found[name], table) for name, table in expected.items())
    assert network.state_dict().keys() == plain.state_dict().keys()
    given_to_both = inputs()
    assert torch.equal(network(*given_to_both), plain.eval()(*given_to_both))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_of_another_network_are_refused(change: str) -> None:
    given = weights()
    name = "final_layer.linear.weight"
    values = given.pop(name)
    if change != "missing":
        given["other" if change == "unexpected" else name] = values[:-1]
    with pytest.raises(RuntimeError, match=name):
        network_holding(given, MODEL, DiffusionConfig())


def test_stored_weights_are_copied_once_and_nothing_is_drawn() -> None:
    stored = open_weights(CHECKPOINT, replace(MODEL, depth=3))
    before = torch.get_rng_state()
    network = stored.network()
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in network.named_parameters():
        mapped = stored.tensor(stored.default, name)
        assert torch.equal(p, mapped)
        assert p.data_ptr() != mapped.data_ptr(), "the file may change after loading"
        assert p.dtype == torch.float32
