"""The embedding cache: a vector, or a stack of them, per row of a table; made once, read often.

The data types, before anything else:

    Codec            how one array is stored: number type, compressor, shared first position
    ArraySpec        the named axes of one row's value, and its Codec
    StoreSpec        the arrays and constants of a store, and how many rows make a shard
    Roles            read, encode, group, constants: the callables that know pictures and models
    EmbeddingStore   an open store: arrays [N, ...] in the order of the table, a RowStatus per row
    FillReport       what a run of `fill` did
    Batch            rows int64 [B], and arrays {name: [B, *shape]}
    VerifyReport     which shards and rows are not what was written
    StoreDescription, RowView   what `inspect` shows

A store is a Zarr v3 group (cache/layout.py draws it) with a manifest beside it. `zarr.open` and
`xarray.open_zarr` read it without this package. A row is there when its `row_status` says so, and
is right when it matches its checksum. Shards are written whole, each by one writer, then recorded.

    fill(path, rows, spec, make_roles, provenance={})          make it, resume it, update it
    fill(..., part=Part(3, 8)); join_stores(paths, new)        by machines that share no disk
    copy_rows(path, new, [5, 3])                               a store of some rows, in their order
    drop_rows(path, [5]), compact(path, new)                   rows that are gone from the table
    ShuffledRows({name: (path, array)}, batch_size=200, seed=0)    train from it
    open_store(path).to_torch(batch_size=200, seed=0)          the same for PyTorch's loaders
    read_rows(path, [3, 5]), iterate_blocks(path)              read it by number, or in order
    describe(path), view_row(path, 3), write_page(path, page)  look at it
    export_store(path, out, "parquet")                         hand it on
    verify(path), repair(path)                                 check it; have what is bad redone
    locate(path)                                               a folder, a URL, or a link to either

This room knows no model, no picture and (but for torch_rows.py) no tensor, and is the only one that
imports zarr or numcodecs.
"""

import lazy_loader

# The names and where they come from are in __init__.pyi: a params file is read without Zarr.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
