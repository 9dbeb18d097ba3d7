"""The members of one tar: which have content of their own, and what is said of the others."""

import json
import os
import posixpath
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from itertools import islice
from typing import IO

from jitscale.data.images import EXTENSIONS
from jitscale.data.tar_labels import fields_of

LOST_LINK = " as a link to no earlier member"  # behind the extension, as a kind of member that is passed over
SPARSE = "is sparse: its stored bytes are not its content; write the tar again without --sparse (-S)"

SPLIT = r"(train|training|val|valid|validation|test|testing|dev|eval)"  # of a data set
# By their names, also in folders: of the kinds that EDM, Hugging Face, COCO, CelebA, Tiny ImageNet and Kaggle have.
_LABEL_FILE = re.compile(
    rf"(.*[_-]|image|{SPLIT})?((dataset|metadata|labels?|annotations?(\.coco)?|solution|attr(_\w+)?)"
    r"\.(json|jsonl|csv|tsv|parquet)|(labels?|annotations?)\.(npy|npz|pkl|pickle|mat|h5|xlsx?)"
    r"|(labels?|annotations?|ground_?truth|attr(_\w+)?)\.txt)"
    rf"|(.*[_-])?{SPLIT}\.(csv|tsv|parquet)|instances_\w+\.json",
    re.IGNORECASE,
)
# By their lines. A name of an image and more, in whatever order; `path,label` is one.
_ROW_OF_AN_IMAGE = re.compile(
    rb"[^,;\t\r\n]\.(png|jpe?g|webp)[\"']?[ ]*[,;\t]|[,;\t][^,;\t\r\n]+\.(png|jpe?g|webp)\b", re.I
)
_ROW_OF_AN_ID = re.compile(rb"[\"']?([^,;\t\"']+)[\"']?[ ]*[,;\t]")
_TABLES = (".csv", ".tsv", ".jsonl")
_TEXT = re.compile(rf"(.*[_-])?({SPLIT}|(file_?)?list|images)\.txt", re.IGNORECASE)
# An image and one word, as of Caffe; captions and boxes have more.
_ROW_OF_TEXT = re.compile(rb"\S+\.(png|jpe?g|webp)[ \t]+\S+\s*|\s*", re.IGNORECASE)
_BEGINNING = 1 << 16  # bytes of a table that are looked at
_LABEL_EXTENSION = re.compile(r"cls\..+|(label|class)(s|es|_?id|_?name)?(\.(txt|json))?|index")

_LAST_OF_NAME = 99  # byte of a header (POSIX.1-2001, ustar); folders may stand elsewhere
_LONGEST_JSON = 1 << 16  # bytes that are looked at
_MOST_JSON = 16  # members, likewise
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


def holds_labels(name: str, read: Callable[[int], bytes], images: Collection[str] = ()) -> bool:
    """Whether a file that lies among images seems to hold their labels, by its `name` or its lines.

    A table or list is read: `read` gives its beginning, of at most so many bytes. Its first column may hold the names
    of `images` without folder and extension, where each has a name of its own. Raises what `read` raises.
    """
    suffix = posixpath.splitext(name)[1].lower()
    if _LABEL_FILE.fullmatch(name) or suffix == ".parquet":
        return True
    if suffix not in _TABLES and not _TEXT.fullmatch(name):
        return False
    beginning = read(_BEGINNING)
    is_cut = len(beginning) == _BEGINNING
    lines = beginning.splitlines()[: -1 if is_cut else None]
    if suffix == ".txt":
        return bool(beginning.strip()) and all(map(_ROW_OF_TEXT.fullmatch, lines))
    if _ROW_OF_AN_IMAGE.search(beginning):
        return True
    ids = {os.fsdecode(row[1]).strip() for row in map(_ROW_OF_AN_ID.match, lines) if row}
    found = len(ids.intersection(posixpath.splitext(posixpath.basename(image))[0] for image in images))
    # The numbers in a table of classes may be the names of a few images.
    return found > 0 and 2 * found >= len(ids) and (is_cut or 2 * found >= len(images))


def unread_labels(file: IO[bytes], members: dict[str, dict[str, tarfile.TarInfo]], keys: Collection[str]) -> str:
    """What looks like labels in a tar, and the remedy: `members` by key and extension; samples `keys` have no cls.

    Empty if nothing does. Raises an OSError if `file` cannot be read.
    """
    no_labels, unlabelled = (
        f"{len(keys)} images without classes: has no cls members, but",
        "--label-key none for no labels",
    )

    def read(member: tarfile.TarInfo, most: int) -> bytes:
        return os.pread(file.fileno(), min(member.size, most), member.offset_data)

    for key, parts in members.items():
        for extension, member in parts.items():
            name = f"{key}.{extension}"
            what = f"{no_labels} {name}, which seems to hold labels and is not read"
            if key not in keys or extension == "npy":  # labels.npy, which would be an image
                if holds_labels(posixpath.basename(name), partial(read, member), keys):
                    remedy = "extract it and pass it to tools/make_shards.py as --labels FILE"
                    return f"{what}; {remedy}; or pass {unlabelled}"
            elif _LABEL_EXTENSION.fullmatch(extension):
                return f"{what}; write each label as a member KEY.cls, or pass {unlabelled}"
    with_json = [key for key in keys if "json" in members[key]]
    for key in islice(with_json, _MOST_JSON):
        values = _json_object(read(members[key]["json"], _LONGEST_JSON))
        if field := next((field for field in _LABEL_FIELDS if field in values), ""):
            what = f"{len(with_json)} members .json; {key}.json has the fields {fields_of(values)}"
            return f"{no_labels} {what}; pass --label-key json:{field} or another of these, or {unlabelled}"
    folders = sorted({posixpath.normpath(posixpath.dirname(key)).strip("/") for key in keys} - {"", "."})
    depths = Counter(folder.count("/") for folder in folders)
    if depths and max(depths.values()) > 1:  # such as train/cat and val/cat, maybe besides test
        some = ", ".join(folders[:_FEW]) + (", ..." if len(folders) > _FEW else "")
        remedy = "pass --labels folders to tools/make_shards.py, which then takes them for classes"
        return f"{no_labels} images lie in {len(folders)} folders ({some}); {remedy}; or pass {unlabelled}"
    return ""


def _json_object(text: bytes) -> dict[str, object]:
    """The JSON object that `text` is; empty if it is none."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
