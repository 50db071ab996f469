"""Data URIs as people make them."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def is_data_uri(url: str) -> bool:
    """Whether the address holds its content in itself."""
    return url[:5].lower() == "data:"


def decode_data_uri(url: str) -> bytes:
    """The content of a data URI in base64 (RFC 2397).

    With or without parameters, padding and line breaks; percent-escaped; in either of base64's
    alphabets. Raises ValueError, saying what is wrong.
    """
    head, comma, body = url.partition(",")
    if not comma or not head.rstrip().lower().endswith(";base64"):
        raise ValueError("a data URI must read data:image/...;base64,...")
    plain = b"".join(unquote_to_bytes(body).split()).translate(_URL_SAFE).rstrip(b"=")
    try:
        return base64.b64decode(plain + b"=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"the data URI is not base64: {error}") from None
