"""A reference as a file: mean and covariance of the features of real images, which others have computed.

It is an .npz with `mu` (F,) and `sigma` (F, F), like the files of the authors and of ADM. `mu_s` and `sigma_s`, as in
ADM's files, are for spatial features; further networks have arrays with other suffixes. The files of
tools/make_reference.py also say from how many images they were made, with which networks and at which size. The content
determines the kind of a file, not its name.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from jitscale.config import RGB
from jitscale.data.remote import is_remote
from jitscale.errors import DataError, data_error
from jitscale.evaluation.blocks import DAMAGED
from jitscale.evaluation.networks import FEATURE_NETWORKS, NetworkFile, identity_of, sizes_of
from jitscale.files import atomic_write, sha256_of

ZIP, ARRAY, PICKLES = b"PK", b"\x93NUMPY", (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # first bytes
SUFFIXES = (".npz", ".npy", ".pkl", ".pickle")  # they decide if the content does not, or the file is missing
REMEDY = "make them with tools/make_reference.py, or name shards"
ASYMMETRY = 1e-5  # relative to the largest entry of a covariance; float32 round-off is smaller
NEGATIVE = 1e-4  # largest negative eigenvalue, relative to the largest variance; float32 round-off is smaller
# Reading a file that is damaged or claims impossible sizes raises one of these.
UNREADABLE = (*DAMAGED, MemoryError, RuntimeError)


class FeatureStatistics(NamedTuple):
    """The Gaussian of a set of images: `mean` (F,) and unbiased `covariance` (F, F), float64."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]


class StoredStatistics(NamedTuple):
    """The content of a file of statistics."""

    statistics: dict[str, FeatureStatistics]  # key: an array of `NetworkFile.sizes` that the file has
    floors: dict[str, float]  # see `Reference`
    facts: dict[str, Any]  # their origin, for the record


def is_statistics(source: str) -> bool:
    """True if a reference is a file of statistics (possibly unreadable), not shards."""
    path = Path(source)
    if not path.is_file():
        return path.suffix in SUFFIXES and not path.is_dir()
    start = _start_of(path)
    if start.startswith((ZIP, ARRAY, *PICKLES)):
        return True
    return path.suffix in SUFFIXES and start[257:262] != b"ustar"


def write_statistics(path: Path, stored: StoredStatistics) -> None:
    """Write an .npz for `read_statistics`, with all facts. Raises a DataError if it cannot be written."""
    arrays = {"facts": np.array(json.dumps({**stored.facts, "floors": stored.floors}))}
    for name, statistics in stored.statistics.items():
        arrays |= dict(zip(_keys(name), statistics, strict=True))
    with data_error(f"{path}: cannot be written", "choose another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]


def read_statistics(source: str, files: Sequence[NetworkFile], channels: int = RGB) -> StoredStatistics:
    """The statistics in the file `source` for the arrays of the networks `files`, the main one first.

    Raises a DataError if it is not such a file, belongs to other networks or lacks a network, if its images had another
    number of `channels`, or if its numbers cannot be a mean and a covariance.
    """
    place, sizes = f"evaluation.reference={source}", sizes_of(files)
    _refuse_other_kinds(source, place)
    wanted = {name: _keys(name) for name in sizes}
    with data_error(f"{place}: no statistics of {', '.join(sizes)}", REMEDY, UNREADABLE), np.load(source) as content:
        names = content.files
        arrays = {key: content[key] for keys in wanted.values() for key in keys if key in names}
        facts: dict[str, Any] = json.loads(str(content["facts"])) if "facts" in names else {"source": Path(source).name}
        floors = {str(name): float(value) for name, value in facts.pop("floors", {}).items()}
        if not all(map(math.isfinite, floors.values())):
            raise ValueError("its distances between halves are not finite")
    statistics = {}
    for name, keys in wanted.items():
        if name == "spatial" and not arrays.keys() & set(keys):  # the authors' files have no spatial features
            continue
        if missing := [key for key in keys if key not in arrays]:
            held = ", ".join(names[:5]) or "nothing"
            raise DataError(f"{place}: no statistics of {name} (no {missing[0]}; it holds {held}); {REMEDY}")
        statistics[name] = FeatureStatistics(arrays[keys[0]], arrays[keys[1]])
        if wrong := _wrong_shape(keys, statistics[name], sizes[name]):
            needed = f"the network {files[0].name} has {sizes[name]} {name}; choose the one they were made with"
            raise DataError(f"{place}: {wrong}, {needed}")
    for key, expected in identity_of(files).items():
        if facts.get(key, expected) != expected:
            known, needed = str(facts[key])[:40], f"evaluation.features={files[0].name} has {str(expected)[:40]}"
            raise DataError(f"{place}: made with {key}={known}, {needed}; make it again")
    # Other programs' files do not store the number of channels.
    stored_channels = facts.get("channels", RGB) if "manifest" in facts else channels
    if stored_channels != channels:
        what = f"made from images with {stored_channels} channels, but model.in_channels={channels}"
        raise DataError(f"{place}: {what}; make it again with that setting, or name shards")
    checked = {name: _checked(place, wanted[name], *found) for name, found in statistics.items()}
    return StoredStatistics(checked, floors, {**facts, "file_sha256": sha256_of(Path(source))})


def network_of_statistics(source: str) -> str:
    """The main feature network of the statistics in the file `source`: named in the file, or identified by their width.

    Raises a DataError if it is not such a file, or if no network or several networks have this width.
    """
    place = f"evaluation.reference={source}"
    _refuse_other_kinds(source, place)
    with data_error(f"{place}: no statistics of features", REMEDY, UNREADABLE), np.load(source) as content:
        said = json.loads(str(content["facts"])).get("features") if "facts" in content.files else None
        width = len(content["mu"])
    wide = [name for name, network in FEATURE_NETWORKS.items() if network.num_features == width]
    fitting = [said] if said in FEATURE_NETWORKS else wide
    if len(fitting) != 1:
        raise DataError(f"{place}: does not name the network of its {width} features; set evaluation.features")
    return fitting[0]


def _start_of(path: Path) -> bytes:
    """The first bytes of a file, which determine its kind; empty if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError:  # reading the whole file raises it again
        return b""


def _refuse_other_kinds(source: str, place: str) -> None:
    """Raise a DataError with its own remedy at an address, a .npy or a pickle."""
    if is_remote(source):
        raise DataError(f"{place}: statistics must be on this machine; copy the file here")
    start = _start_of(Path(source))
    if start.startswith(ARRAY):
        raise DataError(f"{place}: is a .npy, a single array; write mu and sigma together with numpy.savez")
    if start.startswith(PICKLES):
        convert = "r = pickle.load(open(FILE, 'rb'))['fid']; numpy.savez(NPZ, mu=r['mu'], sigma=r['sigma'])"
        what = "is a pickle (EDM2's format); it is not opened, because it could run any code"
        raise DataError(f"{place}: {what}; if you trust it, convert it in Python: {convert}")


def _wrong_shape(keys: Sequence[str], found: FeatureStatistics, size: int) -> str:
    """The error text if the arrays' shapes do not fit `size` features; otherwise empty."""
    mean, covariance = found
    if (mean.shape, covariance.shape) == ((size,), (size, size)):
        return ""
    return f"{' and '.join(keys)} have the shapes {mean.shape} and {covariance.shape}"


def _checked(place: str, keys: Sequence[str], *arrays: npt.NDArray[Any]) -> FeatureStatistics:
    """The arrays, of the right shapes, in float64. Raises a DataError if they cannot be a mean and a covariance."""

    def refuse(key: str, fault: str) -> NoReturn:
        raise DataError(f"{place}: {key} {fault}, which is impossible; copy the file again, or {REMEDY}")

    for key, values in zip(keys, arrays, strict=True):
        if values.dtype.kind not in "fiu":
            refuse(key, f"holds {values.dtype}, not real numbers")
        if broken := int(np.count_nonzero(~np.isfinite(values))):
            refuse(key, f"has {broken} of {values.size} values that are not finite")
    mean, covariance = (values.astype(np.float64) for values in arrays)
    asymmetry, largest = float(np.abs(covariance - covariance.T).max()), float(np.abs(covariance).max())
    if asymmetry > ASYMMETRY * largest:
        refuse(keys[1], f"is not symmetric (entries differ by up to {asymmetry:.3g}, the largest is {largest:.3g})")
    tolerance = NEGATIVE * float(covariance.diagonal().max(initial=0.0)) + np.finfo(np.float64).tiny
    try:  # a Cholesky decomposition takes a tenth of the time of an eigendecomposition
        np.linalg.cholesky(covariance + tolerance * np.eye(len(mean)))
    except np.linalg.LinAlgError:
        least = float(np.linalg.eigvalsh(covariance)[0])
        refuse(keys[1], f"has negative eigenvalues (the least is {least:.3g})")
    return FeatureStatistics(mean, covariance)


def _keys(name: str) -> tuple[str, str]:
    """The names of mean and covariance in a file; for features and spatial features they are ADM's."""
    suffix = {"features": "", "spatial": "_s"}.get(name, name.removeprefix("features"))
    return f"mu{suffix}", f"sigma{suffix}"
