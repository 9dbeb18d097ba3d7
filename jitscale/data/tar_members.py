"""The members of one tar: their content, their names, and files that seem to hold labels."""

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

LOST_LINK = " as a link without a target"  # after the extension: a kind of member that is skipped
SPARSE = "is sparse: its stored bytes are not its content; write the tar again without --sparse (-S)"

SPLIT = r"(train|training|val|valid|validation|test|testing|dev|eval)"  # names of the splits of a data set
# File names of labels, also in folders: those of EDM, Hugging Face, COCO, CelebA, Tiny ImageNet and Kaggle.
_LABEL_FILE = re.compile(
    rf"(.*[_-]|image|{SPLIT})?((dataset|metadata|labels?|annotations?(\.coco)?|solution|attr(_\w+)?)"
    r"\.(json|jsonl|csv|tsv|parquet)|(labels?|annotations?)\.(npy|npz|pkl|pickle|mat|h5|xlsx?)"
    r"|(labels?|annotations?|ground_?truth|attr(_\w+)?)\.txt)"
    rf"|(.*[_-])?{SPLIT}\.(csv|tsv|parquet)|instances_\w+\.json",
    re.IGNORECASE,
)
# Lines of label files: the name of an image and other columns, in any order, such as `path,label`.
_ROW_OF_AN_IMAGE = re.compile(
    rb"[^,;\t\r\n]\.(png|jpe?g|webp)[\"']?[ ]*[,;\t]|[,;\t][^,;\t\r\n]+\.(png|jpe?g|webp)\b", re.I
)
_ROW_OF_AN_ID = re.compile(rb"[\"']?([^,;\t\"']+)[\"']?[ ]*[,;\t]")
_TABLES = (".csv", ".tsv", ".jsonl")
_TEXT = re.compile(rf"(.*[_-])?({SPLIT}|(file_?)?list|images)\.txt", re.IGNORECASE)
# The form of Caffe: an image and one word. Captions and boxes have more words.
_ROW_OF_TEXT = re.compile(rb"\S+\.(png|jpe?g|webp)[ \t]+\S+\s*|\s*", re.IGNORECASE)
_BEGINNING = 1 << 16  # bytes of a table that are read
_LABEL_EXTENSION = re.compile(r"cls\..+|(label|class)(s|es|_?id|_?name)?(\.(txt|json))?|index")

_LAST_OF_NAME = 99  # last byte of the name in a header (POSIX.1-2001, ustar); folders may be in another field
_LONGEST_JSON = 1 << 16  # bytes that are read
_MOST_JSON = 16  # members that are read
_LABEL_FIELDS = ("label", "labels", "cls", "class", "class_id", "class_name", "target")
_FEW = 3  # folders in a message
_MOST_KINDS = 5  # kinds of files in a message


def contents(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Each member except folders, with the regular member that has its content.

    For a hard or symbolic link, the second is an earlier member of the tar. It is None if that member does not exist,
    or if the member is a device, a pipe or the like. Raises as tarfile does.
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
    """True if a member or one of its folders is hidden. An example is `.git/annex`, the store of git-annex."""
    return "." in name and any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))


def is_image(name: str) -> bool:
    """True if a member of this name is the image of a sample."""
    return split_name(name)[1] in EXTENSIONS


def is_image_header(block: bytes) -> bool:
    """True if the header `block` of a member surely belongs to an image. A long name is truncated, so it is not sure.

    A damaged header counts as an image's: a pass in tar order will report the damage.
    """
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return True
    return block[_LAST_OF_NAME] == 0 and is_image(member.name)


def described_kinds(kinds: Counter[str]) -> str:
    """The most frequent kinds of skipped files, by extension, with their numbers."""
    return ", ".join(f".{kind or '(none or hidden)'} {count}" for kind, count in kinds.most_common(_MOST_KINDS))


def holds_labels(name: str, read: Callable[[int], bytes], images: Collection[str] = ()) -> bool:
    """True if a file among images seems to hold their labels, judged by its `name` or its lines.

    A table or list is read: `read(n)` returns at most its first n bytes. Its first column may hold the names of
    `images` without folder and extension, if these names differ. Raises what `read` raises.
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
    # A few matches are not enough: the numbers in a table of classes may equal the names of some images.
    return found > 0 and 2 * found >= len(ids) and (is_cut or 2 * found >= len(images))


def unread_labels(file: IO[bytes], members: dict[str, dict[str, tarfile.TarInfo]], keys: Collection[str]) -> str:
    """Members of a tar that seem to be labels, and the remedy; empty if there are none.

    `members` are by key and extension; the samples `keys` have no cls. Raises an OSError if `file` cannot be read.
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
            if key not in keys or extension == "npy":  # labels.npy would count as an image
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
    if depths and max(depths.values()) > 1:  # such as train/cat and val/cat, perhaps with a folder test
        some = ", ".join(folders[:_FEW]) + (", ..." if len(folders) > _FEW else "")
        remedy = "pass --labels folders to tools/make_shards.py to use them as classes"
        return f"{no_labels} images lie in {len(folders)} folders ({some}); {remedy}; or pass {unlabelled}"
    return ""


def _json_object(text: bytes) -> dict[str, object]:
    """The JSON object in `text`; empty if `text` is not a JSON object."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
