"""The three forms in which captioned pictures come, read row by row as they were written.

    TSV       header `caption<TAB>image` (the released GILL's format), UTF-8, quotes are literal
    Parquet   text columns `caption` and `image`
    tar       webdataset shards as img2dataset writes them: KEY.jpg beside KEY.txt or KEY.json

TSV and Parquet may also have the columns `id` and `split`. Each source yields, in order, a
`SourceRow` or, for a row that cannot even be parsed, an `Exclusion`.
"""

import glob
import os
from pathlib import Path

from corpora.arrow_table import ParquetSource
from corpora.shard_samples import TarSource
from corpora.source_rows import CaptionSource, CaptionTableError
from corpora.text_table import TsvSource


def open_source(table: str, images_dir: str | None = None) -> CaptionSource:
    """The source behind `table`: a `.tsv` or `.parquet` file, or tar shards given as a `.tar`
    file, a folder of them, or a glob.

    `images_dir` is what a table's `image` column is relative to: the table's own folder unless
    given. Shards hold their pictures themselves.

    Raises:
        CaptionTableError: nothing there, an unknown form, or a table without the columns.
    """
    path = Path(table)
    pattern = not path.exists() and glob.has_magic(table)
    if path.is_dir() or path.suffix.lower() == ".tar" or pattern:
        if images_dir is not None:
            raise CaptionTableError(
                f"{table}: images_dir is {images_dir}, but tar shards hold their own pictures"
            )
        return TarSource(table)
    if not path.is_file():
        raise CaptionTableError(f"{table}: no such caption table")
    root = str(path.parent) if images_dir is None else images_dir
    if not os.path.isdir(root):
        raise CaptionTableError(f"{table}: images_dir {root} is not a folder")
    if path.suffix.lower() in (".parquet", ".pq"):
        return ParquetSource(table, root)
    return TsvSource(table, root)
