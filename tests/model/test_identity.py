"""The facts that ranks compare, so that all ranks compute in the same way."""

from dataclasses import replace

import torch

from jitscale.config import EngineConfig
from jitscale.model.execution import REMEDY, prepare
from jitscale.model.jit import JiT
from tests.support.tiny import MODEL


def test_the_kernel_is_part_of_the_identity_and_the_reason_is_not() -> None:
    execution = prepare(JiT(MODEL), EngineConfig(), torch.device("cpu"), training=True)
    kernel = execution.attention
    assert replace(execution, attention=replace(kernel, reason="another rank's error")).identity == execution.identity
    other = replace(execution, attention=replace(kernel, name="flash-attn"))
    before = f"attention={kernel.name}"
    assert other.identity == execution.identity.replace(before, "attention=flash-attn")
    for changed in (replace(kernel, version="0.1"), replace(kernel, name="reference")):
        assert replace(execution, attention=changed).identity != execution.identity
    fused = execution.fused
    assert replace(execution, fused=replace(fused, reason="no triton here")).identity == execution.identity
    for other_fused in (replace(fused, version="3.7"), replace(fused, name="triton", version="3.6")):
        assert replace(execution, fused=other_fused).identity != execution.identity
    for switch in ("aligned", "compiled", "float8", "graphs"):
        assert replace(execution, **{switch: not getattr(execution, switch)}).identity != execution.identity, switch


def test_the_remedy_names_possible_differences() -> None:
    for name in ("attention", "fused_kernels", "cuda_graphs", "compile", "align"):
        assert hasattr(EngineConfig(), name)
        assert f"engine.{name}" in REMEDY
