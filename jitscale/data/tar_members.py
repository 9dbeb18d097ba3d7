"""The members of one tar: which have content of their own, and what is said of the others."""

import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Collection, Iterator
from typing import IO

from jitscale.data.images import EXTENSIONS

LOST_LINK = " as a link to no earlier member"  # behind the extension, as a kind of member that is passed over
SPARSE = "is sparse: its stored bytes are not its content; write the tar again without --sparse (-S)"

SPLIT = r"(train|training|val|valid|validation|test|testing|dev|eval)"  # of a data set
# By their names, also in folders: of the kinds that EDM, Hugging Face, COCO, CelebA and Kaggle have.
_LABEL_FILE = re.compile(
    r"(.*[_-])?((dataset|metadata|labels?|annotations?(\.coco)?|solution|attr(_\w+)?)\.(json|jsonl|csv|tsv|parquet)"
    r"|(labels?|ground_?truth|attr(_\w+)?)\.txt)"
    rf"|(.*[_-])?{SPLIT}\.(csv|tsv|parquet)|instances_\w+\.json",
    re.IGNORECASE,
)
_LABEL_EXTENSION = re.compile(r"cls\..+|(label|class)(s|es|_?id|_?name)?(\.(txt|json))?|index")

_LAST_OF_NAME = 99  # byte of a header (POSIX.1-2001, ustar); folders may stand elsewhere
_LONGEST_JSON = 1 << 16  # bytes that are looked at
_LABEL_FIELDS = ("label", "labels", "cls", "class", "class_id", "class_name", "target")
_FEW = 3  # folders that a message names
_MOST_KINDS = 5  # of files, likewise


def contents(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Each member that is no folder, and the regular one whose bytes are its content.

    For a hard or symbolic link, that is an earlier member of the tar. None: it is not there, or the member is a device,
    a pipe or the like. Raises as tarfile does.
    """
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.isdir():
            continue
        content: tarfile.TarInfo | None = member
        if not member.isreg():
            folder = posixpath.dirname(member.name) if member.issym() else ""
            linked = posixpath.normpath(posixpath.join(folder, member.linkname))
            content = found.get(linked) if member.issym() or member.islnk() else None
        if content is not None:
            found[posixpath.normpath(member.name)] = content
        yield member, content


def split_name(name: str) -> tuple[str, str]:
    """webdataset's rule: `a/b.seg.PNG` is extension `seg.png` of key `a/b`. Hidden members belong to no key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot and not is_hidden(name) else ("", "")


def is_hidden(name: str) -> bool:
    """Whether a member, or a folder that it lies in, is hidden, as the store that git-annex links to: `.git/annex`."""
    return "." in name and any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))


def is_image(name: str) -> bool:
    """Whether a member of this name is the image of a sample."""
    return split_name(name)[1] in EXTENSIONS


def is_image_header(block: bytes) -> bool:
    """Whether the header `block`, which stands before a member's bytes, is surely an image's: long names are cut.

    A damaged one counts as an image's: whoever reads the tar in its order meets the damage.
    """
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return True
    return block[_LAST_OF_NAME] == 0 and is_image(member.name)


def described_kinds(kinds: Counter[str]) -> str:
    """The most frequent kinds of files that are passed over, by extension, with their numbers."""
    return ", ".join(f".{kind or '(none or hidden)'} {count}" for kind, count in kinds.most_common(_MOST_KINDS))


def is_label_file(name: str) -> bool:
    """Whether a file of this name, which lies among images, holds their labels."""
    return bool(_LABEL_FILE.fullmatch(name))


def unread_labels(file: IO[bytes], members: dict[str, dict[str, tarfile.TarInfo]], keys: Collection[str]) -> str:
    """What looks like labels in a tar, and the remedy: `members` by key and extension; samples `keys` have no cls.

    Empty if nothing does. Raises an OSError if `file` cannot be read.
    """
    no_labels, remedy = "has no cls members, but", "to train without labels, or write each label as a member KEY.cls"
    for key, parts in members.items():
        for extension in parts:
            name = f"{key}.{extension}"
            if is_label_file(posixpath.basename(name)) if key not in keys else _LABEL_EXTENSION.fullmatch(extension):
                return f"{no_labels} {name}, which seems to hold labels and is not read; remove it {remedy}"
    for key in keys:
        if member := members[key].get("json"):
            text = os.pread(file.fileno(), min(member.size, _LONGEST_JSON), member.offset_data)
            if field := _label_field(text):
                what = f"{no_labels} {key}.json holds {field!r}, which is not read as a label"
                return f"{what}; remove that field {remedy}"
            break
    folders = sorted({posixpath.normpath(posixpath.dirname(key)) for key in keys} - {"."})
    depths = Counter(folder.count("/") for folder in folders)
    if depths and max(depths.values()) > 1:  # such as train/cat and val/cat, maybe besides test
        some = ", ".join(folders[:_FEW]) + (", ..." if len(folders) > _FEW else "")
        what = f"{no_labels} images in {len(folders)} folders ({some}), which are not read as classes"
        remedy = "unpack it and give tools/make_shards.py the folder of them, or put all into one folder for no labels"
        return f"{what}; {remedy}"
    return ""


def _label_field(text: bytes) -> str:
    """The field of a JSON object that seems to hold a label; empty without one."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return next((field for field in _LABEL_FIELDS if field in values), "") if isinstance(values, dict) else ""
