"""The default folder of the cache of remote shards. Only its user must be able to write it."""

import os
import stat
import tempfile
from pathlib import Path

from jitscale.errors import DataError, data_error


def usual_cache_folder() -> Path:
    """This user's folder in $TMPDIR, created with mode 0700 if it does not exist.

    Raises a DataError if it cannot be created, is a link, belongs to another user, or can be written by others, who
    could then put other shards there.
    """
    folder = Path(tempfile.gettempdir(), f"jitscale-shards-{os.getuid()}")
    with data_error(f"{folder}: cannot be created as a cache of shards", "set data.cache_dir to another folder"):
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    wrong = ""
    if not stat.S_ISDIR(status.st_mode):
        wrong = "is a link"
    elif status.st_uid != os.getuid():
        wrong = f"belongs to the user {status.st_uid}"
    elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(status.st_mode)
        raise DataError(f"{folder}: can be written by others (mode {mode:04o}); remove it, or chmod 700 {folder}")
    if wrong:
        raise DataError(
            f"{folder}: {wrong}, so its shards cannot be trusted; set data.cache_dir to a folder of your own"
        )
    return folder
