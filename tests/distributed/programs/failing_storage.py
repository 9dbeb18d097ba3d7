"""`python -m jitscale.train ARGUMENTS`, where the storage of rank 1 fails after some steps."""

import errno
import os

from jitscale import train
from jitscale.data.tar_index import OffsetReader
from jitscale.errors import exit_with_message

SOUND_READS = 30
reads = 0
read = OffsetReader.read


def failing(file: OffsetReader, offset: int, size: int) -> bytes:
    """The signature of `OffsetReader.read`; it fails."""
    global reads  # noqa: PLW0603
    reads += 1
    if os.environ["RANK"] == "1" and reads > SOUND_READS:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return read(file, offset, size)


if __name__ == "__main__":
    OffsetReader.read = failing  # type: ignore[method-assign]
    exit_with_message(train.main)
