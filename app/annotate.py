"""The annotation page: which of two pictures suits a prompt better, and which is more realistic.

    python -m app.annotate FOLDER                    serve the page on http://127.0.0.1:8765
    python -m app.annotate FOLDER --export OUT       write OUT/relevant.tsv and OUT/realistic.tsv

FOLDER holds `pairs.json` and the pictures (see `app.annotations`). The page needs no internet and
no login: an annotator types a name. It listens on this machine alone unless --host says otherwise;
anybody who reaches it can answer under any name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.types import ASGIApp

from app.annotations import (
    QUESTIONS,
    AnnotationError,
    Annotations,
    Choice,
    Question,
    Side,
)
from app.encoded_pictures import as_png
from app.listening import address_of, listen, run
from app.same_origin import LOOPBACK, SameOrigin, names_of
from corpora.parti_prompts import (
    agreed_label,
    fleiss_kappa,
    percent_agreement,
    write_votes,
)
from corpora.pictures import PictureError, open_picture
from gill_errors import InputError

_LARGEST_SIDE = 1024


class Answer(BaseModel):
    """One answer as the page sends it."""

    model_config = ConfigDict(extra="forbid")

    annotator: str
    pair: int
    question: Question
    choice: Choice


def create_app(annotations: Annotations, hosts: Sequence[str] = LOOPBACK) -> ASGIApp:
    """The page and its few addresses, over one study, for its own requests alone (`SameOrigin`)."""
    app = FastAPI(title="Annotate", docs_url=None, redoc_url=None, openapi_url=None)
    page = files("app").joinpath("templates/annotate.html").read_text(encoding="utf-8")

    @app.exception_handler(AnnotationError)
    def refuse(_: Request, error: AnnotationError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        return page

    @app.get("/progress")
    def progress(annotator: str) -> dict[str, int]:
        state = annotations.progress(annotator)
        return {"done": state.done, "total": state.total, "resume": state.resume}

    @app.get("/pairs/{pair}")
    def show(pair: int, annotator: str) -> dict[str, Any]:
        answers = annotations.answers(annotator, pair)
        return {"prompt": annotations.pairs[pair].prompt, "answers": answers}

    @app.get("/pairs/{pair}/{side}")
    def picture(pair: int, side: Side, annotator: str) -> Response:
        # Always a PNG of the pixels alone: name, format and metadata would tell the sides apart.
        try:
            shown = open_picture(str(annotations.picture(annotator, pair, side)))
        except PictureError as error:
            raise HTTPException(500, f"the picture cannot be shown: {error.detail}") from error
        shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        return Response(as_png(shown), media_type="image/png")

    @app.put("/answers")
    def answer(given: Answer) -> dict[str, int]:
        annotations.record(given.annotator, given.pair, given.question, given.choice)
        return progress(given.annotator)

    return SameOrigin(app, hosts)


def export(annotations: Annotations, folder: Path) -> str:
    """Write the votes on both questions and describe them: labels and agreement."""
    folder.mkdir(parents=True, exist_ok=True)
    names = annotations.annotators()
    lines = [f"{len(names)} annotators: {', '.join(names) or 'none yet'}"]
    for name in names:
        lines.append(
            f"  {name}: {annotations.progress(name).done} of {len(annotations.pairs)} pairs"
        )
    for question in QUESTIONS:
        rows = annotations.export(question)
        write_votes(folder / f"{question}.tsv", rows)
        votes = [row.votes for row in rows]
        labels = [agreed_label(vote) for vote in votes]
        counts = ", ".join(f"{labels.count(label)} {label}" for label in ("gen", "ret", "same"))
        line = f"{question}: {len(rows)} pairs with votes; agreed labels: {counts}"
        if any(len(vote) >= 2 for vote in votes):
            line += (
                f"; agreement {100 * percent_agreement(votes):.1f} %, "
                f"Fleiss' kappa {fleiss_kappa(votes):.3f}"
            )
        lines.append(line)
    return "\n".join(lines)


def main() -> None:
    """The command `gill annotate`."""
    parser = argparse.ArgumentParser(
        prog="python -m app.annotate", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("folder", type=Path, help="holds pairs.json and the pictures")
    parser.add_argument("--export", type=Path, metavar="OUT", help="write the votes and stop")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8765)
    given = parser.parse_args()
    try:
        annotations = Annotations(given.folder)
    except AnnotationError as error:
        sys.exit(str(error))
    if given.export is not None:
        print(export(annotations, given.export))
        return
    try:
        listening = listen(given.host, given.port)
    except InputError as error:
        sys.exit(str(error))
    with listening:
        print(f"{len(annotations.pairs)} pairs; open {address_of(listening)}", flush=True)
        run(create_app(annotations, names_of(given.host)), listening)


if __name__ == "__main__":
    main()
