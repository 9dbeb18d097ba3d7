"""Fit the subspace of rank-asymmetric prediction (diffusion.prediction=asym) to the patches of training images.

    python tools/fit_subspace.py --shards /data/imagenet_256 --image-size 256 --patch-size 16 --rank 8 \\
        --output P.safetensors
    python -m jitscale.train --config C.yaml diffusion.prediction=asym diffusion.rank=8 diffusion.subspace=P.safetensors

The file holds the first eigenvectors of the Gram matrix of the patches. It fits networks of this patch size and rank.
A run without diffusion.subspace computes the same at its first start, but leaves out held-out samples. The command
prints the share of the energy (the sum of squares of all patches in [-1, 1]) that lies in the subspace.
"""

from pathlib import Path

import installed

from jitscale import parallel
from jitscale.command import Parser, markdown, natural, path_text, positive, refuse_existing
from jitscale.config import CHANNELS, RGB
from jitscale.data.shards import ShardSet
from jitscale.errors import ExitCode, UserError, exit_with_message
from jitscale.training.subspace import (
    IMAGES,
    explained,
    facts_of,
    gram_matrix,
    leading_subspace,
    random_subspace,
    write_subspace,
)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, fit the subspace, write it, and print its shares."""
    parser = Parser(__doc__)
    shards_help = "as data.shards; {resolution} becomes the image size"
    parser.add_argument("--shards", type=path_text, required=True, metavar="PATTERN", help=shards_help)
    parser.add_argument("--image-size", type=positive, required=True, metavar="N", help="as model.image_size")
    parser.add_argument("--patch-size", type=positive, required=True, metavar="N", help="as model.patch_size")
    channels_help = "as model.in_channels; default: %(default)s"
    parser.add_argument("--channels", type=int, choices=CHANNELS, default=RGB, help=channels_help)
    parser.add_argument("--rank", type=positive, required=True, metavar="R", help="as diffusion.rank")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to write")
    parser.add_number("--images", IMAGES, "number of training images, chosen at random")
    parser.add_number("--seed", 0, "seed that chooses the images, as run.seed does", natural)
    random_help = "write a random subspace instead, for comparison; its share of the energy is printed too"
    parser.add_argument("--random", type=natural, metavar="SEED", help=random_help)
    parser.add_workers()
    options = parser.parse_args(arguments)

    size, patch, rank, output = options.image_size, options.patch_size, options.rank, options.output
    elements = options.channels * patch**2
    if size % patch:
        raise UserError(f"--patch-size {patch}: does not divide --image-size {size}; choose a divisor")
    if rank >= elements:
        what = f"--rank {rank}: must be below {elements}, the numbers of a patch (rank {elements} is v-prediction)"
        raise UserError(f"{what}; for example 8")
    if output.suffix != ".safetensors":
        raise UserError(f"--output {output}: must end in .safetensors")
    refuse_existing(output)
    pattern = options.shards.replace("{resolution}", str(size))
    channels = options.channels
    shards = ShardSet.open(pattern, 0, size, setting="--shards", size_setting="--image-size", channels=channels)
    device = parallel.choose_device("auto")
    gram, images = gram_matrix(shards, patch, options.images, options.seed, options.workers, device)
    if options.random is None:
        subspace, made_by = leading_subspace(gram, rank), "eigenvectors"
    else:
        subspace, made_by = random_subspace(elements, rank, options.random), f"random {options.random}"
    shares = explained(gram, subspace)
    facts = facts_of(shards, patch, rank, options.images, options.seed)
    write_subspace(output, subspace, {**facts, "images": images, "made_by": made_by, "explained": shares[-1]})
    ranks = sorted({*(2**power for power in range(rank.bit_length())), rank})
    print(markdown([("rank", "share of energy"), *((str(each), f"{shares[each - 1]:.2%}") for each in ranks)]))
    print(f"{output}: {made_by}, {rank} of {elements} dimensions, {images} images")
    return ExitCode.DONE


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
