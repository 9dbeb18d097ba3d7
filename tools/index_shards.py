"""Make the webdataset tars of another program into shards, or verify any shards.

    python tools/index_shards.py /data/imagenet_wds
    python tools/index_shards.py '/data/imagenet_wds/train-*.tar' --class-names wnids.txt
    python tools/index_shards.py /data/from_the_hub --label-key json:label
    python tools/index_shards.py /data/imagenet_256 --verify --report defects.jsonl

Indexing reads all tars of one folder. It writes an index and the keys next to each tar, and a manifest.json. Labels are
the `cls` members, or the members that --label-key names: numbers, or names, which are numbered in sorted order or in
the order of --class-names. Transparent images are read over --background. If there is any defect, nothing is written.

Verifying compares the shards with the manifest (size, sha256, samples, index, keys, labels) and decodes every image.
Every defect is one line with shard, byte and remedy. Exit code 0: indexed, or no defect; 2: defects.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import installed

from jitscale.command import Parser, path_text
from jitscale.data.background import parse_background
from jitscale.data.find import Tars, find_tars
from jitscale.data.manifest import MANIFEST, Manifest, read_class_names
from jitscale.data.tar_index import Defect
from jitscale.data.tar_labels import LabelKey
from jitscale.data.tar_members import described_kinds
from jitscale.errors import DataError, ExitCode, data_error, exit_with_message
from jitscale.files import atomic_write
from jitscale.preparation.labels import described_names
from jitscale.preparation.survey import survey
from jitscale.preparation.verification import verify

MOST_LINES = 50  # defects that are printed


def main() -> int:
    """Parse the command line, then index or verify."""
    parser = Parser(__doc__)
    where = "a folder, or a glob or brace pattern of tars in one folder"
    parser.add_argument("shards", type=path_text, metavar="DIR_OR_GLOB", help=where)
    parser.add_argument("--verify", action="store_true", help="check shards that have a manifest; write nothing")
    again = "index again although there is a manifest; a manifest of tools/make_shards.py is kept"
    parser.add_argument("--force", action="store_true", help=again)
    parser.add_argument("--class-names", type=Path, metavar="FILE", help="names by line, in the order of their numbers")
    behind = "colour of transparent pixels: white, black, R,G,B, or drop (hidden colours); stored in the manifest"
    parser.add_argument("--background", metavar="COLOUR", help=f"{behind} (default: white)")
    key = "place of a sample's label: cls (default), a field of its json such as json:label, or none for no labels"
    parser.add_argument("--label-key", metavar="KEY", help=key)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write every defect as one JSON object per line")
    parser.add_workers()
    options = parser.parse_args()
    if options.verify and (options.force or options.class_names or options.background or options.label_key):
        parser.error("--verify writes nothing: it takes no --force, --class-names, --background or --label-key")

    tars = find_tars(options.shards)
    if options.verify:
        return _verify(tars, options)
    if tars.manifest is not None and not options.force:
        return _indexed_before(tars, tars.manifest, options)
    return _index(tars, options)


def _index(tars: Tars, options: argparse.Namespace) -> int:
    if not os.access(tars.folder, os.W_OK):
        raise DataError(f"{tars.folder}: cannot be written to, but the indexes must lie there; correct its permissions")
    class_names = None if options.class_names is None else read_class_names(options.class_names)
    background = None if options.background is None else parse_background(options.background)
    key = LabelKey.parse(options.label_key)
    found = survey(tars, class_names, options.workers, key=key, background=background)
    _report(found.defects, options.report, sys.stderr)
    if found.defects:
        damaged = len({defect.path for defect in found.defects})
        what = f"{_many(len(found.defects), 'defect')} in {damaged} of {len(found.tars.paths)} tars"
        raise DataError(f"{tars.folder}: {what}; nothing was written; repair or leave out these tars")
    found.write()
    manifest = found.manifest
    classes = _many(manifest.num_classes, "class", "classes") if manifest.num_classes else "no labels"
    side = manifest.resolution
    size = "of mixed sizes" if side is None else f"of {side} x {side} pixels"
    counts = f"{_many(len(manifest.shards), 'shard')} with {_many(manifest.total, 'image')}"
    named = f" ({described_names(manifest.class_names)})" if manifest.class_names else ""
    print(f"{tars.folder}: indexed {counts} {size}, {classes}{named}")
    _say_skipped(found.skipped)
    if undecodable := sum(scan.undecodable for scan in found.scans):
        print(f"{_many(undecodable, 'image')} cannot be decoded; training replaces them, --verify lists them")
    return ExitCode.DONE


def _indexed_before(tars: Tars, manifest: Manifest, options: argparse.Namespace) -> int:
    named = {record.name: record.bytes for record in manifest.shards}
    there = {path.name: path.stat().st_size for path in tars.paths}
    differing = [name for name in there if named.get(name) != there[name]]
    if tars.whole_folder:
        differing += named.keys() - there.keys()
    if differing:
        what = f"{len(differing)} tars are missing, not named or of another size ({min(differing)}, ...)"
        remedy = "look with --verify, or index again with --force"
        raise DataError(f"{tars.folder / MANIFEST}: is there, but {what}; {remedy}")
    if options.background is not None and str(parse_background(options.background)) != manifest.background:
        what = f"says --background {manifest.background}, not {options.background}; --force changes it"
        raise DataError(f"{tars.folder / MANIFEST}: {what}")
    if options.label_key not in (None, manifest.label_key):
        what = f"its labels are those of {manifest.label_key}, not of {options.label_key}"
        raise DataError(f"{tars.folder / MANIFEST}: {what}; --force indexes again")
    print(f"{tars.folder}: is indexed already, {_many(len(named), 'shard')} with {_many(manifest.total, 'image')}")
    return ExitCode.DONE


def _verify(tars: Tars, options: argparse.Namespace) -> int:
    result = verify(tars, options.workers)
    _report(result.defects, options.report, sys.stdout)
    _say_skipped(result.skipped)
    outside = len(tars.not_in_manifest())
    if tars.whole_folder and outside:
        print(f"not looked at, since {MANIFEST} does not name them: {_many(outside, 'tar')} of the folder")
    print(
        f"{tars.folder}: {_many(result.shards, 'shard')}, {_many(result.samples, 'sample')}, {result.bytes:,} bytes, "
        f"{result.samples / max(result.seconds, 1e-9):.0f} images/s, {_many(len(result.defects), 'defect')}"
    )
    return ExitCode.USER_ERROR if result.defects else ExitCode.DONE


def _report(defects: Sequence[Defect], path: Path | None, stream: TextIO) -> None:
    """Write all defects to the file `path`, and print the first ones."""
    if path is not None:
        entries = ({"shard": str(defect.path), "byte": defect.byte, "what": defect.what} for defect in defects)
        with data_error(f"{path}: the report cannot be written", "choose another file"), atomic_write(path) as file:
            file.writelines(f"{json.dumps(entry)}\n".encode() for entry in entries)
    for defect in defects[:MOST_LINES]:
        print(defect, file=stream)
    if len(defects) > MOST_LINES:
        where = "--report FILE writes all" if path is None else f"all are in {path}"
        print(f"... and {len(defects) - MOST_LINES} more ({where})", file=stream)


def _say_skipped(kinds: Counter[str]) -> None:
    """Print how many members belong to no sample; most are files next to the images."""
    if kinds:
        print(f"{_many(kinds.total(), 'other member')} ignored ({described_kinds(kinds)})")


def _many(number: int, one: str, several: str = "") -> str:
    return f"{number:,} {one if number == 1 else several or one + 's'}"


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
