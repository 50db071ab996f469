"""Command make-pairs: a retrieved and a generated picture per prompt, for people to compare.

As in section 3.3 and appendix F: for each prompt the best candidate and a generated picture. Made
in blocks; a run that is killed goes on with the prompts that have no pictures yet.
"""

from __future__ import annotations

import json
from pathlib import Path

from app.annotations import PAIRS
from corpora.parti_prompts import PartiPrompt, read_prompts
from corpora.pictures import open_picture
from gill.artifacts import ARTIFACTS
from gill.loading import Gill
from gill_errors import StageError
from gill_files import written_whole
from gill_progress import Ticker
from pipeline.devices import set_up
from pipeline.frozen.provenance import png_chunks
from pipeline.talking.generation import generate_pictures
from pipeline.talking.reading import read_contexts
from settings.params import Params

_BLOCK = 32


def run(params: Params, prompts: Path, folder: Path) -> None:
    """Write the pictures and pairs.json to `folder`. Raises StageError without an index."""
    device = set_up(params.run.device, params.run.threads)
    gill = Gill.load(ARTIFACTS.root, device=str(device), checkpoint=params.training.checkpoint)
    if gill.index is None:
        raise StageError(f"{ARTIFACTS.index} is missing: run `stages build-index`")
    rows = read_prompts(prompts)
    folder.mkdir(parents=True, exist_ok=True)
    with Ticker("pairs", unit="prompts") as ticker:
        for start in range(0, len(rows), _BLOCK):
            _make_block(gill, rows, range(start, min(start + _BLOCK, len(rows))), folder, params)
            ticker.count(min(start + _BLOCK, len(rows)), len(rows))
    pairs = [
        {
            "prompt": row.prompt,
            "category": row.category,
            "challenge": row.challenge,
            "note": row.note,
            "retrieved": f"{number:05d}_retrieved.png",
            "generated": f"{number:05d}_generated.png",
        }
        for number, row in enumerate(rows)
    ]
    (folder / PAIRS).write_text(json.dumps(pairs, indent=1) + "\n", encoding="utf-8")
    print(f"{len(pairs)} pairs; compare them with: gill annotate {folder}")


def _make_block(
    gill: Gill, rows: list[PartiPrompt], span: range, folder: Path, params: Params
) -> None:
    """The pictures of some prompts, unless they are all there."""
    names = [f"{number:05d}_{kind}.png" for number in span for kind in ("retrieved", "generated")]
    if all((folder / name).is_file() for name in names):
        return
    assert gill.index is not None
    assert gill.generator is not None
    hidden = read_contexts(gill.model, gill.encoder, [[rows[i].prompt] for i in span])
    generated = generate_pictures(
        gill.generator,
        gill.model.conditioning(hidden),
        gill.empty_prompt,
        params.generation_settings,
        params.decision.seed + span.start,
    )
    hits = gill.index.search(gill.model.text_query(hidden).float().cpu(), 1)
    for number, picture, found in zip(span, generated, hits, strict=True):
        if found[0].image is None:
            raise StageError("the index knows no pictures: build it with a candidate table")
        both = {"retrieved": open_picture(found[0].image), "generated": picture}
        for kind, shown in both.items():  # a run that goes on trusts what is there
            with written_whole(folder / f"{number:05d}_{kind}.png") as part:
                shown.save(part, "PNG", pnginfo=png_chunks(shown))
