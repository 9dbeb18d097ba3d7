"""The authors' way of training and sampling, for comparison: LTH14/JiT's way on one GPU, reproduced on our network.

Attention keeps float32 logits in memory. No width is padded. Blocks are compiled if ours are. AdamW is torch's default.
Two complete averages are updated tensor by tensor. The host reads the loss in every step. Sampling calls the network
twice for every velocity, also outside the guidance interval.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.measuring import Stopwatch
from benchmarks.plain import RandomBatch
from jitscale.config import Config
from jitscale.diffusion.objective import sample_loss, to_spaces
from jitscale.diffusion.sampler import Sampler
from jitscale.evaluation.generate import autocast
from jitscale.model.execution import prepare
from jitscale.model.jit import JiT
from jitscale.training.optim import parameter_groups

EMA_DECAYS = (0.9999, 0.9996)
BETAS = (0.9, 0.95)


def authors_network(network: JiT, config: Config, device: torch.device, *, training: bool) -> JiT:
    """`network` on `device`, changed in place to compute in the authors' way."""
    unfused = replace(config.engine, attention="reference", fused_kernels="torch", cuda_graphs=False)
    plain = replace(unfused, align=False, float8=False, activation_checkpointing=0)
    prepare(network.to(device), plain, device, training=training)
    return network.train(training)


def authors_step(config: Config, device: torch.device, batch: RandomBatch, watch: Stopwatch) -> Callable[[], None]:
    """A step on `batch` with a network, an optimizer and averages of its own; `watch` times its parts."""
    network = authors_network(JiT(config.model, config.diffusion), config, device, training=True)
    optimizer = torch.optim.AdamW(parameter_groups(network, config.optim), lr=config.optim.lr, betas=BETAS)
    averages = [[p.detach().clone() for p in network.parameters()] for _ in EMA_DECAYS]

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
            for average, decay in zip(averages, EMA_DECAYS, strict=True):
                for target, source in zip(average, network.parameters(), strict=True):
                    target.mul_(decay).add_(source, alpha=1 - decay)

    return step


@torch.no_grad()
def authors_sample(network: JiT, sampler: Sampler, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Images (B, A, S, S) from `noise`, which the caller has multiplied by the noise scale."""

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
