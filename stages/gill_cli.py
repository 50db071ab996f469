"""The Typer app `gill`: use what was trained."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from PIL import Image

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
    help="Talk to a trained GILL: text and pictures in, text and pictures out.",
)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}

Artifacts = Annotated[Path, typer.Option(help="Where the trained model lies.", file_okay=False)]
ARTIFACTS = Path("artifacts")


class Want(StrEnum):
    """What kind of answer is asked for."""

    auto = "auto"
    text = "text"
    retrieve = "retrieve"
    generate = "generate"


@app.callback()
def callback() -> None:
    """Talk to a trained GILL: text and pictures in, text and pictures out."""


@app.command()
def ask(
    parts: Annotated[
        list[str], typer.Argument(help="Text and picture files, in the order they are read.")
    ],
    artifacts: Artifacts = ARTIFACTS,
    out: Annotated[Path, typer.Option(help="Folder for the pictures of the answer.")] = Path(
        "answer"
    ),
    want: Annotated[
        Want, typer.Option(help="Text only, a retrieved, a generated picture, or its choice.")
    ] = Want.auto,
    seed: Annotated[int, typer.Option(help="Of sampled text and generated pictures.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 12,
    guidance: Annotated[float, typer.Option(min=1, help="Guidance of a picture.")] = 2.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")] = False,
) -> None:
    """Ask once. An argument that ends like a picture file is read as one; anything else is text.

    Prints the text of the answer and writes its pictures to --out.
    """
    from app.gill import Gill
    from pipeline.conversation import ReplySettings
    from pipeline.decoding import DecodingSettings
    from pipeline.image_generator import GenerationSettings

    try:
        turn = [_part(text) for text in parts]
        settings = ReplySettings(
            want=want.value,
            seed=seed,
            decoding=DecodingSettings(max_tokens=max_tokens, temperature=temperature),
            generation=GenerationSettings(steps=steps, guidance=guidance),
        )
        answers = Gill.load(artifacts).reply(turn, settings)
    except Exception as failure:
        room = type(failure).__module__.split(".")[0]
        if room not in {"pipeline", "cache", "corpora", "app"} and not isinstance(
            failure, ValueError
        ):
            raise
        typer.secho(f"error: {failure}", fg="red", err=True)
        raise typer.Exit(1) from None
    described = _save(answers, out)
    if as_json:
        typer.echo(json.dumps(described, indent=1))
        return
    for one in described:
        typer.echo(one["text"] if one["kind"] == "text" else _line(one))


def _part(text: str) -> str | Image.Image:
    """A picture where the argument names one, else the text itself."""
    from corpora.pictures import open_picture

    return open_picture(text) if Path(text).suffix.lower() in PICTURES else text


def _save(answers: Sequence[Any], out: Path) -> list[dict[str, Any]]:
    """Write the pictures; describe every piece as plain data."""
    from pipeline.conversation import GeneratedImage, Text

    described: list[dict[str, Any]] = []
    for answer in answers:
        if isinstance(answer, Text):
            described.append({"kind": "text", "text": answer.text.strip()})
            continue
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{len(described):02d}.png"
        answer.picture.save(path)
        one: dict[str, Any] = {"path": str(path), "p_generate": answer.generate_probability}
        if isinstance(answer, GeneratedImage):
            one |= {"kind": "generated", "seed": answer.seed, "steps": answer.steps}
        else:
            one |= {"kind": "retrieved", "score": answer.score, "source": answer.source}
            one |= {"caption": answer.caption}
        described.append(one)
    return described


def _line(one: dict[str, Any]) -> str:
    if one["kind"] == "generated":
        return f"[generated picture: {one['path']}, seed {one['seed']}]"
    return f"[retrieved picture: {one['path']}, score {one['score']:.3f}, from {one['source']}]"


def main() -> None:
    """The console script."""
    sys.exit(app())
