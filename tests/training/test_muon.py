"""Muon against torch's Muon on whole matrices, and the groups that it accepts."""

import pytest
import torch

from jitscale.checkpoints.format import whole_fragments
from jitscale.config import OptimConfig
from jitscale.model.jit import JiT
from jitscale.training.muon import Muon, orthogonalize
from jitscale.training.optim import build_optimizer
from tests.support.tiny import MODEL


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_the_matrix_becomes_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, s, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.linspace(0.1, 1.0, len(s))
    found = orthogonalize(30.0 * (u * s) @ v)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6
    assert values.max() < 1.25
    diagonal = u.T @ found @ v.T
    torch.testing.assert_close(diagonal, diagonal.diag().diag(), rtol=0, atol=1e-4)


def test_steps_equal_those_of_torchs_muon_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both groups at once: matrices against torch.optim.Muon, which iterates in bfloat16; the rest against AdamW."""
    torch.manual_seed(0)
    start = [torch.randn(12, 20), torch.randn(20, 12), torch.randn(7)]
    ours, theirs = ([p.clone().requires_grad_() for p in start] for _ in range(2))
    groups = [
        {"params": ours[:2], "weight_decay": 0.1, "muon": True},
        {"params": ours[2:], "weight_decay": 0.0, "muon": False},
    ]
    optimizer = Muon(groups, momentum=0.9, lr=0.02, betas=(0.9, 0.95))
    whole = whole_fragments({str(index): tuple(p.shape) for index, p in enumerate(ours[:2])})
    optimizer.lay_out({f.flat: ours[f.flat] for f in whole}, [whole], rank=0)
    muon = torch.optim.Muon(theirs[:2], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[2:], lr=0.02, betas=(0.9, 0.95), weight_decay=0.0)
    monkeypatch.setattr("jitscale.training.muon.orthogonalize", lambda m: orthogonalize(m.bfloat16()))
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for p, q, before in zip(ours, theirs, start, strict=True):
        assert (p - before).abs().mean() > 0.01
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


def test_muon_trains_hidden_matrices() -> None:
    model = JiT(MODEL)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, OptimConfig(name="muon")).param_groups
    muon = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert muon == {
        *(
            f"blocks.{index}.{layer}.weight"
            for index in range(MODEL.depth)
            for layer in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "adaLN_modulation.1")
        ),
        "final_layer.adaLN_modulation.1.weight",
    }
    assert not any(group["muon"] for group in build_optimizer(model, OptimConfig()).param_groups)
