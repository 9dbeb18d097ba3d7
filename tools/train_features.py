"""Train the feature network of the digits or of the glyphs, and print its distances for known damage.

    python tools/train_features.py digits --output digits_features.safetensors
    python tools/train_features.py glyphs --output glyphs_features.safetensors

These commands made the files in jitscale/evaluation. Do not train a network again without need: distances of different
weights are not comparable. For the same reason every result names the hash of its file.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import installed

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import nn
from tqdm import tqdm

from jitscale.command import Parser, positive
from jitscale.data.images import UInt8Array
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.evaluation.features import FeatureNetwork
from jitscale.evaluation.metrics import frechet_distance, inception_score, label_agreement
from jitscale.evaluation.small_networks import DIGITS_HELD_OUT, DigitsFeatures, GlyphFeatures
from jitscale.keyed_random import Int64Array
from jitscale.preparation.digits import digit_images
from jitscale.preparation.glyphs import Glyphs

BATCH = 64
EMBEDDED_TOGETHER = 600  # images in a batch of `embed`
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
GLYPHS = 6000
GLYPHS_SEED = 1  # tools/make_glyphs.py draws with another seed, so its glyphs differ from these

Float32Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Lesson:
    """A network and its N training images."""

    network: Callable[[], FeatureNetwork]  # makes the untrained network
    images: UInt8Array  # (N, R, R, 3) at the network's input size
    labels: Int64Array  # (N,) classes
    held_out: npt.NDArray[np.bool_]  # (N,) true for images that are not trained on
    redrawn: Callable[[int], UInt8Array]  # draws the images at another resolution
    others: Sequence[int]  # further resolutions in the sanity list
    epochs: int  # passes over the images
    styles: Int64Array | None = None  # (N,) classes of an auxiliary task
    shift: int = 0  # largest random shift in pixels, on black ground; glyphs are drawn off the centre already
    # Largest standard deviation, in units of [-1, 1], of white noise that is added to the images. The colours are flat:
    # without this noise in training, noise would dominate the features.
    noise: float = 0.0


def digits() -> Lesson:
    """The ten digits."""
    images, labels = digit_images(DigitsFeatures.input_size)
    held_out = np.zeros(len(images), dtype=bool)
    held_out[DIGITS_HELD_OUT] = True
    return Lesson(DigitsFeatures, images, labels, held_out, lambda size: digit_images(size)[0], (64,), 30, shift=2)


def glyphs() -> Lesson:
    """Ten letters. The auxiliary task is to tell their fonts, which differ in detail."""

    def drawn(size: int) -> UInt8Array:
        sequence = Glyphs(GLYPHS, size, GLYPHS_SEED)
        return np.stack([sequence[index] for index in tqdm(range(GLYPHS), unit="img", desc=f"draw {size} px")])

    size = GlyphFeatures.input_size
    letters, held_out = Glyphs(GLYPHS, size, GLYPHS_SEED), np.arange(GLYPHS) >= GLYPHS * 4 // 5
    return Lesson(
        GlyphFeatures, drawn(size), letters.labels, held_out, drawn, (64, 32), 18, styles=letters.fonts, noise=0.3
    )


LESSONS = {"digits": digits, "glyphs": glyphs}


def train(lesson: Lesson, epochs: int, seed: int) -> FeatureNetwork:
    """Train the lesson's network on the images that are not held out."""
    torch.manual_seed(seed)
    network = lesson.network()
    training = torch.from_numpy(~lesson.held_out)
    images = torch.from_numpy(lesson.images).permute(0, 3, 1, 2)[training]
    labels = torch.from_numpy(lesson.labels)[training]
    parameters = list(network.parameters())
    if lesson.styles is not None:
        styles = torch.from_numpy(lesson.styles)[training]
        tell_style = nn.Linear(network.num_features, int(styles.max()) + 1)
        parameters += tell_style.parameters()
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    batches = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
    side, shift = images.shape[-1], lesson.shift
    progress = tqdm(range(epochs), unit="epoch")
    for _ in progress:
        for chosen in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            down, right = torch.randint(2 * shift + 1, (2,)).tolist()
            padded = F.pad(images[chosen], (shift, shift, shift, shift))
            shown = padded[:, :, down : down + side, right : right + side]
            if lesson.noise > 0:
                deviations = 127.5 * lesson.noise * torch.rand(len(chosen), 1, 1, 1)
                shown = (shown + deviations * torch.randn(shown.shape)).round().clamp(0, 255).to(torch.uint8)
            embedded = network(shown)
            loss = F.cross_entropy(embedded.logits, labels[chosen])
            if lesson.styles is not None:
                loss = loss + F.cross_entropy(tell_style(embedded.features), styles[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    measure_scale(network, images)
    return network.eval()


@torch.no_grad()
def measure_scale(network: FeatureNetwork, images: torch.Tensor) -> None:
    """Replace the running averages by the statistics of all `images`, so that every feature has exactly variance 1."""
    network.train()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.momentum = 1.0  # the statistics are those of the last batch, which is the whole set
    network(images)


@torch.no_grad()
def embed(network: FeatureNetwork, images: UInt8Array) -> tuple[Float32Array, Float32Array]:
    """Features (N, F) and logits (N, L) of `images` (N, height, width, 3)."""
    parts = [network(part) for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(EMBEDDED_TOGETHER)]
    features, logits, _ = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return features, logits


def sanity_list(network: FeatureNetwork, lesson: Lesson, seed: int) -> dict[str, tuple[float, float]]:
    """Fréchet distance to all real images and Inception Score of sets whose order of quality is known, by name."""
    images, labels, side = lesson.images, lesson.labels, network.input_size
    real, _ = embed(network, images)
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(images))
    half = len(images) // 2

    def score(changed: UInt8Array | Float32Array) -> tuple[float, float]:
        features, logits = embed(network, changed.round().clip(0, 255).astype(np.uint8))
        return frechet_distance(features, real), inception_score(logits)[0]

    def noise(sigma: float) -> Float32Array:
        return np.float32(127.5 * sigma) * generator.standard_normal(images.shape, np.float32)

    def blurred(sigma: float) -> Float32Array:
        return gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))

    halves = [embed(network, images[part])[0] for part in (order[:half], order[half:])]
    return {
        "half against half": (frechet_distance(*halves), float("nan")),
        "all real": score(images),
        "half": score(images[order[:half]]),
        **{f"from {size} px": score(lesson.redrawn(size)) for size in lesson.others},
        **{f"noise, sigma {sigma} of [-1, 1]": score(images + noise(sigma)) for sigma in (0.1, 0.3)},
        **{f"blur, sigma {sigma} px of {side}": score(blurred(sigma)) for sigma in (0.5, 1.0, 2.0)},
        "without the class 3": score(images[labels != 3]),
        "ten images repeated": score(np.repeat(images[order[:10]], len(images) // 10, axis=0)),
        "uniform noise": score(generator.integers(0, 256, images.shape, dtype=np.uint8)),
    }


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train, write the file, and print the accuracy and the sanity list."""
    parser = Parser(__doc__)
    parser.add_argument("images", choices=list(LESSONS), help="the images that the network learns")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .safetensors file to write")
    epochs = "passes over the training images; default: 30 digits, 18 glyphs"
    parser.add_argument("--epochs", type=positive, metavar="N", help=epochs)
    parser.add_number("--seed", 0, "seed of weights, order and shifts", int)
    options = parser.parse_args(arguments)

    output: Path = options.output
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.parent}; create it first")
    torch.set_num_threads(1)  # the number of cores must not change the order of sums, and so the hash of the file
    torch.use_deterministic_algorithms(True)
    lesson = LESSONS[options.images]()
    network = train(lesson, options.epochs or lesson.epochs, options.seed)

    content: bytes = safetensors.torch.save(network.state_dict())
    output.write_bytes(content)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    digest = hashlib.sha256(content).hexdigest()
    print(f"{output}: {parameters} parameters, {len(content)} bytes, sha256 {digest}")
    for name, part in (("training", ~lesson.held_out), ("held out", lesson.held_out)):
        agreement = label_agreement(embed(network, lesson.images[part])[1], lesson.labels[part])
        print(f"accuracy, {name}: {agreement:.2%} of {part.sum()}")
    print(f"{'':30}{'distance':>10}{'IS':>8}")
    for name, (distance, score) in sanity_list(network, lesson, options.seed).items():
        print(f"{name:30}{distance:10.3f}{score:8.2f}")
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
