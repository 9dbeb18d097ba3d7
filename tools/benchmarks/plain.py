"""One process without DeepSpeed: the same network, optimizer and averages, for machines that lack our packages."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from benchmarks.stopwatch import Stopwatch
from jitscale.config import Config
from jitscale.diffusion.objective import sample_loss, times_from_normal
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.feed import add_noise
from jitscale.training.optim import build_optimizer


class RandomBatch:
    """A batch on the device: the same images (B, S, S, 3), flipped and noised anew each time."""

    def __init__(self, config: Config, device: torch.device, *, compiled: bool = False) -> None:
        self._config, self._device = config, device
        batch, size = config.data.batch_size, config.model.image_size
        self._images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.randint(max(1, config.model.num_classes), (batch,), device=device)
        self._add_noise = torch.compile(add_noise) if compiled else add_noise
        self._sample_loss = torch.compile(sample_loss) if compiled else sample_loss

    def noised(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The images, noise and their mixture, all (B, 3, S, S), and the times (B,)."""
        batch, height, width, channels = self._images.shape
        noise = torch.randn(batch, channels, height, width, device=self._device)
        t = times_from_normal(torch.randn(batch, device=self._device), self._config.diffusion)
        flip = torch.rand(batch, device=self._device) < 0.5
        return *self._add_noise(self._images, flip, noise, t, self._config.diffusion.noise_scale), t

    def loss(
        self, network: Callable[..., torch.Tensor], forward: AbstractContextManager[None] | None = None
    ) -> torch.Tensor:
        """The mean loss of `network`, whose forward pass runs inside `forward`."""
        x, e, z, t = self.noised()
        with forward or nullcontext(), autocast(self._config, self._device):
            prediction = network(z, t, self.labels)
        return self._sample_loss(prediction, x, e, z, t, self._config.diffusion).mean()


class PlainTraining:
    """Steps in plain torch, whose masters are its parameters; bf16 weights are measured as autocast."""

    def __init__(self, config: Config, device: torch.device, watch: Stopwatch) -> None:
        self.config = config
        self.network = JiT(config.model, config.diffusion).to(device).train()
        self.execution = prepare(self.network, config.engine, device, training=True)
        self.optimizer = build_optimizer(self.network, config.optim)
        self.weights = [p.detach() for p in self.network.parameters()]
        self.ema = ShardedEma(config.ema, self.weights, compiled=self.execution.compiled)
        self.batch = RandomBatch(config, device, compiled=self.execution.compiled)
        self.steps = 0
        self._watch = watch

    def step(self) -> None:
        """One step on a batch that is already on the device."""
        optim, batch = self.config.optim, self.config.data.batch_size
        loss = self.batch.loss(self.network)
        with self._watch.part("engine_backward"):
            loss.backward()
        with self._watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), optim.grad_clip or float("inf"))
            for group in self.optimizer.param_groups:
                group["lr"] = optim.lr * group["lr_factor"]
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1
        with self._watch.part("ema"):
            self.ema.update(self.weights, self.steps, ((self.steps - 1) * batch, self.steps * batch))

    def close(self) -> None:
        """Nothing is held."""
