"""Files that each hold many images as arrays. A folder may hold the files of several splits."""

from collections.abc import Callable

from jitscale.errors import DataError
from jitscale.preparation.forms.listing import Listing
from jitscale.preparation.forms.search import Images, Search


def images_in_split(
    search: Search,
    listing: Listing,
    names: list[str],
    split_of: Callable[[str], str],
    images_in_file: Callable[[Search, Listing, str], Images],
) -> Images:
    """The images of the files `names` of a folder. If there are several splits, the user must name one.

    `split_of` gives the split of a file by its name; empty if the name says none.
    """
    splits = sorted({split_of(name) for name in names})
    chosen = search.option("split") if len(splits) > 1 or splits != [""] else None
    if (chosen is None and len(splits) > 1) or (chosen is not None and chosen not in splits):
        there = " and ".join(split or "others" for split in splits)
        given = "" if chosen is None else f", not {chosen}"
        remedy = f"pass --split {next(filter(None, splits))}, or give single files"
        raise DataError(f"{listing.folder}: holds files of the splits {there}{given}; {remedy}")
    for name in names:
        if chosen in (None, split_of(name)):
            yield from images_in_file(search, listing, name)
