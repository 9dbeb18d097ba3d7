"""Train the feature network of the digits metrics and print what its distance says about known damage.

    python tools/train_digits_features.py --output digits_features.safetensors

The file in jitscale/evaluation was made by this command. Train it again only on purpose: distances of different
weights do not compare, and every result names the hash of the file.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm import tqdm

from jitscale.data.digits import digit_images
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.features import DIGITS_HELD_OUT, DigitsFeatures
from jitscale.evaluation.metrics import frechet_distance, inception_score, label_agreement

BATCH = 64
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
SHIFT = 2  # pixels of 32, a quarter of the original's

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> DigitsFeatures:
    """Train on uint8 `images` (N, 3, 32, 32) with `labels` (N,); the images move by up to `SHIFT` pixels."""
    torch.manual_seed(seed)
    network = DigitsFeatures()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps_per_epoch)
    for _ in (bar := tqdm(range(epochs), unit="epoch")):
        order = torch.randperm(len(images))
        for step in range(steps_per_epoch):
            chosen = order[step * BATCH : (step + 1) * BATCH]
            down, right = torch.randint(2 * SHIFT + 1, (2,)).tolist()
            padded = F.pad(images[chosen], (SHIFT, SHIFT, SHIFT, SHIFT))
            side = images.shape[-1]
            _, logits = network(padded[:, :, down : down + side, right : right + side])
            loss = F.cross_entropy(logits, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    measure_scale(network, images)
    return network.eval()


@torch.no_grad()
def measure_scale(network: DigitsFeatures, images: torch.Tensor) -> None:
    """Replace the running averages by the statistics of all `images`, so that every feature has exactly variance 1."""
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0  # the last batch alone counts, and it is the whole set
    network(images)


@torch.no_grad()
def embed(network: DigitsFeatures, images: UInt8Array) -> tuple[Float32Array, Float32Array]:
    """Features (N, F) and logits (N, L) of `images` (N, height, width, 3)."""
    features, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return features.numpy(), logits.numpy()


def sanity_list(network: DigitsFeatures, seed: int) -> dict[str, tuple[float, float]]:
    """Fréchet distance to all real digits and Inception Score of sets whose order is known, by name."""
    images, labels = digit_images(network.input_size)
    real, _ = embed(network, images)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    half = len(images) // 2

    def score(changed: UInt8Array) -> tuple[float, float]:
        features, logits = embed(network, changed)
        return frechet_distance(features, real), inception_score(logits)[0]

    def noisy(sigma: float) -> UInt8Array:
        noise = 127.5 * sigma * generator.standard_normal(images.shape)
        return _as_pixels(images + noise)

    def blurred(sigma: float) -> UInt8Array:
        return _as_pixels(gaussian_filter(images.astype(np.float64), (0, sigma, sigma, 0)))

    halves = [embed(network, images[part])[0] for part in (order[:half], order[half:])]
    return {
        "half against half": (frechet_distance(*halves), float("nan")),
        "all real": score(images),
        "half": score(images[order[:half]]),
        "from 64 px": score(digit_images(64)[0]),
        "noise, sigma 0.1 of [-1, 1]": score(noisy(0.1)),
        "noise, sigma 0.3 of [-1, 1]": score(noisy(0.3)),
        "blur, sigma 0.5 px of 32": score(blurred(0.5)),
        "blur, sigma 1 px of 32": score(blurred(1.0)),
        "blur, sigma 2 px of 32": score(blurred(2.0)),
        "without the class 3": score(images[labels != 3]),
        "ten images repeated": score(np.repeat(images[order[:10]], 180, axis=0)),
        "uniform noise": score(generator.integers(0, 256, images.shape, dtype=np.uint8)),
    }


def _as_pixels(values: npt.NDArray[np.float64]) -> UInt8Array:
    pixels: UInt8Array = values.round().clip(0, 255).astype(np.uint8)
    return pixels


def command(arguments: argparse.Namespace) -> int:
    """Train, write the file, print accuracy and sanity list."""
    if not arguments.output.parent.is_dir():
        raise UserError(f"--output {arguments.output}: no such folder {arguments.output.parent}; create it first")
    if arguments.epochs < 1:
        raise UserError(f"--epochs {arguments.epochs}: at least 1 is needed")
    torch.set_num_threads(1)  # the order of sums, and so the hash of the file, must not depend on the number of cores
    torch.use_deterministic_algorithms(True)
    images, labels = digit_images(DigitsFeatures.input_size)
    held_out = np.zeros(len(images), dtype=bool)
    held_out[DIGITS_HELD_OUT] = True
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)[torch.from_numpy(~held_out)]
    targets = torch.from_numpy(labels[~held_out].astype(np.int64))
    network = train(pixels, targets, arguments.epochs, arguments.seed)

    content: bytes = safetensors.torch.save(network.state_dict())
    arguments.output.write_bytes(content)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    digest = hashlib.sha256(content).hexdigest()
    print(f"{arguments.output}: {parameters} parameters, {len(content)} bytes, sha256 {digest}")
    for name, part in (("training", ~held_out), ("held out", held_out)):
        agreement = label_agreement(embed(network, images[part])[1], labels[part])
        print(f"accuracy, {name}: {agreement:.2%} of {part.sum()}")
    print(f"{'':30}{'distance':>10}{'IS':>8}")
    for name, (distance, score) in sanity_list(network, arguments.seed).items():
        print(f"{name:30}{distance:10.3f}{score:8.2f}")
    return ExitCode.DONE


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument(
        "--epochs", type=int, default=30, help="passes over the 1,437 training digits (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and shifts (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    exit_with_message(lambda: command(parse_arguments()))
