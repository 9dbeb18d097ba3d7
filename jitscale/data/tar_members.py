"""The members of one tar: which have content of their own, and what is said of the others."""

import json
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from typing import IO

from jitscale.data.images import EXTENSIONS

LOST_LINK = " as a link without its target"  # behind the extension, as a kind of member that is passed over
SPARSE = "is sparse: its stored bytes are not its content; write the tar again without --sparse (-S)"

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
    """webdataset's rule: `a/b.seg.PNG` is extension `seg.png` of key `a/b`. Hidden files belong to no key."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def is_image(name: str) -> bool:
    """Whether a member of this name is the image of a sample."""
    return split_name(name)[1] in EXTENSIONS


def described_kinds(kinds: Counter[str]) -> str:
    """The most frequent kinds of files that are passed over, by extension, with their numbers."""
    return ", ".join(f".{kind or '(none)'} {count}" for kind, count in kinds.most_common(_MOST_KINDS))


def unread_labels(file: IO[bytes], samples: dict[str, dict[str, tarfile.TarInfo]]) -> str:
    """What looks like labels in a tar whose `samples`, members by key and extension, have no `cls`, and the remedy.

    Empty if nothing does. Raises an OSError if `file` cannot be read.
    """
    remedy = "write each label as a member KEY.cls, or remove that field to train without labels"
    for key, parts in samples.items():
        if "json" in parts:
            member = parts["json"]
            text = os.pread(file.fileno(), min(member.size, _LONGEST_JSON), member.offset_data)
            if field := _label_field(text):
                return f"has no cls members, but {key}.json holds {field!r}, which is not read as a label; {remedy}"
            break
    folders = sorted({key.rpartition("/")[0] for key in samples})
    if len(folders) > 1 and all(folders) and len(set(map(posixpath.dirname, folders))) == 1:
        some = ", ".join(folders[:_FEW]) + (", ..." if len(folders) > _FEW else "")
        what = f"has no cls members, but images in {len(folders)} folders ({some}), which are not read as classes"
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
