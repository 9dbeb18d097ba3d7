"""Files of a few classes, as ImageNet's devkit and Kaggle store them."""

from pathlib import Path

from tests.support.pictures import file_bytes, noise

# By the devkit's ID, from 1. The order is not sorted, as in the devkit.
WNIDS = ["n02119789", "n01440764", "n03461385", "n02100735"]
SORTED = sorted(WNIDS)
IDS = [3, 1, 4, 2, 2, 3]  # the IDs of the validation images, in the order of their names
LABELS = [SORTED.index(WNIDS[number - 1]) for number in IDS]  # numbered by sorted WNID
SIZE = 16  # in pixels a side
PICTURES = [noise(number, SIZE, SIZE) for number in range(len(IDS))]


def image_name(number: int) -> str:
    """The file name of validation image `number`; numbers start at 0."""
    return f"ILSVRC2012_val_{number + 1:08d}"


def validation_images() -> list[tuple[str, bytes]]:
    """Name and content of each validation image. The content is lossless here."""
    return [(f"{image_name(number)}.JPEG", file_bytes(pixels)) for number, pixels in enumerate(PICTURES)]


def write_validation(folder: Path) -> Path:
    """A flat folder of the validation images."""
    folder.mkdir(parents=True)
    for name, content in validation_images():
        (folder / name).write_bytes(content)
    return folder


def write_devkit(folder: Path, table: bool = True) -> Path:
    """Write the text of IDs and, on request, their table; returns the text's path."""
    (folder / "data").mkdir(parents=True)
    if table:
        rows = [f"{wnid} {number} some_name" for number, wnid in enumerate(WNIDS, start=1)]
        (folder / "data" / "map_clsloc.txt").write_text("\n".join(rows) + "\n")
    text = folder / "data" / "ILSVRC2012_validation_ground_truth.txt"
    text.write_text("".join(f"{number}\n" for number in IDS))
    return text


def write_solution(folder: Path) -> Path:
    """Write Kaggle's table, with its random order and boxes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{image_name(at)},{WNIDS[number - 1]} 85 1 499 272 {WNIDS[0]} 1 2 3 4 " for at, number in enumerate(IDS)]
    path = folder / "LOC_val_solution.csv"
    path.write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    return path
