"""Show the content of shards: counts, classes and their balance, sizes and colours of a random sample, a contact sheet.

    python tools/inspect_shards.py /data/imagenet_256 --contact-sheet imagenet.png
    python tools/inspect_shards.py '/data/theirs-{0000..0009}.tar' --samples 500 --json

No manifest is needed. Damaged tars and images that cannot be decoded are counted; tools/index_shards.py lists them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import installed

from jitscale.command import Parser, markdown, path_text
from jitscale.data.find import find_tars
from jitscale.errors import DataError, ExitCode, data_error, exit_with_message
from jitscale.files import atomic_write
from jitscale.preparation.inspection import balance, collect, contact_sheet, extensions, look, statistics

MOST_NAMED = 5  # classes or bad inputs that the table names


def main() -> int:
    """Parse the command line, look and print."""
    parser = Parser(__doc__)
    parser.add_argument(
        "shards", type=path_text, metavar="PATTERN", help="a folder, or a glob or brace pattern of tars in one folder"
    )
    parser.add_argument("--contact-sheet", type=Path, metavar="FILE.png", help="write a picture of 8 x 8 images")
    parser.add_number("--samples", 2000, "random images to decode")
    parser.add_number("--seed", 0, "seed of the random sample", int)
    parser.add_workers()
    parser.add_json()
    options = parser.parse_args()
    if options.contact_sheet is not None and options.contact_sheet.suffix.lower() != ".png":
        parser.error("--contact-sheet must be called .png")

    collection = collect(find_tars(options.shards), options.workers)
    if not collection.samples:
        what = f" ({collection.defects[0]})" if collection.defects else ""
        raise DataError(f"{options.shards}: holds no sample that can be read{what}; choose other shards")
    seen = look(collection, options.samples, options.seed, options.workers)
    manifest = collection.manifest
    result = {
        "shards": len(collection.paths),
        "samples": collection.samples,
        "bytes": collection.bytes,
        "bytes_per_sample": collection.bytes / collection.samples,
        "codec": manifest.codec or None,
        "resolution": manifest.resolution,
        "crop": manifest.crop,
        "channels": manifest.channels if manifest.codec else None,
        "background": manifest.background,
        "transparent": manifest.transparent,
        "manifest_hash": collection.manifest_hash,
        "bad_inputs": list(map(asdict, manifest.bad)),
        "enlarged": manifest.enlarged,
        "defects": list(map(str, collection.defects)),
        "extensions": extensions(collection),
        "classes": balance(collection),
        "decoded": len(seen.found),
        "undecodable": list(map(str, seen.undecodable)),
        **statistics(seen),
    }
    if options.contact_sheet is not None:
        sheet, path = contact_sheet(collection, options.seed), options.contact_sheet
        with data_error(f"{path}: cannot be written", "choose another file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(sheet)
    print(json.dumps(result) if options.json else markdown(_lines(result, manifest.class_names)))
    return ExitCode.DONE


def _lines(result: dict[str, Any], class_names: list[str] | None) -> list[tuple[str, str]]:
    unknown = None if result["codec"] else "unknown: there is no manifest"
    resolution = f"{result['resolution']} pixels per side" if result["resolution"] else "images of mixed sizes"
    lines = [
        ("shards", f"{result['shards']:,}"),
        ("samples", f"{result['samples']:,}"),
        ("bytes", f"{result['bytes']:,}"),
        ("bytes per sample", f"{result['bytes_per_sample']:,.0f}"),
        ("codec", unknown or result["codec"]),
        ("images of each extension", ", ".join(f"{name} {number:,}" for name, number in result["extensions"].items())),
        ("resolution", unknown or resolution),
        ("crop", result["crop"] or "none"),
        ("channels", unknown or f"{result['channels']}"),
        ("background of transparent images", result["background"]),
        ("transparent images", "not counted" if result["transparent"] is None else f"{result['transparent']:,}"),
        ("manifest hash", result["manifest_hash"]),
        ("inputs left out as bad", _some([f"{bad['source']}: {bad['reason']}" for bad in result["bad_inputs"]])),
        ("images enlarged", f"{result['enlarged']:,}"),
        ("defects of tars and labels", _some(result["defects"])),
    ]
    classes = result["classes"]
    if classes["number"]:
        named = f": {_first(class_names)}" if class_names else ", without names"
        lines += [
            ("classes", f"{classes['number']:,}{named}"),
            ("smallest class", "{samples:,} samples, {class}".format(**classes["smallest"])),
            ("median class", f"{classes['median_samples']:,g} samples"),
            ("largest class", "{samples:,} samples, {class}".format(**classes["largest"])),
            ("classes without a sample", _some(classes["empty"])),
            ("samples without a class", f"{classes['samples_without_label']:,}"),
        ]
    else:
        lines.append(("classes", "none"))
    lines += [("images decoded", f"{result['decoded']:,}"), ("undecodable among them", _some(result["undecodable"]))]
    if result["decoded"]:
        for side in ("width", "height"):
            lines.append((f"{side}: min, median, max", "{min}, {median:g}, {max}".format(**result[side])))
        for side, share in result["share_of_short_sides_below"].items():
            lines.append((f"short side below {side}", f"{share:.1%}"))
        for limits, suffix, digits in (("[0, 255]", "_255", 1), ("[-1, 1]", "", 3)):
            for what, name in (("mean of R, G, B", "rgb_mean"), ("standard deviation", "rgb_std")):
                numbers = ", ".join(f"{value:.{digits}f}" for value in result[name + suffix])
                lines.append((f"{what} in {limits}", numbers))
        lines.append(("grey images", f"{result['share_grey']:.1%}"))
    return lines


def _first(texts: list[str]) -> str:
    return "; ".join([*texts[:MOST_NAMED], *(["..."] if len(texts) > MOST_NAMED else [])])


def _some(texts: list[str]) -> str:
    """The number of `texts`, and the first ones."""
    return f"{len(texts):,} ({_first(texts)})" if texts else "0"


if __name__ == "__main__":
    exit_with_message(main, same_on_all_ranks=False)
