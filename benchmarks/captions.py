"""The check of a caption table, by picture headers: rows a second, and memory.

    python -m benchmarks.captions [--quick] [--rows N] [--json FILE]

1 000 000 rows (--quick: 100 000), as TSV: with a picture of its own for each row, as in CC3M, with
five rows to a picture, as in COCO, and checked once more, when the verdicts are known. Beside it a
bare loop that reads the same rows and opens the same headers with Pillow, in one thread. The memory
is that of this process; each of those that read headers for it takes some 90 MB more.
"""

from __future__ import annotations

import csv
import io
import tempfile
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.harness import Bench, Numbers, run
from corpora.captions import CaptionParams, check_captions


def measure(bench: Bench) -> None:
    usual = bench.size(2000, 100_000 if bench.quick else 1_000_000, 100_000)
    rows = bench.results["rows"] = bench.given.rows or usual
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _draw(folder, rows)
        for name, pictures in (("five rows to a picture", rows // 5), ("one row each", rows)):
            table = _write(folder, rows, pictures)
            bench.part(name, partial(_check, bench, table, rows))
            bench.part(f"{name}, again", partial(_check, bench, table, rows))
            bench.part(f"{name}, bare loop", partial(_loop, bench, table, rows))


def _check(bench: Bench, table: Path, rows: int) -> Numbers:
    params = CaptionParams(table=str(table), check="header")
    out = table.with_suffix(".parquet")
    seconds = 0.0

    def check() -> None:
        nonlocal seconds
        seconds = bench.once(lambda: check_captions(params, out))

    held, most = bench.memory(check)
    return {"rows_per_s": rows / seconds, "added_mb": max(most - held, 1) / 1e6}


def _loop(bench: Bench, table: Path, rows: int) -> Numbers:
    def loop() -> None:
        with table.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, delimiter="\t"):
                Image.open(table.parent / row["image"]).close()

    return {"rows_per_s": rows / bench.once(loop)}


def _draw(folder: Path, pictures: int) -> None:
    data = io.BytesIO()
    Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(data, "JPEG")
    for number in range(pictures):
        if number % 1000 == 0:
            (folder / f"{number // 1000:05d}").mkdir()
        (folder / _name(number)).write_bytes(data.getvalue())


def _write(folder: Path, rows: int, pictures: int) -> Path:
    table = folder / f"{pictures}.tsv"
    with table.open("w", encoding="utf-8") as file:
        file.write("caption\timage\n")
        for row in range(rows):
            name = _name(row * pictures // rows)
            file.write(f"a caption of the usual length about picture {row}\t{name}\n")
    return table


def _name(number: int) -> str:
    return f"{number // 1000:05d}/{number:09d}.jpg"


if __name__ == "__main__":
    run(measure, __doc__, wall=True, rows=int)
