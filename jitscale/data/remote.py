"""Remote storage: files of s3://, gs:// and https:// through fsspec, with retries and one clear line when it fails."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
import fsspec.asyn
import fsspec.config
import fsspec.core

from jitscale.addresses import MASK, masked
from jitscale.errors import DataError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEMES = ("s3://", "gs://", "https://", "http://")
_SMALL = 1 << 27  # bytes of a file that is read into memory
_BLOCK = 16 << 20  # bytes of one request to an object store; a thread that downloads holds one block in memory
_STREAM_BUFFER = 1 << 20  # bytes; what aiohttp keeps ahead of the reader of one response

_ATTEMPTS = 5
_FIRST_WAIT = 0.25  # seconds; each wait is _GROWTH times the one before: 0.25, 1, 4 and 16
_GROWTH = 4.0
_CONNECT_TIMEOUT = 30.0  # seconds
_SILENCE_TIMEOUT = 60.0  # seconds without a byte; there is no limit on the whole, since shards are large
_TRANSIENT_STATUS = {408, 425, 429}  # HTTP: timeout, too early, too many requests; waiting mends no other 4xx

_file_systems: dict[tuple[int, str], Any] = {}  # one per thread and protocol
# In a forked process, its parent's file systems, which work in the parent's loop only. They stay referenced: closing
# them would take the parent's connections from the epoll instance that both processes share.
_inherited: list[Any] = []


class WrongContentError(Exception):
    """What was downloaded is not what the manifest says; worth another attempt."""


def is_remote(pattern: str) -> bool:
    """Whether `pattern` names something in remote storage rather than in the file system."""
    return pattern.startswith(_SCHEMES)


def read_remote(url: str, most: int = _SMALL) -> bytes:
    """The content of a small remote file.

    Raises a DataError if it is missing, access to it is refused, it has more than `most` bytes, or its storage cannot
    be reached.
    """

    def attempt() -> bytes:
        content = bytearray()
        for chunk in read_in_chunks(url):
            content += chunk
            if len(content) > most:
                raise DataError(f"{url}: has more than {most} bytes, too many for such a file; correct the address")
        return bytes(content)

    return retried(url, attempt)


def read_in_chunks(url: str, size: int | None = None) -> Iterator[bytes]:
    """The content of `url` in pieces.

    HTTP gives one response, since not every server knows ranges; an object store is read block by block, since its
    readers in fsspec cannot stream.
    """
    if url.startswith(("http://", "https://")):
        # A size, any one, saves a request that would ask for it.
        options: dict[str, Any] = {"block_size": 0, "size": size or 1}
    else:
        options = {"block_size": _BLOCK, "cache_type": "none"}
    with _file_system(url).open(url, "rb", **options) as file:
        while chunk := file.read(_BLOCK):
            yield chunk


def retried(url: str, attempt: Callable[[], T]) -> T:
    """`attempt()`, again after growing waits if it fails for a reason that may pass.

    Raises a DataError if the reason cannot pass, or the attempts are used up.
    """
    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except DataError:
            raise
        except Exception as error:  # every storage library has its own; what cannot pass is told apart below
            message = _refusal(url, error) or (_exhausted(url, error) if number == _ATTEMPTS else None)
            if message is not None:
                # An error of the storage's library may show the address with its secrets.
                raise DataError(message) from (None if MASK in masked(url) else error)
            wait = _FIRST_WAIT * _GROWTH ** (number - 1)
            failed = f"attempt {number} of {_ATTEMPTS} failed ({_text(error)})"
            logger.warning("%s: %s; the next one in %.2f s", masked(url), failed, wait)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _file_system(url: str) -> Any:
    scheme = url.partition("://")[0]
    key = (threading.get_ident(), scheme)
    if key not in _file_systems:
        options = _http_options() if scheme in {"http", "https"} else {}
        _file_systems[key] = fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]
    return _file_systems[key]


def _http_options() -> dict[str, Any]:
    """Timeouts that suit large files, and the environment's proxies; the user's fsspec configuration goes before."""
    import aiohttp  # noqa: PLC0415  # slow to import, and local shards do not need it

    client: dict[str, Any] = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=_SILENCE_TIMEOUT),
        "read_bufsize": _STREAM_BUFFER,
        "trust_env": True,
    }
    for scheme in ("http", "https"):
        client |= fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
    return {"client_kwargs": client}


def _refusal(url: str, error: Exception) -> str | None:
    """The message about an error that waiting does not mend; None for other errors."""
    status = getattr(error, "status", None)  # aiohttp.ClientResponseError has one
    if isinstance(error, ImportError):
        extra = {"s3": "s3", "gs": "gcs", "hf": "hub"}.get(url.partition("://")[0])
        package = f"jitscale[{extra}]" if extra else "fsspec[http]"
        return f"{url}: the package that reads it is not installed ({_text(error)}); pip install '{package}'"
    if isinstance(error, FileNotFoundError):
        return f"{url}: there is no such file; correct the address or upload it"
    # By name: botocore is not installed everywhere.
    no_credentials = type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError"}
    if isinstance(error, PermissionError) or no_credentials or status in {401, 403}:
        hint = ", or set FSSPEC_S3_ANON=true if it is public" if url.startswith("s3://") else ""
        hint = ", for example in ~/.netrc" if url.startswith("http") else hint
        return f"{url}: access is refused ({_text(error)}); give this job credentials that may read it{hint}"
    if isinstance(status, int) and 400 <= status < 500 and status not in _TRANSIENT_STATUS:
        return f"{url}: the server refuses it ({_text(error)}); correct the address"
    return None


def _exhausted(url: str, error: Exception) -> str:
    if isinstance(error, WrongContentError):
        return f"{url}: content differs from the manifest ({error}); upload the shard and its manifest again"
    return f"{url}: cannot be read in {_ATTEMPTS} attempts ({_text(error)}); start again when its storage works"


def _text(error: Exception) -> str:
    """Kind and message in one line."""
    return masked(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))


def _after_fork() -> None:
    """In a forked process the event loop of its parent is not its own."""
    _inherited.extend(_file_systems.values())
    _file_systems.clear()
    fsspec.asyn.reset_lock()  # the loop's thread was not forked; recent releases of fsspec do this themselves


os.register_at_fork(after_in_child=_after_fork)
