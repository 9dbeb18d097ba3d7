"""Write images as shards for training: cropped, in a random order, with a manifest, by any number of processes.

    python tools/make_shards.py --input ILSVRC2012_img_train.tar --output imagenet_256 --resolution 256 --codec webp
    python tools/make_shards.py --input photos --output photos_512 --resolution 512 --codec raw
    python tools/make_shards.py --input 'old-{0000..0127}.tar' --output new --resolution 256 --codec png
    python tools/make_shards.py --input list.csv --output listed --resolution 256 --codec original
    python tools/make_shards.py --input hub_data/ --split train --output hub_256 --resolution 256 --codec webp

An input is one of these: a folder or a zip with a folder of images for each class (images alone have no labels), or
with EDM's dataset.json or a metadata.csv, .jsonl or .parquet; Parquet or Arrow files; webdataset tars (a file, a
folder, a quoted glob or brace pattern); ImageNet's files; a .csv or .jsonl with the columns path and maybe label.
docs/data.md lists all forms. Archives are read in place. Class names are numbered in sorted order; if all are numbers,
by value.

Codecs: raw is decoded fastest and suits local disks; webp is lossless and half the size; png is lossless too; jpeg is
smallest but changes pixels; original keeps the files, and training crops the images. Transparent images are composited
over --background; with original, this happens when they are read. To train on webdataset tars as they are, index them
with tools/index_shards.py, which copies nothing. If they are packed, images are cropped once, not in every epoch.

If packing was killed or failed, the same command writes the missing shards. The result is the same. To pack on many
machines, give each a part (--part 1/16, ...). On Slurm, slurm/pack_shards.sh packs a part in each task of an array.

The last part to finish writes the manifest. Images that cannot be used are left out and listed in the manifest.
"""

import argparse
import shutil
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import NoReturn

import installed

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jitscale.command import Parser, natural, part_of, path_text
from jitscale.data.background import WHITE, parse_background
from jitscale.data.images import CHANNELS, RGB
from jitscale.data.manifest import Manifest, read_class_names
from jitscale.data.tar_members import described_kinds
from jitscale.errors import DataError, ExitCode, exit_with_message
from jitscale.preparation.forms.search import FindOptions
from jitscale.preparation.labels import described_names
from jitscale.preparation.packing_job import PackingJob, finished, remove_leftovers
from jitscale.preparation.packing_plan import PACKING_CODECS, PackingOptions

BAD_SHOWN = 10


class Stopped(BaseException):
    """A signal asked this process to stop."""


def main() -> int:
    """Parse the command line, write the missing shards of one part, and the manifest if no part is missing."""
    given = parser().parse_args()
    options = PackingOptions(
        input=given.input,
        codec=given.codec,
        resolution=given.resolution,
        samples_per_shard=given.samples_per_shard,
        seed=given.seed,
        background=str(parse_background(given.background)),
        channels=given.channels,
        finding=FindOptions(
            class_names=None if given.class_names is None else read_class_names(given.class_names),
            split=given.split,
            labels=given.labels,
            label_key=given.label_key,
            label_column=given.label_column,
            ground_truth=given.ground_truth,
            image_column=given.image_column,
        ),
    )
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        return _pack_unless_finished(given, options)
    except Stopped as stopped:
        print(f"{given.output}: stopped by {stopped}; the same command continues", file=sys.stderr)
        return ExitCode.REQUEUE


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # a second signal must not interrupt the stop
    raise Stopped(signal.Signals(number).name)


def _pack_unless_finished(given: argparse.Namespace, options: PackingOptions) -> ExitCode:
    """Pack, unless the job is done already.

    Other tasks may finish the job while this one plans it. They then remove the files that this one uses.
    """
    output: Path = given.output
    started = time.monotonic()
    manifest = finished(output, options)
    if manifest is None:
        try:
            bar = tqdm(desc="looking for images", unit="image", unit_scale=True, leave=False)
            with bar, logging_redirect_tqdm():  # warnings get lines of their own
                job = PackingJob(output, options, given.max_bad, bar.update)
            manifest = finished(output, options)  # others may have finished the job before this task planned it again
            if manifest is None:
                return _pack(job, given, started)
        except (DataError, FileNotFoundError) as error:
            manifest = finished(output, options)
            if manifest is None:
                if isinstance(error, DataError):
                    raise
                raise DataError(f"{error.filename}: has disappeared; give the same command again") from error
    remove_leftovers(output)
    print(f"{output}: is there already: {_described(manifest)}")
    return ExitCode.DONE


def _pack(job: PackingJob, given: argparse.Namespace, started: float) -> ExitCode:
    """Write the missing shards of one part and report; `started` is when the command began, by the monotonic clock."""
    output, (part, parts) = job.folder, given.part
    shards = job.shards[part - 1 :: parts]
    missing = job.missing(shards)
    workers = min(given.workers, max(len(missing), 1))
    _announce(job, len(shards) - len(missing), given.part)
    _check_space(job)

    total, to_do = job.images_of(shards), job.images_of(missing)
    stored = 0
    name = "pack" if parts == 1 else f"pack {part}/{parts}"
    interval = 0.5 if sys.stderr.isatty() else 10.0  # a log file needs fewer lines
    with (
        tqdm(total=total, initial=total - to_do, unit="image", desc=name, mininterval=interval) as bar,
        closing(job.run(shards, workers)) as packed,
    ):
        for shard in packed:
            stored += shard.record.bytes
            bar.set_postfix_str(_bytes(stored), refresh=False)
            bar.update(shard.record.samples + len(shard.bad))
    manifest = job.finish()
    seconds = time.monotonic() - started
    took = f"took {seconds:.1f} s, {to_do / seconds:.0f} images/s with {workers} workers"
    print(f"{output}: {to_do} images ({_bytes(stored)}) in {len(missing)} shards {took}")
    if manifest is None:
        print(
            f"{output}: part {part}/{parts} is done; {len(job.missing(job.shards))} of {len(job.shards)} shards are "
            "left to other parts. The last one writes manifest.json; if none did, give any of the commands again"
        )
        return ExitCode.DONE
    print(f"{output}: done: {_described(manifest)}")
    for bad in manifest.bad[:BAD_SHOWN]:
        print(f"  left out: {bad.source}: {bad.reason}")
    if len(manifest.bad) > BAD_SHOWN:
        print(f"  and {len(manifest.bad) - BAD_SHOWN} more; manifest.json lists all")
    return ExitCode.DONE


def _announce(job: PackingJob, done: int, part: tuple[int, int]) -> None:
    inputs = job.inputs
    classes = f"{inputs.num_classes} classes" if inputs.num_classes else "no labels"
    if names := inputs.class_names:
        classes += f" ({described_names(names)})"
    print(
        f"{job.folder}: {len(inputs)} images, {classes}, {len(job.shards)} shards"
        + (f"; part {part[0]}/{part[1]}" if part[1] > 1 else "")
        + (f"; {done} shards are finished already" if done else "")
    )
    for note in inputs.notes:
        print(f"{job.folder}: {note}")
    if inputs.ignored:
        print(f"{job.folder}: {inputs.ignored.total()} other files ignored ({described_kinds(inputs.ignored)})")
    sys.stdout.flush()


def _check_space(job: PackingJob) -> None:
    """Compare the size of the missing shards with the free space. Raises a DataError if raw shards do not fit."""
    needed, free = job.bytes_to_write(), shutil.disk_usage(job.folder).free
    about = {"raw": "exactly", "original": "about"}.get(job.options.codec, "at most")
    print(f"{job.folder}: {about} {_bytes(needed)} to write, {_bytes(free)} free", flush=True)
    if needed > free and job.options.codec == "raw":  # the size of other codecs is only estimated
        remedy = "make room, or choose another --output or --codec webp (about half)"
        raise DataError(f"{job.folder}: {_bytes(needed)} to write, but {_bytes(free)} free; {remedy}")
    if needed > free:
        print(f"{job.folder}: warning: that may be more than is free", file=sys.stderr, flush=True)


def _described(manifest: Manifest) -> str:
    size = sum(shard.bytes for shard in manifest.shards)
    smaller = "enlarged" if manifest.resolution else "smaller than --resolution"
    return (
        f"{manifest.total} images in {len(manifest.shards)} shards, {_bytes(size)}; "
        f"{manifest.enlarged} {smaller}, {len(manifest.bad)} bad{_described_transparency(manifest)}"
    )


def _described_transparency(manifest: Manifest) -> str:
    if not manifest.transparent:
        return ""
    many = f"{manifest.transparent} image{'s' if manifest.transparent > 1 else ''} with transparency"
    if parse_background(manifest.background).colour is None:
        return f"; {many}, whose hidden colours show (--background drop)"
    return f"; {many}, over a {manifest.background} background (--background)"


def _bytes(number: int) -> str:
    return tqdm.format_sizeof(number, "B", 1000)


def parser() -> Parser:
    """The command line."""
    found = Parser(__doc__, allow_abbrev=False)
    found.add_argument(
        "--input", type=path_text, nargs="+", required=True, metavar="SRC", help="images; several inputs become one set"
    )
    found.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the shards")
    found.add_argument("--resolution", type=int, required=True, metavar="R", help="pixels per side after ADM's crop")
    found.add_argument("--codec", choices=PACKING_CODECS, required=True, help="stored form")
    behind = (
        "colour of transparent pixels: white, black or R,G,B; drop shows their hidden colours, as ADM's recipe does"
    )
    found.add_argument("--background", default=str(WHITE), metavar="COLOUR", help=f"{behind} (default: white)")
    kept = "1 stores grey images: colours become luma (default: 3)"
    found.add_argument("--channels", type=int, choices=CHANNELS, default=RGB, help=kept)
    found.add_number("--samples-per-shard", 1000, "images in a shard")
    found.add_number("--seed", 0, "seed of the order", int)
    names = "class names, one per line, in the order of their numbers (default: sorted, 2 before 10)"
    found.add_argument("--class-names", type=Path, metavar="FILE", help=names)
    found.add_argument("--split", metavar="NAME", help="the split to read, if there are several, such as train")
    labels = "folders: the folders are the classes, whatever files lie there; none: no labels; FILE: the file of labels"
    found.add_argument("--labels", metavar="folders|none|FILE", help=labels)
    key = "place of a webdataset sample's label: cls (default), a field of its json such as json:label, or none"
    found.add_argument("--label-key", metavar="KEY", help=key)
    found.add_argument("--label-column", metavar="NAME", help="the column of a table that holds the labels")
    truth = "ImageNet's validation labels (the devkit's text or LOC_val_solution.csv); for .npz files map_clsloc.txt"
    found.add_argument("--image-column", metavar="NAME", help="the column of a Parquet or Arrow file with the images")
    found.add_argument("--ground-truth", metavar="FILE", help=truth)
    found.add_workers()
    found.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="part I (1..N) of N (default: all)")
    most = "unusable images that are allowed (default: 10, or 0.01%% if that is more)"
    found.add_argument("--max-bad", type=natural, metavar="N", help=most)
    return found


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
