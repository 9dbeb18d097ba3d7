"""One process without DeepSpeed: the same network, optimizer and averages, for machines that lack our packages."""

from __future__ import annotations

import torch

from benchmarks.stopwatch import Stopwatch
from jitscale.config import Config
from jitscale.diffusion.objective import sample_loss, times_from_normal
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.noise import add_noise
from jitscale.training.optim import build_optimizer


class RandomBatch:
    """A batch on the device: the same images, flipped and noised anew each time."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._config, self._device = config, device
        batch, size = config.data.batch_size, config.model.image_size
        self.images = torch.randint(256, (batch, size, size, 3), dtype=torch.uint8, device=device)
        self.labels = torch.randint(max(1, config.model.num_classes), (batch,), device=device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whether to flip (B,), standard normal noise (B, 3, S, S), and times (B,)."""
        batch, height, width, channels = self.images.shape
        noise = torch.randn(batch, channels, height, width, device=self._device)
        t = times_from_normal(torch.randn(batch, device=self._device), self._config.diffusion)
        return torch.rand(batch, device=self._device) < 0.5, noise, t


class PlainTraining:
    """Steps in plain torch, whose masters are its parameters; bf16 weights stand as autocast here."""

    def __init__(self, config: Config, device: torch.device, watch: Stopwatch) -> None:
        self.config, self.device = config, device
        self.network = JiT(config.model, config.diffusion).to(device).train()
        self.execution = prepare(self.network, config.engine, device, training=True)
        compiled = self.execution.compiled
        self.add_noise = torch.compile(add_noise) if compiled else add_noise
        self.sample_loss = torch.compile(sample_loss) if compiled else sample_loss
        self.optimizer = build_optimizer(self.network, config.optim)
        self.weights = [p.detach() for p in self.network.parameters()]
        self.ema = ShardedEma(config.ema, self.weights, compiled=compiled)
        self.batch = RandomBatch(config, device)
        self.steps = 0
        self._watch = watch

    def step(self) -> None:
        """One step on a batch that lies on the device."""
        diffusion, batch = self.config.diffusion, self.config.data.batch_size
        flip, noise, t = self.batch.draw()
        x, e, z = self.add_noise(self.batch.images, flip, noise, t, diffusion.noise_scale)
        with autocast(self.config, self.device):
            prediction = self.network(z, t, self.batch.labels)
        loss = self.sample_loss(prediction, x, e, z, t, diffusion).mean()
        with self._watch.part("engine_backward"):
            loss.backward()
        with self._watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.optim.grad_clip or float("inf"))
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.optim.lr * group["lr_factor"]
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.steps += 1
        with self._watch.part("ema"):
            self.ema.update(self.weights, self.steps, ((self.steps - 1) * batch, self.steps * batch))

    def close(self) -> None:
        """Nothing is held."""
