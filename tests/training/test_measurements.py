"""Memory that measurements while training leave on the device."""

import gc
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from jitscale.config import Config, EngineConfig, EvaluationConfig
from jitscale.evaluation.evaluator import Evaluator
from jitscale.model.jit import JiT
from jitscale.parallel import World
from jitscale.training.measurements import Measurements
from jitscale.training.state import RunState
from tests.support.tiny import MODEL

CPU = torch.device("cpu")


class WholeNetwork:
    """The methods of an engine that a measurement calls. It holds a whole network, and makes its weights again."""

    def masters(self) -> list[torch.Tensor]:
        return []

    def gather(self, flats: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: p.detach().clone() for key, p in JiT(MODEL).named_parameters()}

    def stored_buffers(self) -> dict[str, torch.Tensor]:
        return {}

    def release_memory(self) -> None:
        pass

    def optimizer_step(self) -> int:
        return 0


class Lines:
    """The method of a tracker that a measurement calls."""

    def __init__(self) -> None:
        self.measured: list[float] = []

    def log_few(self, result: dict[str, Any], step: int, images: int) -> None:
        self.measured.append(result["fid"])


def test_the_guide_is_on_the_device_only_while_it_is_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each measurement makes a copy that is ready to sample. However it ends, the run keeps no copy."""
    config = Config(model=MODEL, engine=EngineConfig(precision="fp32"), evaluation=EvaluationConfig(weights="model"))
    config.run.dir = str(tmp_path)
    world, guide = World(0, 1, 0, CPU), JiT(MODEL).eval()
    copies: list[weakref.ref[torch.nn.Module]] = []
    networks: list[weakref.ref[torch.nn.Module]] = []
    digests: list[dict[str, Any]] = []

    def measure(self: Evaluator, model: JiT, *_: Any, **__: Any) -> list[dict[str, Any]]:
        assert self.guide is not None
        assert self.guide is not guide
        assert not self.guide.training
        copies.append(weakref.ref(self.guide.blocks[0]))  # Prepared blocks refer to themselves.
        networks.append(weakref.ref(model.blocks[0]))
        digests.append(self._guide_digest)
        if len(copies) == 3:
            raise RuntimeError("broken")
        return [{"fid": 1.0, "num_images": 10}]

    monkeypatch.setattr(Evaluator, "measure", measure)
    for name in ("Embedder", "reference_of"):
        monkeypatch.setattr(f"jitscale.evaluation.evaluator.{name}", lambda *_: None)
    none, lines = cast(Any, None), Lines()  # This measurement needs no shards and no averages.
    saved = (cast(Any, WholeNetwork()), none, RunState(), cast(Any, lines))
    measured = Measurements(config, world, none, *saved, guide, 100, lambda: None)
    gc.disable()  # The time of Python's own collection is not reliable.
    try:
        measured.on_few_images()
        assert [copy() for copy in copies] == [None]
        assert measured.attempt(measured.on_few_images)
        assert [network() for network in networks] == [None, None]
        with pytest.raises(RuntimeError, match="broken"):
            measured.on_few_images()
    finally:
        gc.enable()
    assert measured._evaluator.guide is None
    assert digests[0] == digests[1] == digests[2] != {}
    assert lines.measured == [1.0, 1.0]
