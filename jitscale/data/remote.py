"""Remote storage: reads files of s3://, gs:// and https:// through fsspec, with retries and one-line errors."""

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
_SMALL = 1 << 27  # bytes, largest file that is read into memory
_BLOCK = 16 << 20  # bytes of one request to an object store; a thread that downloads holds one block in memory
_STREAM_BUFFER = 1 << 20  # bytes of one response that aiohttp reads ahead

_ATTEMPTS = 5
_FIRST_WAIT = 0.25  # seconds; each wait is _GROWTH times the one before: 0.25, 1, 4 and 16
_GROWTH = 4.0
_CONNECT_TIMEOUT = 30.0  # seconds
_SILENCE_TIMEOUT = 60.0  # seconds without a byte; the total time has no limit, because shards are large
_TRANSIENT_STATUS = {408, 425, 429}  # HTTP: timeout, too early, too many requests; waiting does not help with other 4xx

_file_systems: dict[tuple[int, str], Any] = {}  # one per thread and protocol
# In a forked process: the file systems of the parent, which work only in the parent's event loop. They stay referenced,
# because closing them would remove the parent's connections from the epoll instance that both processes share.
_inherited: list[Any] = []


class WrongContentError(Exception):
    """The download differs from the manifest. Another attempt may succeed."""


def is_remote(pattern: str) -> bool:
    """True if `pattern` is an address in remote storage, not a path."""
    return pattern.startswith(_SCHEMES)


def read_remote(url: str, most: int = _SMALL) -> bytes:
    """The content of a small remote file.

    Raises a DataError if the file is missing, access is refused, it has more than `most` bytes, or the storage cannot
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

    Over HTTP it is one response, because some servers have no range requests. An object store is read block by block,
    because fsspec cannot stream from it.
    """
    if url.startswith(("http://", "https://")):
        # Any given size saves the request that would ask for it.
        options: dict[str, Any] = {"block_size": 0, "size": size or 1}
    else:
        options = {"block_size": _BLOCK, "cache_type": "none"}
    with _file_system(url).open(url, "rb", **options) as file:
        while chunk := file.read(_BLOCK):
            yield chunk


def retried(url: str, attempt: Callable[[], T]) -> T:
    """`attempt()`, repeated after growing waits if the failure may be temporary.

    Raises a DataError if the failure is permanent, or if the last attempt fails.
    """
    for number in range(1, _ATTEMPTS + 1):
        try:
            return attempt()
        except DataError:
            raise
        except Exception as error:  # storage libraries have their own errors; `_refusal` finds the permanent ones
            message = _refusal(url, error) or (_exhausted(url, error) if number == _ATTEMPTS else None)
            if message is not None:
                # An error of a storage library may contain the address with its secrets, so it is not chained.
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
    """Timeouts for large files, and the environment's proxies. The user's fsspec configuration replaces them."""
    import aiohttp  # noqa: PLC0415  # its import is slow, and local shards do not need it

    client: dict[str, Any] = {
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=_SILENCE_TIMEOUT),
        "read_bufsize": _STREAM_BUFFER,
        "trust_env": True,
    }
    for scheme in ("http", "https"):
        client |= fsspec.config.conf.get(scheme, {}).get("client_kwargs", {})
    return {"client_kwargs": client}


def _refusal(url: str, error: Exception) -> str | None:
    """The message for a permanent error; None for an error that may be temporary."""
    status = getattr(error, "status", None)  # aiohttp.ClientResponseError has one
    if isinstance(error, ImportError):
        extra = {"s3": "s3", "gs": "gcs", "hf": "hub"}.get(url.partition("://")[0])
        package = f"jitscale[{extra}]" if extra else "fsspec[http]"
        return f"{url}: a package for this storage is not installed ({_text(error)}); pip install '{package}'"
    if isinstance(error, FileNotFoundError):
        return f"{url}: there is no such file; correct the address or upload it"
    # Compared by name, because botocore may not be installed.
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
    """The type and the message of an error, in one line."""
    return masked(" ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":"))


def _after_fork() -> None:
    """Drop the parent's file systems in a forked process: it does not have the parent's event loop."""
    _inherited.extend(_file_systems.values())
    _file_systems.clear()
    fsspec.asyn.reset_lock()  # the thread of the loop was not forked; recent releases of fsspec reset it themselves


os.register_at_fork(after_in_child=_after_fork)
