"""An open store: its rows, their status, and reading and committing them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from cache.checksums import digest, row_checksums
from cache.codec import FittedCodec
from cache.copied_shards import CopiedShards
from cache.layout import (
    REASON_BYTES,
    ArraySpec,
    StoreSpec,
    bookkeeping,
    checksum_name,
    error_name,
    fitted_name,
)
from cache.local_copies import LocalCopies, ShardSource
from cache.location import Location, StoreUnreachableError, locate
from cache.shards import ShardFile, create_data_array, max_shard_bytes, shard_path
from gill_errors import InputError
from gill_files import explained
from gill_records import differences

if TYPE_CHECKING:
    from cache.torch_rows import TorchRows

ATTRIBUTE = "embedding_cache"
FORMAT = 1


class RowStatus(IntEnum):
    """What is known of a row; the numbers are those in `row_status`."""

    PENDING = 0
    DONE = 1
    FAILED = 2


class NotAStoreError(InputError):
    """What lies there is no embedding store, or one whose making was interrupted."""


class StoreMismatchError(InputError):
    """The store was made by another model, preprocessing or layout than the one asked for."""


@dataclass
class ShardResult:
    """What encoding (part of) one shard gave. Small: the values themselves are in the shard file.

    positions int64 [k]: rows that were encoded, counted within the shard; status uint8 [k];
    checksums uint32 [k] and errors float32 [k] per array; reasons: position -> why the row failed.
    """

    shard: int
    positions: NDArray[np.int64]
    status: NDArray[np.uint8]
    checksums: dict[str, NDArray[np.uint32]] = field(default_factory=dict)
    errors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)


class EmbeddingStore:
    """One store of one corpus. `open_store` opens it, `fill` creates and fills it."""

    def __init__(
        self, location: Location, group: zarr.Group, copies: LocalCopies | None = None
    ) -> None:
        """copies: through which shards are read."""
        self.location = location
        self.group = group
        self._copies = copies
        self._shard_versions: dict[str, list[str]] = {}
        self._arrays: dict[str, zarr.Array] = {}
        self._fitted: dict[str, FittedCodec] = {}
        meta = group.attrs.get(ATTRIBUTE)
        if not isinstance(meta, dict) or meta.get("format") != FORMAT:
            raise NotAStoreError(
                f"{location} is a Zarr group, but no embedding store of format {FORMAT}"
            )
        self.spec = StoreSpec.model_validate(meta["spec"])

    # What the store says about itself

    @property
    def meta(self) -> dict[str, Any]:
        """format, spec, provenance, versions, rows_fingerprint, prepared, measured."""
        meta = self.group.attrs[ATTRIBUTE]
        assert isinstance(meta, dict)
        return meta

    @property
    def provenance(self) -> dict[str, Any]:
        """Which model made the rows, as JSON values."""
        return self.meta["provenance"]

    @property
    def num_rows(self) -> int:
        """N, the rows of the table, done or not."""
        return self.table("row_status").shape[0]

    def status(self) -> NDArray[np.uint8]:
        """RowStatus of every row: uint8 [N]."""
        return self.read_table("row_status")

    def status_counts(self) -> dict[str, int]:
        """How many rows are pending, done and failed."""
        counts = np.bincount(self.status(), minlength=len(RowStatus))
        return {status.name.lower(): int(counts[status]) for status in RowStatus}

    def failures(self) -> dict[int, str]:
        """Row -> why it failed."""
        failed = np.flatnonzero(self.status() == RowStatus.FAILED)
        if len(failed) == 0:
            return {}
        texts = np.asarray(self.table("row_reason").oindex[failed])
        return {
            int(row): text.tobytes().rstrip(b"\0").decode(errors="replace")
            for row, text in zip(failed, texts)
        }

    def constant(self, name: str) -> NDArray[np.float32]:
        """A constant of the corpus, such as `empty_embedding`: float32 [*axes]."""
        if name not in self.spec.constants:
            raise KeyError(
                f"{self.location} keeps no constant {name!r}: {list(self.spec.constants)}"
            )
        return np.asarray(self._open(name)[...])

    def fitted(self, name: str) -> FittedCodec:
        """The codec of an array with the numbers that were fitted to the data."""
        if name not in self._fitted:
            codec = self.array_spec(name).codec
            parts = {}
            if codec.dtype == "int8":
                parts = {"scale": None, "offset": None}
            if codec.share_first:
                parts["first"] = None
            read = {part: np.asarray(self._open(fitted_name(name, part))[...]) for part in parts}
            self._fitted[name] = FittedCodec(codec.dtype, **read)
        return self._fitted[name]

    def array_spec(self, name: str) -> ArraySpec:
        """The layout of an array. Raises KeyError naming those that there are."""
        if name not in self.spec.arrays:
            raise KeyError(f"{self.location} has no array {name!r}, only {list(self.spec.arrays)}")
        return self.spec.arrays[name]

    def table(self, name: str) -> zarr.Array:
        """A bookkeeping array by name."""
        return self._open(name)

    def checksums(self, name: str) -> zarr.Array:
        """CRC-32C of every row's stored bytes in the array `name`: uint32 [N]."""
        self.array_spec(name)
        return self.table(checksum_name(name))

    def read_table(self, name: str) -> np.ndarray:
        """A whole bookkeeping array; raises NotAStoreError naming it where it is damaged."""
        try:
            with self.location.reached(name):
                return np.asarray(self.table(name)[...])
        except StoreUnreachableError:
            raise
        except (ValueError, RuntimeError, OSError) as e:
            raise NotAStoreError(
                f"{self.location}: {name} is damaged ({e}): repair the store"
            ) from e

    # Reading rows

    def read_stored(
        self, name: str, start: int, stop: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Rows start:stop as stored, unchecked: [n, *stored_row_shape], into `out` if given.

        Raises DamagedShardError or what Zarr raises where a shard cannot be read.
        """
        array = self.array_spec(name)
        if out is None:
            out = np.empty((stop - start, *array.stored_row_shape), array.codec.dtype)
        if not self.reads_straight(name):
            with self.location.reached(*shard_path(self.spec, name, start // self.spec.shard_rows)):
                out[...] = self._open(name)[start:stop]
            return out
        rows = self.spec.shard_rows
        for shard in range(start // rows, -(-stop // rows)):
            first, last = max(start, shard * rows), min(stop, (shard + 1) * rows)
            self.fetch_shard(name, shard)
            with self.open_shard(name, shard) as file:
                file.read(first - shard * rows, out[first - start : last - start])
        return out

    def reads_straight(self, name: str) -> bool:
        """True where nothing stands between a file on a disk and the rows: no compression."""
        on_disk = self.location.is_local or self._copies is not None
        return on_disk and self.array_spec(name).codec.compressor == "none"

    def open_shard(self, name: str, shard: int, *, fetch: bool = True) -> ShardFile:
        """A shard's file, of an array that `reads_straight`.

        fetch: have a local copy made where there is none; else it is as a shard that is absent.
        """
        path = self.shard_file(name, shard * self.spec.shard_rows)
        if self._copies is None:
            open_file = partial(os.open, path, os.O_RDONLY)
        else:
            opening = self._copies.open if fetch else self._copies.open_present
            open_file = partial(opening, self._shard_source(name, shard))
        return ShardFile(path, open_file, self.spec, name)

    def fetch_shard(self, name: str, shard: int, asked_ns: int | None = None) -> None:
        """Have a local copy of a shard, where this store is read through such copies.

        asked_ns: since when it is wanted, by `time.time_ns`; None: since now.
        """
        if self._copies is not None:
            self._copies.fetch(self._shard_source(name, shard), asked_ns)

    def discard_copy(self, name: str, shard: int) -> None:
        """Have a shard with damaged rows fetched anew when it is read next."""
        if self._copies is not None:
            self._copies.discard(self._shard_source(name, shard))

    def _shard_source(self, name: str, shard: int) -> ShardSource:
        size = self.spec.shard_rows
        if name not in self._shard_versions:
            # By the rows' checksums: a shard that was replaced since is another file.
            sums = self.read_table(checksum_name(name))
            self._shard_versions[name] = [
                digest(sums[i : i + size]) for i in range(0, len(sums), size)
            ]
        version = self._shard_versions[name][shard]
        inside = shard_path(self.spec, name, shard)
        return ShardSource(self.location, inside, version, max_shard_bytes(self.spec, name))

    def read_checked(
        self,
        name: str,
        start: int,
        checksums: NDArray[np.uint32],
        wanted: NDArray[np.bool_],
        out: np.ndarray,
    ) -> dict[int, str]:
        """Read rows from `start` into `out` [n, *stored_row_shape] and check the `wanted` ones.

        checksums uint32 [n], wanted bool [n] -> {offset of a bad row: what is wrong with it}.
        """
        bad: dict[int, str] = {}
        try:
            self.read_stored(name, start, start + len(out), out)
        except (MemoryError, StoreUnreachableError):  # the rows may be whole
            raise
        except Exception:
            # Something in the range is damaged: go by inner chunks to find out which rows.
            step = self.spec.inner_rows(name)
            cuts = range((start // step + 1) * step, start + len(out), step)
            for first, last in zip([start, *cuts], [*cuts, start + len(out)]):
                piece = out[first - start : last - start]
                try:
                    self.read_stored(name, first, last, piece)
                except (MemoryError, StoreUnreachableError):
                    raise
                except Exception as e:
                    piece[...] = 0
                    bad.update(
                        dict.fromkeys(range(first - start, last - start), f"unreadable: {e}")
                    )
        sums = row_checksums(out)
        for offset in np.flatnonzero(sums != checksums):
            bad.setdefault(int(offset), "checksum differs")
        for shard in {(start + offset) // self.spec.shard_rows for offset in bad}:
            self.discard_copy(name, shard)
        return {offset: reason for offset, reason in sorted(bad.items()) if wanted[offset]}

    def shard_file(self, name: str, row: int) -> str:
        """The file that holds a row, as the user would name it."""
        return "/".join(
            [self.location.url, *shard_path(self.spec, name, row // self.spec.shard_rows)]
        )

    def to_torch(self, *, batch_size: int, seed: int, **options: Any) -> TorchRows:
        """All arrays in shuffled batches, for PyTorch's loaders: see `TorchRows`."""
        # By the room's front: what is built upon this module cannot be imported by it.
        front = import_module("cache")
        sources = {name: (self, name) for name in self.spec.arrays}
        return front.TorchRows(sources, batch_size=batch_size, seed=seed, **options)

    # Writing: only under the run lock

    def update_meta(self, **changes: Any) -> None:
        """Change what the store says about itself; nothing is written where nothing changes."""
        meta = self.meta
        if any(meta.get(key) != value for key, value in changes.items()):
            with explained(self.location):
                self.group.attrs[ATTRIBUTE] = {**meta, **changes}

    def commit(self, result: ShardResult) -> None:
        """Record a shard whose file is in place: checksums first, status last."""
        rows = result.shard * self.spec.shard_rows + result.positions
        tables: dict[str, np.ndarray] = {}
        for name in self.spec.arrays:
            tables[checksum_name(name)] = result.checksums[name]
            if name in result.errors:
                tables[error_name(name)] = result.errors[name]
        if result.reasons:
            texts = [result.reasons.get(int(position), "") for position in result.positions]
            tables["row_reason"] = np.stack([_reason_bytes(text) for text in texts])
        tables["row_status"] = result.status
        self.record(rows, tables)

    def record(self, rows: NDArray[np.int64], tables: Mapping[str, np.ndarray]) -> None:
        """Write bookkeeping of rows (int64 [k]), name -> [k, ...], `row_status` the last of it."""
        with explained(self.location):
            # In this order: killed between two, what was pending still is, and is encoded again.
            for name, values in tables.items():
                self.table(name).oindex[rows] = values

    def mark_pending(self, rows: NDArray[np.int64]) -> None:
        """Make rows (int64 [k]) pending again, and forget why they failed."""
        if len(rows) == 0:
            return
        with explained(self.location):
            # Status first: a stale reason of a pending row is harmless, the reverse would not be.
            for name in ("row_status", "row_reason"):
                self.table(name).oindex[rows] = 0

    def mark_failed(self, rows: NDArray[np.int64], reason: str) -> None:
        """Leave rows (int64 [k]) out of all reading, for this reason; their bytes stay."""
        if len(rows) == 0:
            return
        with explained(self.location):
            # Status last: killed between the two, the rows are as they were.
            reasons = np.tile(_reason_bytes(reason), (len(rows), 1))
            self.table("row_reason").oindex[rows] = reasons
            self.table("row_status").oindex[rows] = RowStatus.FAILED

    def match_rows(self, keys: NDArray[np.uint64]) -> list[str]:
        """Make the store's rows those of the table: keys uint64 [N] -> what changed, for people.

        A row that is still at its place is kept; a row whose key differs becomes pending; the end
        is cut or extended. Killed at any moment and called again, it ends in the same state.
        """
        notes: list[str] = []
        old_status, new = self.status(), len(keys)
        old, common = len(old_status), min(len(old_status), new)
        old_keys = self.read_table("row_key")[:common]
        differs = np.ones(common, bool)
        # After a kill there may be fewer keys than rows: a row without one differs.
        differs[: len(old_keys)] = old_keys != keys[: len(old_keys)]
        written = old_status != RowStatus.PENDING
        moved = np.flatnonzero(differs & written[:common])
        if len(moved):
            kept = int(np.count_nonzero(written[:common])) - len(moved)
            what = f"{kept:,} stored rows are kept" if kept else "no stored row can be kept"
            which = f"row {moved[0]} is" if len(moved) == 1 else f"{len(moved):,} rows are"
            notes.append(
                f"the table changed: {which} not what was stored there (from row {moved[0]} on); "
                f"{what}, the others are encoded again"
            )
        if old and new > old:
            notes.append(f"{new - old:,} rows are new at the end of the table")
        if new < old:
            notes.append(f"the table is {old - new:,} rows shorter: the rest is dropped")
        # What is cut off is made pending first: Zarr keeps the tail of the last chunk, and a later
        # extension would show it again as done.
        gone = np.flatnonzero(written[common:]) + common
        self.mark_pending(np.concatenate([moved, gone]).astype(np.int64))
        with explained(self.location):
            # The store has as many rows as `row_status`: killed before that changes, the next call
            # finds the old number and does all of this again.
            for name in [*self.spec.arrays, *bookkeeping(self.spec)]:  # row_status last
                array = self._open(name)
                if array.shape[0] != new:
                    array.resize((new, *array.shape[1:]))
                if name == "row_key" and (differs.any() or new != old):
                    array[...] = keys
        self.update_meta(rows_fingerprint=digest(keys))
        return notes

    def write_fitted(self, fitted: Mapping[str, FittedCodec]) -> None:
        """Store the fitted parts of the codecs beside their arrays."""
        with explained(self.location):
            for name, codec in fitted.items():
                channel = list(self.spec.arrays[name].dims)[1:] or list(self.spec.arrays[name].dims)
                for part, values in codec.parts().items():
                    dims = channel if part == "first" else channel[-1:]
                    self._write_once(fitted_name(name, part), values, dims)
        self._fitted.clear()

    def write_constants(self, constants: Mapping[str, np.ndarray]) -> None:
        """Store the constants that the spec names; raises ValueError if one lacks or misfits."""
        for name, dims in self.spec.constants.items():
            found = np.asarray(constants[name]).shape if name in constants else "nothing"
            if found != tuple(dims.values()):
                raise InputError(f"constant {name!r}: expected {tuple(dims.values())}, got {found}")
            with explained(self.location):
                self._write_once(name, np.asarray(constants[name], np.float32), list(dims))

    def _write_once(self, name: str, values: np.ndarray, dims: list[str]) -> None:
        # One that exists was left by a run killed while preparing: no row relies on it yet.
        array = self.group.create_array(
            name,
            shape=values.shape,
            chunks=values.shape,
            dtype=values.dtype,
            filters=None,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            dimension_names=dims,
            overwrite=True,
        )
        array[...] = values
        self._arrays[name] = array

    def _group_of_copies(self, name: str) -> zarr.Group:
        """The store as Zarr sees it when the shards of an array are read from local copies."""
        copies = self._copies
        assert copies is not None
        store = CopiedShards(
            self.location.zarr_store(read_only=True),
            name,
            lambda shard: copies.open(self._shard_source(name, shard)),
        )
        return zarr.open_group(store, mode="r", zarr_format=3)

    def _open(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            pipeline = {"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}
            copied = self._copies is not None and name in self.spec.arrays
            # zarrs decompresses on all cores; it reads local stores only.
            fast = self.location.is_local and name in self.spec.arrays and not copied
            with zarr.config.set(pipeline if fast else {}), self.location.reached(name):
                group = self._group_of_copies(name) if copied else self.group
                array = group.get(name)
            if not isinstance(array, zarr.Array):
                raise NotAStoreError(
                    f"{self.location} has no array {name!r}: its making was interrupted; "
                    "fill it again"
                )
            self._arrays[name] = array
        return self._arrays[name]


def open_store(
    where: str | Path | Location | EmbeddingStore,
    *,
    writable: bool = False,
    copies: LocalCopies | None = None,
) -> EmbeddingStore:
    """Open a store, for reading or (under the run lock) for writing; one that is open is itself.

    Reads the attributes only, however many rows there are. Of a store read through local copies,
    shards are fetched whole. Raises NotAStoreError where there is none,
    StoreUnreachableError where an object store does not answer.
    """
    if isinstance(where, EmbeddingStore):
        return where if copies is None else EmbeddingStore(where.location, where.group, copies)
    location = locate(where)
    try:
        with location.reached():
            group = zarr.open_group(
                location.zarr_store(read_only=not writable),
                mode="r+" if writable else "r",
                zarr_format=3,
            )
    except FileNotFoundError:
        raise NotAStoreError(f"{location}: there is no store here") from None
    return EmbeddingStore(location, group, copies)


def open_for_writing(
    location: Location,
    spec: StoreSpec,
    provenance: Mapping[str, Any],
    versions: Mapping[str, str],
) -> EmbeddingStore:
    """Open the store that `spec` and `provenance` describe, or create it. Under the run lock.

    Raises StoreMismatchError naming every difference, NotAStoreError where something else lies.
    """
    # As it will be read back: lists, not tuples, or the comparison would find a difference.
    provenance = json.loads(json.dumps(dict(provenance)))
    asked = {"spec": spec.model_dump(mode="json"), "provenance": provenance}
    all_versions = {**_versions(), **versions}
    with explained(location):
        if not location.exists():
            group = zarr.create_group(
                location.zarr_store(read_only=False),
                zarr_format=3,
                attributes={ATTRIBUTE: {"format": FORMAT, **asked, "versions": [all_versions]}},
            )
        else:
            try:
                group = zarr.open_group(
                    location.zarr_store(read_only=False), mode="r+", zarr_format=3
                )
            except FileNotFoundError:
                raise NotAStoreError(
                    f"{location} holds files, but no embedding store: name another path"
                ) from None
    store = EmbeddingStore(location, group)
    stored = {key: store.meta[key] for key in asked}
    if unlike := list(differences(stored, asked)):
        lines = [f"{key}: stored {there!r}, asked {here!r}" for key, there, here in unlike]
        raise StoreMismatchError(
            f"{location} was made otherwise and is left as it is:\n  "
            + "\n  ".join(lines)
            + "\nRebuild it on purpose (rebuild), or give the new one another path."
        )
    if all_versions not in store.meta["versions"]:
        store.update_meta(versions=[*store.meta["versions"], all_versions])
    with explained(location):
        location.remove_partial_files()
        for name in spec.arrays:
            # Without rows: `match_rows` gives them their length. A killed run made some of them.
            if name not in group:
                create_data_array(group, name, spec, 0)
        for name, table in bookkeeping(spec).items():
            if name not in group:
                width = () if table.width is None else (table.width,)
                group.create_array(
                    name,
                    shape=(0, *width),
                    chunks=(table.chunk, *width),
                    dtype=table.dtype,
                    fill_value=0,
                    filters=None,
                    compressors=[ZstdCodec(level=1), Crc32cCodec()],
                    dimension_names=("row", "reason_byte")[: 1 + len(width)],
                )
    return store


def remove_store(location: Location) -> None:
    """Remove a store. Killed on the way, what is left is a store whose rows are all pending."""
    if not location.exists():
        return
    store = open_store(location, writable=True)  # never remove what is not ours
    store.update_meta(prepared=False)
    with explained(location):
        # Status goes first and the attributes last: whatever is left in between is a store of ours
        # in which no row is done.
        location.beside(".manifest.json").remove()
        location.remove("row_status")
        for name in location.children():
            if name != "zarr.json":
                location.remove(name)
        location.remove("zarr.json")


def _reason_bytes(text: str) -> NDArray[np.uint8]:
    """Why a row failed, as `row_reason` has it: uint8 [REASON_BYTES]."""
    # Cut at a number of bytes, maybe within a letter: reading it back allows for that.
    encoded = text.encode()[:REASON_BYTES]
    return np.frombuffer(encoded.ljust(REASON_BYTES, b"\0"), np.uint8)


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "zarr": zarr.__version__,
        "numpy": np.__version__,
    }
