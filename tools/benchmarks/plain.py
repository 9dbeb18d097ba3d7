"""Without the trainer, in plain torch: our step, for machines that lack our packages, and the authors' way, to compare.

The authors' way of training and sampling is what LTH14/JiT does on one GPU, on our network. Attention keeps float32
logits in memory. Nothing is padded. Blocks are compiled if ours are. AdamW is torch's default. Two whole averages are
updated tensor by tensor. The host reads the loss in every step. Sampling calls the network twice for every velocity,
also outside the guidance interval.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import count

import torch

from benchmarks.measuring import Stopwatch
from jitscale.config import Config
from jitscale.diffusion.objective import sample_loss, times_from_normal, to_spaces
from jitscale.diffusion.sampler import Sampler
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import Execution, prepare
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.noise import add_noise
from jitscale.training.optim import build_optimizer, parameter_groups

REFERENCE_EMA_DECAYS = (0.9999, 0.9996)
REFERENCE_BETAS = (0.9, 0.95)

Training = tuple[Callable[[], None], Execution]  # a step, and how its network computes


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

    def loss(self, network: JiT, forward: AbstractContextManager[None] | None = None) -> torch.Tensor:
        """The mean loss of `network`, whose forward pass runs inside `forward`."""
        x, e, z, t = self.noised()
        with forward or nullcontext(), autocast(self._config, self._device):
            prediction = network(z, t, self.labels)
        return self._sample_loss(prediction, x, e, z, t, self._config.diffusion).mean()


@contextmanager
def plain_training(config: Config, device: torch.device, watch: Stopwatch) -> Iterator[Training]:
    """A step in plain torch, whose masters are its parameters, on a batch that is already on the device.

    `watch` times its parts. bf16 weights are measured as autocast.
    """
    network = JiT(config.model, config.diffusion).to(device).train()
    execution = prepare(network, config.engine, device, training=True)
    optimizer = build_optimizer(network, config.optim)
    weights = [p.detach() for p in network.parameters()]
    ema = ShardedEma(config.ema, weights, compiled=execution.compiled)
    batch = RandomBatch(config, device, compiled=execution.compiled)
    steps = count(1)

    def step() -> None:
        loss = batch.loss(network)
        with watch.part("engine_backward"):
            loss.backward()
        with watch.part("optimizer"):
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optim.grad_clip or float("inf"))
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr * group["lr_factor"]
            optimizer.step()
            optimizer.zero_grad()
        number, images = next(steps), config.data.batch_size
        with watch.part("ema"):
            ema.update(weights, number, ((number - 1) * images, number * images))

    yield step, execution


def reference_network(network: JiT, config: Config, device: torch.device, *, training: bool) -> JiT:
    """`network` on `device`, changed in place to compute as the authors' does."""
    plain = replace(config.engine, attention="reference", align=False, float8=False, activation_checkpointing=0)
    prepare(network.to(device), plain, device, training=training)
    return network.train(training)


def reference_step(config: Config, device: torch.device, batch: RandomBatch, watch: Stopwatch) -> Callable[[], None]:
    """A step on `batch` with a network, an optimizer and averages of its own; `watch` times its parts."""
    network = reference_network(JiT(config.model, config.diffusion), config, device, training=True)
    optimizer = torch.optim.AdamW(parameter_groups(network, config.optim), lr=config.optim.lr, betas=REFERENCE_BETAS)
    averages = [[p.detach().clone() for p in network.parameters()] for _ in REFERENCE_EMA_DECAYS]

    def step() -> None:
        x, e, z, t = batch.noised()
        with watch.part("forward"), autocast(config, device):
            loss = sample_loss(network(z, t, batch.labels), x, e, z, t, config.diffusion).mean()
        loss.item()  # the host waits
        with watch.part("backward"):
            optimizer.zero_grad()
            loss.backward()
        with watch.part("optimizer"):
            optimizer.step()
        with watch.part("ema"), torch.no_grad():
            for average, decay in zip(averages, REFERENCE_EMA_DECAYS, strict=True):
                for target, source in zip(average, network.parameters(), strict=True):
                    target.mul_(decay).add_(source, alpha=1 - decay)

    return step


@torch.no_grad()
def reference_sample(network: JiT, sampler: Sampler, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, S, S) from `noise`, which is multiplied by the noise scale already."""

    def velocity(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        times = t.expand(len(z))
        conditional, unconditional = (
            to_spaces(network(z, times, y).float(), z, times, sampler.prediction, sampler.t_eps).v
            for y in (labels, torch.full_like(labels, network.null_label))
        )
        low, high = sampler.guidance_interval
        inside = (t < high) & ((t > low) | (torch.tensor(low) == 0.0).to(t.device))
        scale = torch.where(inside, sampler.guidance_scale, 1.0)
        return unconditional + scale * (conditional - unconditional)

    z = noise.float()
    times = torch.linspace(0.0, 1.0, sampler.steps + 1, device=z.device)
    for index in range(sampler.steps):
        t, t_next = times[index], times[index + 1]
        v = velocity(z, t)
        if sampler.method == "heun" and index < sampler.steps - 1:
            v = 0.5 * (v + velocity(z + (t_next - t) * v, t_next))
        z = z + (t_next - t) * v
    return z
