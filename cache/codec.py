"""How values are made small for storing, and what that costs.

float values [n, *shape] --encode--> stored [n, *stored_shape] --decode--> values again, with an
error that is measured row by row while writing: the relative squared error ||x - x'||^2 / ||x||^2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

# Rounding in different batch shapes moves a float16 result by a few units in the last place, about
# 2e-7 in relative squared error each; a first position that truly depends on the row differs by
# far more.
SHARED_FIRST_TOLERANCE = 1e-5


class Codec(BaseModel):
    """How one array is stored. Changing any of it makes another store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
        return self.dtype != "float32"


class FirstPositionVariesError(ValueError):
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
    return codec.dtype == "int8" or codec.share_first


def fit(codec: Codec, sample: np.ndarray) -> FittedCodec:
    """Fit a codec to a sample of rows: float [n, *shape].

    Raises FirstPositionVariesError where `share_first` does not hold on the sample, ValueError
    where the sample is empty or not finite.
    """
    if not needs_fitting(codec):
        return FittedCodec(codec.dtype)
    if len(sample) == 0:
        raise ValueError("no row of the sample could be read: nothing to fit the codec to")
    values = sample.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError("the sample holds values that are not finite: the codec cannot be fitted")
    first = None
    if codec.share_first:
        first = values[0, 0].copy()
        worst = _relative_squared_error(values[:, 0], np.broadcast_to(first, values[:, 0].shape))
        if worst.max() > SHARED_FIRST_TOLERANCE:
            raise FirstPositionVariesError(
                "share_first is on, but the first position is not the same for every row "
                f"(relative squared difference up to {worst.max():.2g}): this encoder is not "
                "causal; turn it off"
            )
        values = values[:, 1:]
    if codec.dtype != "int8":
        return FittedCodec(codec.dtype, first=first)
    axes = tuple(range(values.ndim - 1))
    low, high = values.min(axes), values.max(axes)
    scale = np.maximum((high - low) / 254, np.finfo(np.float32).tiny).astype(np.float32)
    return FittedCodec("int8", scale, ((low + high) / 2).astype(np.float32), first)


def encode(
    fitted: FittedCodec, values: np.ndarray
) -> tuple[np.ndarray, NDArray[np.float32], dict[int, str]]:
    """Values float [n, *shape] -> (stored [n, *stored_shape], error float32 [n], refused).

    refused: row -> why.
    A refused row (not finite, too large for float16, first position deviates) is stored as zeros.
    """
    values = values.astype(np.float32, copy=False)
    refused: dict[int, str] = {}
    for i in np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1)):
        refused[int(i)] = "the encoder gave a value that is not finite"
    body = values
    if fitted.first is not None:
        shared = np.broadcast_to(fitted.first, values[:, 0].shape)
        with np.errstate(invalid="ignore"):
            deviation = _relative_squared_error(values[:, 0], shared)
        for i in np.flatnonzero(deviation > SHARED_FIRST_TOLERANCE):
            refused.setdefault(
                int(i),
                f"first position differs from the shared one (relative squared difference "
                f"{deviation[i]:.2g}): rebuild with share_first off",
            )
        body = values[:, 1:]
    stored_dtype = np.dtype(fitted.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if fitted.dtype == "int8":
            assert fitted.scale is not None
            assert fitted.offset is not None
            levels = np.rint((body - fitted.offset) / fitted.scale)
            stored = np.clip(levels, -127, 127).astype(stored_dtype)
        else:
            stored = body.astype(stored_dtype)
            if stored_dtype == np.float16:
                for i in np.flatnonzero(~np.isfinite(stored.reshape(len(stored), -1)).all(axis=1)):
                    refused.setdefault(int(i), "a value is too large for float16 (65504)")
    stored[list(refused)] = 0
    if fitted.dtype != "float32":
        with np.errstate(invalid="ignore", over="ignore"):
            error = _relative_squared_error(values, decode(fitted, stored).astype(np.float32))
        error[list(refused)] = 0
    else:
        error = np.zeros(len(values), np.float32)
    return stored, error, refused


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
        out[:, 0] = fitted.first
        body = out[:, 1:]
    if fitted.scale is None:
        if isinstance(index, slice) or not body.flags.c_contiguous:
            body[...] = stored[index]
        else:
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


def _relative_squared_error(values: np.ndarray, other: np.ndarray) -> NDArray[np.float32]:
    """||x - y||^2 / ||x||^2 of every row: [n, ...] twice -> float32 [n]; 0 where both are zero."""
    n = len(values)
    gap = np.square(values - other).reshape(n, -1).sum(axis=1, dtype=np.float64)
    energy = np.square(values).reshape(n, -1).sum(axis=1, dtype=np.float64)
    return np.where(gap == 0, 0, gap / np.maximum(energy, np.finfo(np.float64).tiny)).astype(
        np.float32
    )
