"""Addresses of remote storage: their secrets, which no file, log or message shows, and their queries."""

import re

MASK = "***"

_ADDRESS = re.compile(
    r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)"
    # With a password, up to the last @: it may hold any character. At most five digits after a colon may be a port.
    r"(?P<user>[^\s/?#'\":@]*:(?!\d{1,5}(?:[/?#'\"\s]|$))(?:(?!://)[^\s\"])*@|[^\s/?#'\"]*@)?(?P<path>(?:(?!,\w{1,20}://)[^\s?#'\"])*)"
    r"(?P<query>[?#][^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$)))?"
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\w+\}")
_VALUE = re.compile(r"(?<==)[^&]+|(?<=[?&])[\w%~+.-]{16,}(?<!\.tar)(?=&|$)")  # or a long token without a name


def masked(text: str) -> str:
    """`text` with user, password, values of queries and fragments masked in each address: https://***@host/a?token=***."""

    def without_secrets(found: re.Match[str]) -> str:
        user = f"{MASK}@" if found["user"] else ""
        return found["scheme"] + user + found["path"] + _VALUE.sub(MASK, found["query"] or "")

    return _ADDRESS.sub(without_secrets, text) if "://" in text else text


def has_secret(setting: str) -> bool:
    """Whether a setting holds a secret itself, so not only `${oc.env:NAME}` in its place.

    A user before a password of the environment is no secret, and neither are values next to one of it in a query.
    """
    text = _ENVIRONMENT.sub("\0", setting)
    text = re.sub(r"(?<=://)(?:[^\s/?#:@]*:\0+|\0+:?)@|[?#][^\s?#,]*\0[^\s?#,]*", "", text)
    return masked(text) != text


def split_query(address: str) -> tuple[str, str]:
    """The address before its query, and the query with its question mark; a ? elsewhere is a wildcard, and stays."""
    path, mark, query = address.partition("?")
    return (path, mark + query) if address.startswith(("http://", "https://")) and "=" in query else (address, "")


def signs_one_object(query: str) -> bool:
    """Whether the signature in a query holds for a single object of S3, Google Cloud Storage or Azure."""
    values = dict(part.lower().partition("=")[::2] for part in query.removeprefix("?").split("&"))
    signed = {"x-amz-signature", "x-goog-signature"} & values.keys()
    old = "signature" in values and ({"awsaccesskeyid", "googleaccessid"} & values.keys())
    return bool(signed or old) or ("sig" in values and values.get("sr") == "b")
