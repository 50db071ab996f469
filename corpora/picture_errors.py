"""Why a picture cannot be shown."""

from typing import Literal

from gill_errors import GillError

PictureErrorKind = Literal[
    "missing",  # no such file or tar member
    "url",  # an address: nothing is ever downloaded
    "empty",  # no bytes, or no pixels
    "truncated",  # the data end too early
    "unreadable",  # not a picture, damaged, or not permitted to read
    "unsupported",  # a picture without a defined 8-bit rendering (float, signed 16-bit)
    "too large",  # more pixels or bytes than allowed
]


class PictureError(GillError):
    """A picture that cannot be shown: a short `kind` to count by, a `detail` to read, and the
    `reference` under which it was asked for."""

    def __init__(self, kind: PictureErrorKind, detail: str, reference: str = "") -> None:
        self.kind = kind
        self.detail = detail
        self.reference = reference
        super().__init__(f"{reference}: {kind}: {detail}" if reference else f"{kind}: {detail}")
