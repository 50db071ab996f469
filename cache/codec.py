"""How values are made small for storing, and what that costs.

float values [n, *shape] --encode--> stored [n, *stored_shape] --decode--> values again, with an
error that is measured row by row while writing: the relative squared error ||x - x'||^2 / ||x||^2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cache.casting import cast
from gill_errors import InputError
from gill_records import Record

# Rounding in different batch shapes moves a float16 result by a few units in the last place, each
# about 2e-7 in relative squared error; what truly depends on the row moves it by far more.
SHARED_FIRST_TOLERANCE = 1e-5

NOT_FINITE = "the encoder gave a value that is not finite"


class Codec(Record):
    """How one array is stored. Changing any of it makes another store."""

    dtype: Literal["float32", "float16", "int8"] = Field(
        default="float16",
        description="Stored number type. int8: per channel (last axis), with scale and offset "
        "fitted to the range of a sample of rows spread evenly over the table.",
    )
    compressor: Literal["none", "zstd", "blosc-zstd", "blosc-lz4"] = Field(
        default="none",
        description="Lossless compressor on top. Embeddings are nearly random bits: float16 "
        "shrinks by about 8% and is read several times slower; for slow or costly storage.",
    )
    level: int = Field(default=3, ge=0, le=9, description="Level of the compressor.")
    share_first: bool = Field(
        default=False,
        description="Store position 0 once for all rows. Right for a causal text encoder, whose "
        "BOS vector cannot depend on the caption. Checked on every row: one that deviates is "
        "refused.",
    )

    @property
    def is_lossy(self) -> bool:
        """Whether storing changes values: everything but float32 does."""
        return self.dtype != "float32"


class FirstPositionVariesError(InputError):
    """`share_first` was asked for an encoder whose first position depends on the row."""


@dataclass(frozen=True)
class FittedCodec:
    """A codec with the numbers it fitted to the data, stored beside the array.

    scale, offset: float32 [channels] for int8, value = stored * scale + offset.
    first: float32 [*shape[1:]], the shared first position.
    """

    dtype: str
    scale: NDArray[np.float32] | None = None
    offset: NDArray[np.float32] | None = None
    first: NDArray[np.float32] | None = None

    @property
    def decoded_dtype(self) -> np.dtype:
        """What a reader gets: float16 where that is what is stored, float32 otherwise."""
        return np.dtype("float16" if self.dtype == "float16" else "float32")

    def parts(self) -> dict[str, NDArray[np.float32]]:
        """The fitted arrays by name, for storing."""
        named = {"scale": self.scale, "offset": self.offset, "first": self.first}
        return {name: part for name, part in named.items() if part is not None}


def needs_fitting(codec: Codec) -> bool:
    """Whether a sample of rows is needed before anything can be stored."""
    return codec.dtype == "int8" or codec.share_first


def fit(codec: Codec, sample: np.ndarray) -> FittedCodec:
    """Fit a codec to a sample of rows: float [n, *shape].

    Raises FirstPositionVariesError where `share_first` does not hold on the sample, ValueError
    where the sample is empty or not finite.
    """
    if not needs_fitting(codec):
        return FittedCodec(codec.dtype)
    if len(sample) == 0:
        raise InputError("no row of the sample could be read: nothing to fit the codec to")
    values = sample.astype(np.float32)
    if not np.isfinite(values).all():
        raise InputError("the sample holds values that are not finite: the codec cannot be fitted")
    first = None
    if codec.share_first:
        first = values[0, 0].copy()
        worst = max(_row_error(value, first) for value in values[:, 0])
        if worst > SHARED_FIRST_TOLERANCE:
            raise FirstPositionVariesError(
                "share_first is on, but the first position is not the same for every row "
                f"(relative squared difference up to {worst:.2g}): this encoder is not "
                "causal; turn it off"
            )
        values = values[:, 1:]
    if codec.dtype != "int8":
        return FittedCodec(codec.dtype, first=first)
    # Per channel, over rows and positions: 254 steps from -127 to 127, around the middle of its
    # range. A channel that never varies has the smallest scale, not 0.
    axes = tuple(range(values.ndim - 1))
    low, high = values.min(axes), values.max(axes)
    scale = np.maximum((high - low) / 254, np.finfo(np.float32).tiny).astype(np.float32)
    return FittedCodec("int8", scale, ((low + high) / 2).astype(np.float32), first)


def encode(
    fitted: FittedCodec, values: np.ndarray
) -> tuple[np.ndarray, NDArray[np.float32], dict[int, str]]:
    """Values float [n, *shape] -> (stored [n, *stored_shape], error float32 [n], refused)."""
    first = 0 if fitted.first is None else 1
    shape = (len(values), values.shape[1] - first, *values.shape[2:])
    stored = np.empty(shape, fitted.dtype)
    return stored, *encode_into(fitted, values, stored)


def encode_into(
    fitted: FittedCodec, values: np.ndarray, stored: Sequence[np.ndarray] | np.ndarray
) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Store values float [n, *shape] in n arrays [*stored_shape] -> (error float32 [n], refused).

    refused: row -> why (not finite, too large for float16, first position deviates); such a row is
    stored as zeros. error: relative squared error of storing, 0 for what is stored as it came.
    """
    first = 0 if fitted.first is None else 1
    needs_no_cast = values.dtype == np.dtype(fitted.dtype)
    error = np.zeros(len(values), np.float32)
    refused: dict[int, str] = {}
    # Row by row, in the same memory, while a row is in the processor's cache: 3 times as fast as
    # the whole batch.
    read_back = np.empty((1, *values.shape[1:]), fitted.decoded_dtype)
    only_halved = fitted.dtype == "float16" and not first and not needs_no_cast
    wide = np.empty(values.shape[1:], np.float32)
    for i, value in enumerate(values):
        if only_halved and (lost := _halve(value, stored[i], wide)) is not None:
            error[i] = lost
            continue
        reason = _encode_row(fitted, value, stored[i])
        if reason is not None:
            refused[i] = reason
            stored[i][...] = 0
        elif fitted.dtype != "float32" and (first or not needs_no_cast):
            # Nothing but the first position is lost of what is in the stored type already.
            changed = slice(first) if needs_no_cast else slice(None)
            decode(fitted, stored[i][None], out=read_back)
            error[i] = _row_error(value, read_back[0], changed)
    return error, refused


def _halve(value: np.ndarray, out: np.ndarray, wide: np.ndarray) -> float | None:
    """One row to float16, and its error; None where the row is to be refused.

    wide: memory, float32 [*shape].
    """
    cast(value, out)
    cast(out, wide)
    # One look less at the row: what is not finite in it is not finite in the difference.
    with np.errstate(invalid="ignore"):
        lost = _energy(np.subtract(value, wide, out=wide, dtype=np.float32))
    return _relative(lost, value) if math.isfinite(lost) else None


def _encode_row(fitted: FittedCodec, value: np.ndarray, out: np.ndarray) -> str | None:
    """One row, float [*shape] -> out [*stored_shape]; returns why it is refused, if it is."""
    # Stored as float16 alone, it tells by what is stored, which is half as much to look at.
    stored_tells = fitted.dtype == "float16" and fitted.first is None
    if not (stored_tells or _all_finite(value)):
        return NOT_FINITE
    if fitted.first is not None:
        deviation = _row_error(value[0], fitted.first)
        if deviation > SHARED_FIRST_TOLERANCE:
            return (
                f"first position differs from the shared one (relative squared difference "
                f"{deviation:.2g}): rebuild with share_first off"
            )
        value = value[1:]
    if fitted.scale is not None:
        # What lies beyond the range of the sample is clipped, and shows in the row's error.
        levels = (value - fitted.offset) / fitted.scale
        np.clip(np.rint(levels, out=levels), -127, 127, out=levels)
        out[...] = levels
        return None
    cast(value, out)
    if out.dtype != np.float16 or _all_finite(out):
        return None
    return "a value is too large for float16 (65504)" if _all_finite(value) else NOT_FINITE


def decode(
    fitted: FittedCodec,
    stored: np.ndarray,
    index: NDArray[np.intp] | slice = slice(None),
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Rows `index` of stored [n, *stored_shape] -> values [m, *shape], into `out` if given."""
    if isinstance(index, slice) and fitted.first is None and fitted.scale is None and out is None:
        return stored[index]
    shape = stored.shape[1:]
    if fitted.first is not None:
        shape = (shape[0] + 1, *shape[1:])
    if out is None:
        count = len(range(*index.indices(len(stored)))) if isinstance(index, slice) else len(index)
        out = np.empty((count, *shape), fitted.decoded_dtype)
    body = out
    if fitted.first is not None:
        # Position 0 comes from the one copy, the others from the rows.
        out[:, 0] = fitted.first
        body = out[:, 1:]
    if fitted.scale is None:
        if isinstance(index, slice) or not body.flags.c_contiguous:
            body[...] = stored[index]
        else:
            # "clip", as `take` would otherwise fill a buffer before `out`; no index is outside.
            np.take(stored, index, axis=0, out=body, mode="clip")
    else:
        np.multiply(stored[index], fitted.scale, out=body, casting="unsafe")
        np.add(body, np.asarray(fitted.offset), out=body)
    return out


def zarr_compressors(codec: Codec) -> list[Any]:
    """The Zarr v3 codecs of the `compressor` choice."""
    from zarr.codecs import BloscCodec, ZstdCodec

    if codec.compressor == "none":
        return []
    if codec.compressor == "zstd":
        return [ZstdCodec(level=codec.level)]
    size = np.dtype(codec.dtype).itemsize
    name = codec.compressor.removeprefix("blosc-")
    return [BloscCodec(cname=name, clevel=codec.level, shuffle="shuffle", typesize=size)]  # type: ignore[arg-type]


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    exponent = np.uint16(0x7C00)  # all ones: infinite or no number; 8 times as fast as isfinite
    return bool(((values.view(np.uint16) & exponent) != exponent).all())


def _row_error(value: np.ndarray, other: np.ndarray, where: slice = slice(None)) -> float:
    """||x - y||^2 / ||x||^2 of two arrays of one shape, in float32; 0 where both are zero.

    They are known to be equal outside of `where`.
    """
    return _relative(_energy(np.subtract(value[where], other[where], dtype=np.float32)), value)


def _relative(lost: float, value: np.ndarray) -> float:
    """A squared difference to a row over ||row||^2; 0 where there is none."""
    if lost == 0:
        return 0.0
    limits = np.finfo(np.float32)
    energy = _energy(value.astype(np.float32, copy=False))
    return min(lost / max(energy, float(limits.tiny)), float(limits.max))


def _energy(values: np.ndarray) -> float:
    """Their squared norm. einsum adds in one thread; a BLAS would start threads for each row."""
    flat = values.reshape(-1)
    return float(np.einsum("i,i->", flat, flat))
