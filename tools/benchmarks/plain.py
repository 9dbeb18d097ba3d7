"""Training in one process without DeepSpeed: the same network, optimizer and averages, where packages are missing."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import torch

from benchmarks.measuring import Stopwatch
from jitscale.config import Config, image_shape, image_tokens, routed_blocks, routed_tokens
from jitscale.diffusion.objective import times_from_normal
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import Execution, prepare
from jitscale.model.jit import JiT
from jitscale.training.ema import ShardedEma
from jitscale.training.losses import Losses
from jitscale.training.noise import add_noise
from jitscale.training.optim import build_optimizer

Training = tuple[Callable[[], None], Execution]  # a step, and how its network computes


class RandomBatch:
    """A batch on the device: the same images (B, S, S, A) each time, with new flips and new noise."""

    def __init__(
        self, config: Config, device: torch.device, subspace: torch.Tensor | None = None, *, compiled: bool = False
    ) -> None:
        """For networks with this `subspace`."""
        self._config, self._device = config, device
        channels, *sides = image_shape(config.model)
        batch = config.data.batch_size
        self._images = torch.randint(256, (batch, *sides, channels), dtype=torch.uint8, device=device)
        self.labels = torch.randint(max(1, config.model.num_classes), (batch,), device=device)
        self._add_noise = torch.compile(add_noise) if compiled else add_noise
        self._losses = Losses(config.model, config.diffusion, subspace, compiled=compiled)

    def noised(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, noise and their mixture, all (B, A, S, S), and the times (B,)."""
        batch, height, width, channels = self._images.shape
        noise = torch.randn(batch, channels, height, width, device=self._device)
        t = times_from_normal(torch.randn(batch, device=self._device), self._config.diffusion)
        flip = torch.rand(batch, device=self._device) < 0.5
        return *self._add_noise(self._images, flip, noise, t, self._config.diffusion.noise_scale), t

    def loss(self, network: JiT, forward: AbstractContextManager[None] | None = None) -> torch.Tensor:
        """The mean loss of `network`, whose forward pass runs inside `forward`."""
        (x, e, z, t), kept, model = self.noised(), self._kept(), self._config.model
        with forward or nullcontext(), autocast(self._config, self._device):
            prediction = network(z, t, self.labels, kept, middle=model.middle_head > 0)
        losses, middle = self._losses(prediction, x, e, z, t, kept)
        return losses.mean() if middle is None else losses.mean() + self._config.diffusion.middle_weight * middle.mean()

    def _kept(self) -> torch.Tensor | None:
        """The tokens that are not routed, (B, K); None if all pass."""
        model = self._config.model
        if not routed_blocks(model):
            return None
        draws = torch.rand(len(self.labels), image_tokens(model), device=self._device)
        return draws.argsort(1)[:, : routed_tokens(model)].sort(1).values


@contextmanager
def plain_training(config: Config, device: torch.device, watch: Stopwatch) -> Iterator[Training]:
    """A step in plain torch, on a batch that is already on the device; its parameters are the fp32 masters.

    `watch` times its parts. With `engine.precision=bf16` it measures autocast instead.
    """
    network = JiT(config.model, config.diffusion).to(device).train()
    execution = prepare(network, config.engine, device, training=True, batch=config.data.batch_size)
    optimizer = build_optimizer(network, config.optim)
    weights = [p.detach() for p in network.parameters()]
    ema = ShardedEma(config.ema, weights, compiled=execution.compiled)
    batch = RandomBatch(config, device, network.subspace, compiled=execution.compiled)
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
