"""What storing costs, and what it refuses."""

import ctypes
import threading
import time

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cache import casting, checksums
from cache.codec import (
    Codec,
    FirstPositionVariesError,
    FittedCodec,
    decode,
    encode,
    encode_into,
    fit,
)


def normal(n: int, scale: float = 1.0) -> np.ndarray:
    """[n, 7, 32] with channels of different ranges and offsets, and a constant position 0."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(n, 7, 32)) * np.linspace(0.1, 3, 32) + np.linspace(-5, 5, 32)
    values[:, 0] = 20 * np.cos(np.arange(32))
    return (values * scale).astype(np.float32)


def test_float16_rounds_and_measures_it() -> None:
    values = normal(50)
    stored, error, refused = encode(fit(Codec(), values), values)
    np.testing.assert_array_equal(stored, values.astype(np.float16))
    gap = (values - stored.astype(np.float32)).reshape(50, -1)
    want = (gap.astype(float) ** 2).sum(1) / (values.astype(float) ** 2).sum((1, 2))
    np.testing.assert_allclose(error, want, rtol=1e-5)
    assert error.max() < 2.0**-22  # half a unit in the last place, squared
    assert refused == {}


def test_float32_is_exact() -> None:
    values = normal(5)
    fitted = fit(Codec(dtype="float32"), values)
    stored, error, _ = encode(fitted, values)
    np.testing.assert_array_equal(decode(fitted, stored), values)
    assert not error.any()


def test_int8_error_is_that_of_uniform_rounding() -> None:
    values = normal(400)
    fitted = fit(Codec(dtype="int8"), values)
    assert fitted.scale is not None
    stored, error, _ = encode(fitted, values)
    assert stored.dtype == np.int8
    gap = decode(fitted, stored) - values
    assert np.abs(gap).max() <= fitted.scale.max() * 0.501
    # Rounding errors are uniform in one step: step^2 / 12 per value (channel 0 has a narrow range).
    np.testing.assert_allclose((gap[:, 1:] ** 2).mean((0, 1)), fitted.scale**2 / 12, rtol=0.1)
    want = (gap.astype(float) ** 2).sum((1, 2)) / (values.astype(float) ** 2).sum((1, 2))
    np.testing.assert_allclose(error, want, rtol=1e-4)


def test_a_shared_first_position_narrows_the_int8_range() -> None:
    values = normal(400)
    alone = encode(fit(Codec(dtype="int8"), values), values)[1]
    fitted = fit(Codec(dtype="int8", share_first=True), values)
    stored, shared, refused = encode(fitted, values)
    assert stored.shape == (400, 6, 32)
    assert refused == {}
    assert shared.mean() < alone.mean() / 2
    np.testing.assert_array_equal(decode(fitted, stored)[:, 0], values[:, 0])


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("share_first", [False, True])
def test_decoding_some_rows_into_place(dtype: str, share_first: bool) -> None:
    values = normal(30)
    fitted = fit(Codec(dtype=dtype, share_first=share_first), values)
    stored, _, _ = encode(fitted, values)
    whole, index = decode(fitted, stored), np.array([4, 4, 29, 0])
    assert whole.dtype == fitted.decoded_dtype
    out = np.full((6, 7, 32), np.nan, fitted.decoded_dtype)
    decode(fitted, stored, index, out[1:5])
    np.testing.assert_array_equal(out[1:5], whole[index])
    assert np.isnan(out[[0, 5]]).all()
    np.testing.assert_array_equal(decode(fitted, stored, index), whole[index])


def test_a_first_position_that_varies_is_noticed() -> None:
    values = normal(20)
    codec = Codec(share_first=True)
    fitted = fit(codec, values)
    nearly = values.copy()
    nearly[3, 0] *= 1.0005  # a unit in the last place of float16: still the same vector
    nearly[7, 0, 0] += 5.0
    _, _, refused = encode(fitted, nearly)
    assert list(refused) == [7]
    assert "first position differs" in refused[7]
    with pytest.raises(FirstPositionVariesError, match="not causal"):
        fit(codec, nearly)


def test_values_that_cannot_be_stored_are_refused_by_row() -> None:
    values = normal(6)
    values[1, 2, 3] = np.inf
    values[4, 5, 6] = 7e4
    values[0, 0, 0], values[2, 0, 0] = 65504, -65504
    stored, error, refused = encode(fit(Codec(), values), values)
    assert list(refused) == [1, 4]
    assert "not finite" in refused[1]
    assert "too large for float16" in refused[4]
    assert not stored[[1, 4]].any()
    assert not error[[1, 4]].any()
    # The same for values that come as float16 already.
    with np.errstate(over="ignore"):
        stored, error, refused = encode(fit(Codec(), values), values.astype(np.float16))
    assert list(refused) == [1, 4]
    assert not error.any()
    np.testing.assert_array_equal(stored[[0, 2, 3, 5]], values[[0, 2, 3, 5]].astype(np.float16))
    with pytest.raises(ValueError, match="not finite"):
        fit(Codec(dtype="int8"), values)
    with pytest.raises(ValueError, match="nothing to fit"):
        fit(Codec(dtype="int8"), values[:0])


@given(
    arrays(np.float32, (9, 3, 4), elements=st.floats(-60000, 60000, width=32)),
    st.sampled_from(["float32", "float16", "int8"]),
)
@settings(max_examples=60, deadline=None)
def test_measured_error_is_the_error_of_reading_back(values: np.ndarray, dtype: str) -> None:
    fitted = fit(Codec(dtype=dtype), values)
    stored, error, refused = encode(fitted, values)
    assert refused == {}
    back = decode(fitted, stored).astype(float)
    gap = ((values.astype(float) - back) ** 2).sum((1, 2))
    energy = (values.astype(float) ** 2).sum((1, 2))
    some = energy > 1e-20
    np.testing.assert_allclose(error[some], gap[some] / energy[some], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("off", [0.0, 1e-3])
def test_values_in_the_stored_type_are_kept_as_they_came_beside_a_shared_first(off: float) -> None:
    """Bits, and the error of the first position alone, against the road through float32."""
    values = np.random.default_rng(0).normal(size=(6, 5, 16)).astype(np.float16)
    values[:, 0] = values[0, 0]
    first = values[0, 0] * np.float32(1 + off)
    fitted = FittedCodec("float16", first=first)
    stored, error, refused = encode(fitted, values)
    through, error_through, _ = encode(fitted, values.astype(np.float32))
    assert not refused
    assert stored.tobytes() == through.tobytes() == values[:, 1:].tobytes()
    np.testing.assert_array_equal(error, error_through)
    expected = ((values.astype(float) - decode(fitted, stored)) ** 2).sum((1, 2))
    np.testing.assert_allclose(error, expected / (values.astype(float) ** 2).sum((1, 2)), rtol=1e-4)
    assert (error > 0).all() == bool(off)


def test_every_float16_is_widened_exactly() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = halves[np.isfinite(halves)]
    widened = np.empty(finite.shape, np.float32)
    casting.cast(finite, widened)
    assert widened.tobytes() == finite.astype(np.float32).tobytes()


def test_casting_to_float16_gives_numpys_bits() -> None:
    """Halfway cases, subnormal numbers, signed zeros and what becomes infinite included."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    halfway = (halves[1:] + halves[:-1]) / 2
    beside = [np.nextafter(halfway, np.float32(x)) for x in (0, np.inf)]
    values = np.concatenate([halves, halfway, *beside, np.array([65519.99, 65520, 1e30], "f")])
    values = np.stack([values, -values])
    values.flags.writeable = False
    out = np.empty(values.shape, np.float16)
    casting.cast(values, out)
    with np.errstate(over="ignore"):
        assert out.tobytes() == values.astype(np.float16).tobytes()
    assert np.isinf(out[:, -2:]).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_are_stored_where_they_are_wanted(dtype: str) -> None:
    values = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    values[1, 2, 3] = np.nan
    fitted = fit(Codec(dtype=dtype), values[[0, 2]])
    shard = np.full((6, 4, 5), 7, dtype)
    stored, error, refused = encode(fitted, values)
    error_there, refused_there = encode_into(fitted, values, [shard[5], shard[0], shard[2]])
    np.testing.assert_array_equal(shard[[5, 0, 2]], stored)
    assert (shard[[1, 3, 4]] == 7).all()
    np.testing.assert_array_equal(error, error_there)
    assert list(refused) == list(refused_there) == [1]


def test_checksums_are_googles_with_and_without_its_c_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = np.random.default_rng(0).integers(0, 256, (5, 3, 1001), np.uint8)
    want = [google_crc32c.value(row.tobytes()) for row in rows]
    assert checksums.row_checksums(rows).tolist() == want
    assert checksums.row_checksums(rows[::-1], [4, 0]).tolist() == [want[0], want[4]]
    assert checksums.row_checksums(rows[:, ::2]).tolist() != want
    monkeypatch.setattr(ctypes, "CDLL", lambda path: object())
    slow = checksums._bytes_checksum()
    assert slow(rows[1].ctypes.data, rows[1].nbytes) == want[1]


def test_other_threads_run_while_rows_are_checked() -> None:
    """It would be one row after the other in all threads of a reader."""

    def turns_of_this_thread() -> int:
        row, ran = np.zeros(1 << 28, np.uint8), []
        checking = threading.Thread(target=lambda: ran.append(checksums.row_checksums(row[None])))
        checking.start()
        turns = 0
        while not ran:
            turns += 1
            time.sleep(0)
        return turns

    # The system may give this thread no time during one check; where a check keeps the lock of
    # the interpreter, none of any number of checks lets it run.
    assert any(turns_of_this_thread() > 100 for _ in range(50))


def test_halves_and_errors_are_those_of_the_plain_formula() -> None:
    """Bit by bit: an error is stored, and one unit of it would make another store."""
    values = normal(20, scale=300.0)
    values[3, 2, 1], values[5, 1, 1], values[7, 0, 0], values[9] = np.nan, np.inf, 7e4, 0
    stored, error, refused = encode(FittedCodec("float16"), values)
    assert list(refused) == [3, 5, 7]
    for row in set(range(20)) - set(refused):
        gap = (values[row] - values[row].astype(np.float16).astype(np.float32)).reshape(-1)
        energy = np.einsum("i,i->", values[row].reshape(-1), values[row].reshape(-1))
        want = float(np.einsum("i,i->", gap, gap)) / max(float(energy), 1e-38)
        assert error[row] == np.float32(want)
        assert stored[row].tobytes() == values[row].astype(np.float16).tobytes()
