"""Time reading: each codec next to stock webdataset with Pillow, the hand-off to the trainer, and a resume.

The photographs are synthetic, 500 x 375, JPEG with quality 95: about 110 KB each, like ImageNet's. All readers write
cropped uint8 images into one buffer, as for a batch. They take turns, so that all see the same load of the machine.
"""

import argparse
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from tqdm import tqdm

from benchmarks.measuring import CPU, Stopwatch, Table, peak_memory_mib
from jitscale.data.images import CODECS, center_crop, decode, encode
from jitscale.data.loader import ShardLoader
from jitscale.data.manifest import MANIFEST, Manifest, ShardRecord
from jitscale.data.order import EpochOrder
from jitscale.data.shards import ShardSet
from jitscale.data.tar_index import index_path
from jitscale.preparation.packing import Sample, shard_name, write_shard

WIDTH, HEIGHT, QUALITY = 500, 375, 95
BATCH = 128  # batch of the hand-off
SAMPLES_A_SHARD = 100
ROUNDS = 5
LINKS = 50_000  # names of one file; file systems allow 65,000
# Images per second that one H200 trains at 256 px, as measured (docs/performance.md, "On a GPU").
TRAINED = {"JiT-B/16": 2121, "JiT-L/16": 711, "JiT-H/16": 392, "JiT-G/16": 185}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Images per second on one core by codec and resolution, the rate of the hand-off, and the cost of a resume."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        jpegs = [_photograph(number) for number in tqdm(range(options.images), unit="img", desc="photographs")]
        forms = {size: _time_forms(folder / str(size), jpegs, size, options.seconds) for size in options.resolutions}
        first = options.resolutions[0]
        handed_over = _time_hand_off(ShardSet.open(folder / str(first) / "raw", 1), options.workers, options.seconds)
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # so that its peak memory is its own
            resume = fresh.apply(_time_resume, (folder / "many", options.resume_samples))
    return {
        "forms": forms,
        "hand_off": {"resolution": first, "workers": options.workers, "images_per_second": handed_over},
        "resume": resume,
    }


def describe(result: dict[str, Any]) -> Table:
    """The lines of the table of `measure`."""
    lines = []
    for resolution, forms in result["forms"].items():
        stock = forms["stock"]["images_per_second"]
        for name, form in forms.items():
            label = "original, stock webdataset + Pillow" if name == "stock" else name
            rate, (low, high) = form["images_per_second"], form["range"]
            value = f"{rate:,.0f} images/s/core ({low:,.0f} to {high:,.0f})"
            value += "" if name == "stock" else f", {rate / stock:.1f} x stock"
            lines.append((f"{label} at {resolution} px", f"{value}, {form['bytes_per_image']:,.0f} bytes"))
    for name, form in next(iter(result["forms"].values())).items():
        cores = ", ".join(f"{model} {rate / form['images_per_second']:.1f}" for model, rate in TRAINED.items())
        lines.append((f"cores that read {name} for one H200", cores))
    hand_off, resume = result["hand_off"], result["resume"]
    handed_over = f"hand-off of raw at {hand_off['resolution']} px, {hand_off['workers']} workers, batch {BATCH}"
    return [
        *lines,
        (handed_over, f"{hand_off['images_per_second']:,.0f} images/s"),
        (f"opening {resume['shards']:,} shards with {resume['samples']:,} samples", f"{resume['open_s']:.2f} s"),
        ("first batch at position 0", f"{1e3 * resume['first_s']:.0f} ms"),
        ("first batch inside the epoch", f"{1e3 * resume['inside_s']:.0f} ms"),
        ("memory for opening and both batches", f"{resume['mib']:.0f} MiB"),
    ]


def _photograph(seed: int) -> bytes:
    """A JPEG whose spectrum falls like a photograph's, with some sensor noise."""
    random = np.random.default_rng(seed)
    image = random.normal(0.0, 9.0, (HEIGHT, WIDTH, 3))
    for octave in range(1, 9):
        coarse = random.normal(0.0, 1.0, (2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            plane = Image.fromarray(coarse[..., channel]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            image[..., channel] += 60.0 / 1.5**octave * np.asarray(plane)
    pixels = np.clip(image + 128.0, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _time_forms(folder: Path, jpegs: list[bytes], resolution: int, seconds: float) -> dict[str, dict[str, Any]]:
    crops = [center_crop(decode(data, "jpg"), resolution) for data in jpegs]
    stored = {"original": [("jpg", data) for data in jpegs]}
    stored |= {codec: [encode(crop, codec) for crop in crops] for codec in CODECS}
    for codec, samples in stored.items():
        _write(folder / codec, codec, None if codec == "original" else resolution, samples)
    readers = {"stock": _stock(folder / "original", resolution)}
    readers |= {codec: _ours(ShardSet.open(folder / codec, 1, resolution)) for codec in stored}
    rates: dict[str, list[float]] = {name: [] for name in readers}
    for _ in tqdm(range(ROUNDS), unit="round", desc=f"read at {resolution} px"):
        for name, reader in readers.items():
            rates[name].append(_rate(reader, seconds / ROUNDS))
    forms = {}
    for name, measured in rates.items():
        size = float(np.mean([len(data) for _, data in stored["original" if name == "stock" else name]]))
        speed = {"images_per_second": float(np.median(measured)), "range": [min(measured), max(measured)]}
        forms[name] = {**speed, "bytes_per_image": size}
    return forms


def _write(folder: Path, codec: str, resolution: int | None, samples: list[tuple[str, bytes]]) -> None:
    folder.mkdir(parents=True)
    records = []
    for number, first in enumerate(range(0, len(samples), SAMPLES_A_SHARD)):
        part = enumerate(samples[first : first + SAMPLES_A_SHARD], first)
        dictionaries: list[Sample] = [{"__key__": f"{key:09d}", form: data, "cls": b"0"} for key, (form, data) in part]
        records.append(write_shard(folder / shard_name(number), dictionaries))
    Manifest(codec, resolution, 1, None, len(samples), records).write(folder / MANIFEST)


def _stock(folder: Path, resolution: int) -> Iterator[None]:
    """The usual way with webdataset: its pipeline, its Pillow decoder, and the crop of the recipe."""
    tars = sorted(str(path) for path in folder.glob("*.tar"))
    row = np.empty((resolution, resolution, 3), np.uint8)
    while True:
        for (picture,) in webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg"):
            row[:] = center_crop(np.asarray(picture), resolution)
            yield


def _ours(shards: ShardSet) -> Iterator[None]:
    row = np.empty((shards.image_size, shards.image_size, shards.channels), np.uint8)
    order = EpochOrder(shards.samples_per_shard, seed=0)
    for where in cycle(zip(*order.locate(np.arange(shards.num_samples)), strict=True)):
        row[:], _ = shards.read(int(where[0]), int(where[1]))
        yield


def _rate(items: Iterator[object], seconds: float) -> float:
    """Items per second, measured for `seconds` or more."""
    next(items)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        next(items)
        count += 1
    return count / (time.perf_counter() - started)


def _time_hand_off(shards: ShardSet, workers: int, seconds: float) -> float:
    """Images per second that arrive in the training process."""
    order = EpochOrder(shards.samples_per_shard, seed=0)
    batches = iter(ShardLoader(shards, order, BATCH, BATCH, 0, 1, 0, workers, pin_memory=False))
    for _ in range(4 * workers):
        next(batches)
    rates = [_rate(batches, seconds / ROUNDS) * BATCH for _ in range(ROUNDS)]
    batches.close()
    return float(np.median(rates))


def _time_resume(folder: Path, samples: int) -> dict[str, float]:
    """Open a set of many samples, and read a batch from the beginning and one from the middle of its epoch."""
    links = _write_many(folder, samples)
    before, watch = peak_memory_mib(), Stopwatch(CPU)
    with watch.part("open_s"):
        shards = ShardSet.open(folder, 1, 1)
    for name, position in (("first_s", 0), ("inside_s", shards.num_samples // 2 + 12_345)):
        with watch.part(name):
            order = EpochOrder(shards.samples_per_shard, seed=0)
            next(iter(ShardLoader(shards, order, BATCH, BATCH, 0, 1, position, 0, pin_memory=False)))
    memory = peak_memory_mib() - before
    return {"shards": links, "samples": shards.num_samples, "mib": memory, **watch.medians()}


def _write_many(folder: Path, samples: int) -> int:
    """Shards of 1,000 tiny samples under many names; returns how many."""
    folder.mkdir()
    extension, data = encode(np.zeros((1, 1, 3), np.uint8), "raw")
    contents: list[Sample] = [{"__key__": f"{key:09d}", extension: data, "cls": b"0"} for key in range(1000)]
    records: list[ShardRecord] = []
    for number in tqdm(range(max(1, samples // len(contents))), unit="shard", desc="many shards"):
        path = folder / shard_name(number)
        if number % LINKS == 0:
            source, record = path, write_shard(path, contents)
        else:
            os.link(source, path)
            os.link(index_path(source), index_path(path))
        records.append(ShardRecord(path.name, record.samples, record.bytes, record.sha256))
    Manifest("raw", 1, 1, None, len(records) * len(contents), records).write(folder / MANIFEST)
    return len(records)
