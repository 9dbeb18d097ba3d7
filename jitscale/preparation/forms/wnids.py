"""Compares ImageNet's labels with the WNIDs in the names of its files: both say the class."""

import re
from dataclasses import dataclass, field

from jitscale.errors import DataError

_WNID = re.compile(r"(?:^|[/_])(n\d{8})(?:_\d+)?\.\w+$")  # n01440764_10026.JPEG, ILSVRC2012_val_00000001_n01751748.JPEG
_CLASSES = 1000  # number of ImageNet's classes, whose labels are in the order of the WNIDs
_REMEDY = "the file is wrong, or its classes have another order: name them with --class-names, which turns this off"


@dataclass
class WnidCheck:
    """Compares the label of each image with the WNID in its path."""

    _labels: dict[str, tuple[int, str]] = field(default_factory=dict)  # key: WNID; values: label, its first place
    _wnids: dict[int, str] = field(default_factory=dict)  # key: label

    def see(self, path: str, label: int, place: str) -> None:
        """Compare one image with earlier ones. Raises a DataError if a class has two WNIDs, or a WNID two classes."""
        if (found := _WNID.search(path)) is None:
            return
        wnid = found[1]
        first, where = self._labels.setdefault(wnid, (label, place))
        if first != label:
            raise DataError(f"{place}: has label {label}, but {wnid} has label {first} in {where}; {_REMEDY}")
        if (other := self._wnids.setdefault(label, wnid)) != wnid:
            where = self._labels[other][1]
            raise DataError(f"{place}: {wnid} has label {label}, as {other} in {where}; {_REMEDY}")

    def finish(self) -> None:
        """Raise a DataError if the labels of ImageNet's 1,000 classes are not in the order of their WNIDs."""
        if len(self._labels) != _CLASSES:
            return
        for number, wnid in enumerate(sorted(self._labels)):
            label, place = self._labels[wnid]
            if label != number:
                what = f"{wnid} has label {label}, and {number} in the order of ImageNet's WNIDs"
                raise DataError(f"{place}: {what}; {_REMEDY}")
