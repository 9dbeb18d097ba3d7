"""Addresses of remote storage: masking of their secrets (for files, logs and messages), and their queries."""

import re

MASK = "***"

_ADDRESS = re.compile(
    r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)"
    # A password may hold any character, so it ends at the last @. Up to five digits after a colon may be a port.
    r"(?P<user>[^\s/?#'\":@]*:(?!\d{1,5}(?:[/?#'\"\s]|$))(?:(?!://)[^\s\"])*@|[^\s/?#'\"]*@)?(?P<path>(?:(?!,\w{1,20}://)[^\s?#'\"])*)"
    r"(?P<query>[?#][^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$)))?"
)
_ENVIRONMENT = re.compile(r"\$\{oc\.env:\w+\}")
_VALUE = re.compile(r"(?<==)[^&]+|(?<=[?&])[\w%~+.-]{16,}(?<!\.tar)(?=&|$)")  # a named value, or a long token


def masked(text: str) -> str:
    """`text` with user, password, values of queries and fragments masked in each address: https://***@host/a?token=***."""

    def without_secrets(found: re.Match[str]) -> str:
        user = f"{MASK}@" if found["user"] else ""
        return found["scheme"] + user + found["path"] + _VALUE.sub(MASK, found["query"] or "")

    return _ADDRESS.sub(without_secrets, text) if "://" in text else text


def has_secret(setting: str) -> bool:
    """True if a setting holds a secret itself, and not only `${oc.env:NAME}` in its place.

    If the password comes from the environment, the user name is not a secret. If a value of a query comes from the
    environment, the other values of the query are not secrets.
    """
    text = _ENVIRONMENT.sub("\0", setting)
    text = re.sub(r"(?<=://)(?:[^\s/?#:@]*:\0+|\0+:?)@|[?#][^\s?#,]*\0[^\s?#,]*", "", text)
    return masked(text) != text


def split_query(address: str) -> tuple[str, str]:
    """The address without its query, and the query with its question mark. Any other ? is a wildcard and stays."""
    path, mark, query = address.partition("?")
    return (path, mark + query) if address.startswith(("http://", "https://")) and "=" in query else (address, "")


def signs_one_object(query: str) -> bool:
    """True if the signature in a query holds for a single object of S3, Google Cloud Storage or Azure."""
    values = dict(part.lower().partition("=")[::2] for part in query.removeprefix("?").split("&"))
    signed = {"x-amz-signature", "x-goog-signature"} & values.keys()
    old = "signature" in values and ({"awsaccesskeyid", "googleaccessid"} & values.keys())
    return bool(signed or old) or ("sig" in values and values.get("sr") == "b")
