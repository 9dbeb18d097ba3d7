"""One process without DeepSpeed: the same network, optimizer and averages, for machines that lack our packages."""

from __future__ import annotations

import torch

from jitscale.config import Config
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.training.optim import build_optimizer


class PlainEngine:
    """What training/engine.py offers, of one rank, with its parameters as masters."""

    def __init__(self, model: JiT, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = model.to(device)
        self.execution = prepare(self.model, config.engine, device, training=True)
        self.optimizer = build_optimizer(self.model, config.optim)
        self._norm = torch.zeros(())

    def __call__(self, z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The network's prediction under the precision that was asked for; bf16 weights stand as autocast here."""
        with autocast(self.config, self.device):
            return self.model(z, t, y)

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients of one batch."""
        loss.backward()

    def step(self, lr: float) -> bool:
        """Clip, and update the weights with learning rate `lr`."""
        limit = self.config.optim.grad_clip or float("inf")
        self._norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        return True

    def gradient_norm(self) -> float:
        """Of the last step, before clipping."""
        return float(self._norm)

    def masters(self) -> list[torch.Tensor]:
        """The float32 parameters."""
        return [p.detach() for p in self.model.parameters()]

    def destroy(self) -> None:
        """Nothing is held."""
