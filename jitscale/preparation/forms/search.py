"""Shared by all forms: the images that are found, and the search for them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

from jitscale.data.tar_index import LARGEST_LABEL
from jitscale.errors import DataError
from jitscale.preparation.labels import parse_label
from jitscale.preparation.sources import NO_GROUP, Storage

PICTURES = ("jpg", "jpeg", "png", "webp")  # extensions of images in folders, zips and tars of tars
UNREAD_PICTURES = ("bmp", "tif", "tiff", "gif", "ppm", "pgm", "avif", "heic", "jfif", "jp2")  # not read
FORMS_REMEDY = (
    "give a folder of images, tars or a pattern of them, a .zip, Parquet files, or a .csv or .jsonl with paths"
)

Label = int | str | None  # a class number, a class name, or none


@dataclass(frozen=True)
class FindOptions:
    """Facts about an input that the user gives, because the input does not say them."""

    class_names: list[str] | None = None  # in the order of their numbers
    split: str | None = None  # the part of a data set, such as train
    labels: str | None = None  # `folders`, `none`, or the file that holds them
    label_key: str | None = None  # label key of webdataset samples: cls, or json:FIELD
    label_column: str | None = None  # the column of labels in tables
    ground_truth: str | None = None  # file of the labels of ImageNet's validation images
    image_column: str | None = None  # column of Parquet and Arrow files


class Found(NamedTuple):
    """One image that was found."""

    path: str  # path of the image, or of the file that holds it
    extension: str  # see `Source`
    label: Label
    place: str  # place of the label, for a message
    offset: int = 0
    size: int = 0
    storage: Storage = Storage.FILE
    group: int = NO_GROUP  # from `Search.new_group`


@dataclass
class Search:
    """One search for the images of some inputs."""

    options: FindOptions
    ignored: Counter[str] = field(default_factory=Counter)  # files that are no images, by extension
    skipped: list[str] = field(default_factory=list)  # folders that are skipped, with the reason
    notes: list[str] = field(default_factory=list)  # remarks for the user, one per line
    names: list[str] | None = None  # class names that an input says; unused if the user gives some
    _named_by: str = ""
    _groups: int = 0
    labels_read: bool = False  # whether the user's file of labels was used; it is for one folder or archive
    _used: set[str] = field(default_factory=set)  # options that an input needed

    @property
    def known(self) -> set[str]:
        """The class names that the user gave."""
        return set(self.options.class_names or ())

    def note(self, line: str) -> None:
        """Tell the user `line`, once."""
        if line not in self.notes:
            self.notes.append(line)

    def option(self, name: str) -> str | None:
        """The option `name` of the user. Marks it as needed by an input."""
        self._used.add(name)
        value: str | None = getattr(self.options, name)
        return value

    def without_labels(self) -> bool:
        """True if the user wants no labels for an input that has some, or should have."""
        return self.options.labels == "none" and self.option("labels") is not None

    def refuse_unused(self, place: str) -> None:
        """Raise a DataError if the user has given an option that no input needed. `place` names all inputs."""
        for name in ("split", "labels", "label_key", "label_column", "ground_truth", "image_column"):
            value = getattr(self.options, name)
            if value is not None and name not in self._used:
                flag = f"--{name.replace('_', '-')} {value}"
                raise DataError(f"{place}: {flag} does not apply to this form of data; leave it out")

    def new_group(self) -> int:
        """A number for images that are read together, see `SourceTable.order`."""
        self._groups += 1
        return self._groups - 1

    def name_classes(self, names: list[str], place: str) -> None:
        """Note the class names of the input `place`, in the order of their numbers.

        Raises a DataError if another input has other names.
        """
        if self.names is not None and self.names != names:
            remedy = "a label must mean one thing; pack them separately, or name the classes with --class-names"
            raise DataError(f"{place}: names other classes than {self._named_by}; {remedy}")
        self.names, self._named_by = names, self._named_by or place

    def meanings(self, names: list[str], place: str) -> Sequence[int | str]:
        """The label that each class number of the input `place` means; `names` are its classes in their order.

        If the user gives class names, they decide the numbers: the label is then the name. If none of `names` is among
        them, the user's names are new names of the same classes.
        """
        known = self.options.class_names
        if known is None:
            self.name_classes(names, place)
        elif not self.known.isdisjoint(names):
            return names
        else:
            renamed = f"class 0 is {names[0]!r} there, and is called {''.join(known[:1])!r} now"
            self.note(f"warning: {place}: --class-names holds none of its names, and renames its classes: {renamed}")
        return range(len(names))

    def label(self, text: str | None, place: str) -> Label:
        """The label in `text`. Raises a DataError if it is empty, or a number that no class can have."""
        label = parse_label(text)
        if label is None and text is not None and text not in self.known:
            number = f"a class number, an integer in 0..{LARGEST_LABEL}"
            raise DataError(f"{place}: label {text!r} is neither {number}, nor a name; correct it")
        return text if label is None else label


Images = Iterator[Found]


def extension_of(name: str) -> str:
    """`a.b.JPEG` -> `jpeg`."""
    return PurePosixPath(name).suffix[1:].lower()
