"""The Typer app `gill`: use what was trained."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gill_errors import GillError

if TYPE_CHECKING:
    from PIL import Image

    from gill.loading import Gill
    from pipeline.talking.answers import Reply, ReplySettings
    from pipeline.talking.conversation import Conversation

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
    help="Talk to a trained GILL: text and pictures in, text and pictures out.",
)

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}


class Want(StrEnum):
    """What kind of answer is asked for."""

    auto = "auto"
    text = "text"
    retrieve = "retrieve"
    generate = "generate"


class Scheduler(StrEnum):
    """How the generator's noise is taken away."""

    pipeline = "pipeline"
    ddim = "ddim"
    dpm_solver = "dpm-solver"
    euler = "euler"


Parts = Annotated[
    list[str], typer.Argument(help="Text and picture files, in the order they are read.")
]
Artifacts = Annotated[Path, typer.Option(help="Where the trained model lies.", file_okay=False)]
Out = Annotated[Path, typer.Option(help="Folder for the pictures of the answers.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
WantOption = Annotated[
    Want, typer.Option(help="Text only, a retrieved, a generated picture, or its choice.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of sampled text and generated pictures.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer; a picture counts as one.")]
MaxImages = Annotated[int, typer.Option(min=0, help="Most pictures in one answer.")]
MinTokens = Annotated[int, typer.Option(min=0, help="Text tokens before a picture is allowed.")]
ImageBias = Annotated[
    float, typer.Option(help="Added to the logit of [IMG1]: above 0 more pictures, below fewer.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopP = Annotated[float, typer.Option(min=1e-6, max=1, help="Sample among this probability.")]
TopK = Annotated[int | None, typer.Option(min=1, help="Sample among the k likeliest tokens.")]
Penalty = Annotated[float, typer.Option(min=1, help="Above 1: less repetition of words.")]
Candidates = Annotated[
    int, typer.Option(min=1, max=64, help="Generate so many, show what fits the query best.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps; default: the run's params.")
]
Guidance = Annotated[
    float | None, typer.Option(min=1, help="Guidance scale; default: the run's params.")
]
SchedulerOption = Annotated[
    Scheduler | None, typer.Option(help="Noise scheduler; default: the run's params.")
]
Negative = Annotated[str, typer.Option(help="What generated pictures are guided away from.")]

ARTIFACTS, OUT = Path("artifacts"), Path("answer")


@app.callback()
def callback() -> None:
    """Talk to a trained GILL: text and pictures in, text and pictures out."""


@app.command()
def ask(
    parts: Parts,
    artifacts: Artifacts = ARTIFACTS,
    out: Out = OUT,
    want: WantOption = Want.auto,
    seed: Seed = 0,
    max_tokens: MaxTokens = 32,
    max_images: MaxImages = 1,
    min_tokens_before_image: MinTokens = 0,
    image_bias: ImageBias = 0.0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    repetition_penalty: Penalty = 1.0,
    candidates: Candidates = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: SchedulerOption = None,
    negative_prompt: Negative = "",
    as_json: AsJson = False,
) -> None:
    """Ask once. An argument that ends like a picture file is read as one; anything else is text.

    Prints the text of the answer and writes its pictures to --out.
    """
    knobs = _knobs(locals())
    with _one_line_errors():
        turn = [_part(text) for text in parts]
        reply = _load(artifacts).reply(turn, **knobs)
        described = _save(reply, out)
    if as_json:
        typer.echo(json.dumps(described, indent=1))
        return
    show = _shower()
    pictures = iter(reply.images)
    for one in described:
        typer.echo(one["text"] if one["kind"] == "text" else _line(one))
        if one["kind"] != "text":
            show(next(pictures).picture)


@app.command()
def chat(
    artifacts: Artifacts = ARTIFACTS,
    out: Out = OUT,
    want: WantOption = Want.auto,
    seed: Seed = 0,
    max_tokens: MaxTokens = 32,
    max_images: MaxImages = 1,
    min_tokens_before_image: MinTokens = 0,
    image_bias: ImageBias = 0.0,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = None,
    repetition_penalty: Penalty = 1.0,
    candidates: Candidates = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: SchedulerOption = None,
    negative_prompt: Negative = "",
    as_json: AsJson = False,
) -> None:
    """Talk, line by line. Words that end like picture files are read as pictures.

    /retrieve, /generate, /text and /auto before a line ask for that kind of answer; /new forgets
    everything; an empty line or end of input ends. Pictures are written to --out and shown where
    the terminal can. With --json one JSON object per answer is printed.
    """
    knobs = _knobs(locals())
    with _one_line_errors():
        gill = _load(artifacts)
        gill.settings(**knobs)
    conversation, number, show = gill.conversation(), 0, _shower()
    if not as_json:
        typer.echo("Say something; words like photo.png are read as pictures. Empty line: end.")
    for line in _lines(prompt="" if as_json else "> "):
        command, _, rest = line.partition(" ")
        if command == "/new":
            conversation = gill.conversation()
            continue
        this = dict(knobs)
        if command.startswith("/") and command[1:] in list(Want):
            this["want"], line = command[1:], rest
        try:
            turn = _turn(line)
            reply = _speak(conversation, turn, gill.settings(**this), quiet=as_json)
            described = _save(reply, out, number)
        except Exception as failure:
            if not isinstance(failure, GillError):
                raise
            typer.secho(f"error: {failure}", fg="red", err=True)
            continue
        number += len(described)
        if as_json:
            typer.echo(json.dumps({"answer": described, "forgotten_turns": reply.forgotten_turns}))
            continue
        if reply.forgotten_turns:
            typer.secho(f"(forgot the oldest {reply.forgotten_turns} turns)", dim=True)
        pictures = [one for one in described if one["kind"] != "text"]
        for one, answer in zip(pictures, reply.images):
            typer.echo(_line(one))
            show(answer.picture)


@app.command()
def retrieve(
    parts: Parts,
    artifacts: Artifacts = ARTIFACTS,
    n: Annotated[int, typer.Option("-n", min=1, help="How many pictures.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Find the candidate pictures that suit text and pictures best; prints score, path, caption."""
    with _one_line_errors():
        hits = _load(artifacts).retrieve([_part(text) for text in parts], n)
    if as_json:
        found = [
            {"row": h.row, "score": h.score, "source": h.image, "caption": h.caption} for h in hits
        ]
        typer.echo(json.dumps(found, indent=1))
        return
    for hit in hits:
        typer.echo(f"{hit.score:.3f}  {hit.image or f'row {hit.row}'}  {hit.caption or ''}")


@app.command()
def caption(
    pictures: Annotated[list[str], typer.Argument(help="Picture files.")],
    artifacts: Artifacts = ARTIFACTS,
    max_tokens: MaxTokens = 32,
    as_json: AsJson = False,
) -> None:
    """Say what is on pictures, as the evaluation measures it (Table 7); one line each."""
    from corpora.pictures import open_picture

    with _one_line_errors():
        opened = [open_picture(name) for name in pictures]
        captions = _load(artifacts).caption(opened, max_tokens)
    if as_json:
        found = [{"path": name, "caption": text} for name, text in zip(pictures, captions)]
        typer.echo(json.dumps(found, indent=1))
        return
    for name, text in zip(pictures, captions):
        typer.echo(text if len(pictures) == 1 else f"{name}: {text}")


Host = Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")]


@app.command()
def serve(
    artifacts: Artifacts = ARTIFACTS,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="GILL_API_KEY", help="Needed on any other --host.")
    ] = None,
) -> None:
    """Serve the model over HTTP in the shape of OpenAI's chat completions."""
    with _one_line_errors(ValueError):
        from app.service import serve as run

        run(artifacts, host=host, port=port, api_key=api_key)


@app.command(name="app")
def page(
    artifacts: Artifacts = ARTIFACTS,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 7860,
) -> None:
    """Open the page in the browser: talk, look into the cache, annotate."""
    with _one_line_errors():
        from app.page import launch

        launch(artifacts, host=host, port=port)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def annotate(context: typer.Context) -> None:
    """Serve the annotation page over a folder of picture pairs, or export its votes (--help)."""
    from app.annotate import main as run

    sys.argv = ["gill annotate", *context.args]
    run()


def _knobs(given: dict[str, Any]) -> dict[str, Any]:
    """The options that shape an answer, of all that a command was given."""
    knobs = {n: v for n, v in given.items() if n not in ("parts", "artifacts", "out", "as_json")}
    return {n: v.value if isinstance(v, StrEnum) else v for n, v in knobs.items()}


def _load(artifacts: Path) -> Gill:
    from gill.loading import Gill
    from pipeline.devices import quieten_libraries

    quieten_libraries()
    return Gill.load(artifacts)


@contextlib.contextmanager
def _one_line_errors(*others: type[Exception]) -> Iterator[None]:
    """What a person can mend is one line and exit code 1, not a traceback."""
    try:
        yield
    except Exception as failure:
        if not isinstance(failure, (GillError, *others)):
            raise
        typer.secho(f"error: {failure}", fg="red", err=True)
        raise typer.Exit(1) from None


def _part(text: str) -> str | Image.Image:
    """A picture where the argument names one, else the text itself."""
    from corpora.pictures import open_picture

    return open_picture(text) if Path(text).suffix.lower() in PICTURES else text


def _turn(line: str) -> list[str | Image.Image]:
    """A typed line, with the words that name picture files read as pictures."""
    parts: list[str | Image.Image] = []
    words: list[str] = []
    for word in line.split(" "):
        read = _part(word)
        if isinstance(read, str):
            words.append(word)
            continue
        if words:
            parts.append(" ".join(words))
        parts.append(read)
        words = []
    return [*parts, " ".join(words)] if words else parts


def _lines(prompt: str) -> Iterator[str]:
    """Lines that a person types, or a script sends, until the first empty one."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not line:
            return
        yield line.replace("\\n", "\n")


def _speak(
    conversation: Conversation,
    turn: Sequence[str | Image.Image],
    settings: ReplySettings,
    *,
    quiet: bool,
) -> Reply:
    """Answer a turn, showing words and progress as they come."""
    from pipeline.talking.answers import PictureProgress, Reply, Text

    reply = Reply()
    for event in conversation.stream(turn, settings):
        reply.add(event)
        if quiet:
            continue
        if isinstance(event, Text):
            typer.echo(event.text if reply.text != event.text else event.text.lstrip(), nl=False)
        elif isinstance(event, PictureProgress) and sys.stderr.isatty():
            end = "\r\x1b[K" if event.step == event.steps else ""
            typer.echo(f"\rpicture: step {event.step} of {event.steps}{end}", nl=False, err=True)
    if not quiet and reply.text:
        typer.echo()
    return reply


def _shower() -> Callable[[Image.Image], None]:
    """Draws a picture in the terminal, or does nothing where that is not possible."""
    from app.terminal import detect_graphics, picture_escape

    graphics = detect_graphics(os.environ) if sys.stdout.isatty() else None

    def show(picture: Image.Image) -> None:
        if graphics is not None:
            typer.echo(picture_escape(picture, graphics))

    return show


def _save(reply: Reply, out: Path, first: int = 0) -> list[dict[str, Any]]:
    """Write the pictures; describe every piece as plain data."""
    from pipeline.talking.answers import GeneratedImage, Text

    described: list[dict[str, Any]] = []
    for number, answer in enumerate(reply, first):
        if isinstance(answer, Text):
            described.append({"kind": "text", "text": answer.text.strip()})
            continue
        out.mkdir(parents=True, exist_ok=True)
        path = out / f"{number:02d}.png"
        answer.picture.save(path)
        one: dict[str, Any] = {"path": str(path), "p_generate": answer.generate_probability}
        if isinstance(answer, GeneratedImage):
            names = ("seed", "steps", "guidance", "scheduler", "negative_prompt", "score")
            one |= {"kind": "generated"} | {name: getattr(answer, name) for name in names}
        else:
            one |= {"kind": "retrieved", "score": answer.score, "source": answer.source}
            one |= {"caption": answer.caption}
        described.append(one)
    return described


def _line(one: dict[str, Any]) -> str:
    if one["kind"] == "generated":
        how = f"seed {one['seed']}, {one['steps']} steps, guidance {one['guidance']:g}"
        return f"[generated picture: {one['path']}, {how}]"
    return f"[retrieved picture: {one['path']}, score {one['score']:.3f}, from {one['source']}]"


def main() -> None:
    """The console script."""
    sys.exit(app())
