"""Conceptual Captions as Google publishes it: Train_GCC-training.tsv has no header, and each line
is `caption<TAB>url`. It names no picture, so it is not a caption table: its pictures have to be
downloaded first, for which this module writes the list that img2dataset reads.

    img2dataset --url_list cc3m_urls.tsv --input_format tsv --url_col url --caption_col caption \\
                --output_format webdataset --output_folder cc3m

The shards in `cc3m/` are then a caption table.
"""

import os
import re
from pathlib import Path

from corpora.records import CorpusError, Exclusion, Report

_ADDRESS = re.compile(r"https?://[^\s/]", re.IGNORECASE)


def write_url_list(path: str | Path, out: str | Path) -> Report:
    """Writes `out`, a TSV with the header `caption<TAB>url`, atomically and in the order of `path`.

    Lines that are not UTF-8, have another number of columns, no caption or no http(s) address,
    or repeat an earlier line, are reported by line number, counted from 1.

    Raises:
        CorpusError: no such file, or no line of it can be used.
    """
    excluded: list[Exclusion] = []
    kept = 0
    seen: set[int] = set()
    partial = Path(out).with_name(f".{Path(out).name}.partial")
    try:
        with open(path, "rb") as lines, partial.open("w", encoding="utf-8", newline="\n") as list_:
            list_.write("caption\turl\n")
            for number, line in enumerate(lines, 1):
                cells = _cells(line)
                if isinstance(cells, str):
                    excluded.append(Exclusion(str(path), str(number), cells))
                elif hash(cells) in seen:
                    excluded.append(Exclusion(str(path), str(number), "duplicate"))
                else:
                    seen.add(hash(cells))
                    list_.write("\t".join(cells) + "\n")
                    kept += 1
        report = Report(str(path), kept, tuple(excluded))
        if not kept:
            raise CorpusError(f"nothing to keep in {report}")
        os.replace(partial, out)
    except FileNotFoundError as error:
        raise CorpusError(f"{path}: no such file") from error
    finally:
        partial.unlink(missing_ok=True)
    return report


def _cells(line: bytes) -> tuple[str, str] | str:
    """Caption and address of a line, or the reason why it has none."""
    try:
        cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
    except UnicodeDecodeError:
        return "bad encoding"
    if len(cells) != 2:
        return "wrong number of columns"
    caption, url = " ".join(cells[0].split()), cells[1].strip()
    if not caption:
        return "no caption"
    if not _ADDRESS.match(url):
        return "no address"
    return caption, url
