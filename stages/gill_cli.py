"""The Typer app `gill`: use what was trained."""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gill_errors import GillError, InputError
from stages.command_line import CommandLine, run_as_process
from stages.hub import pull, push

if TYPE_CHECKING:
    from PIL import Image

    from app.talk import Talk
    from app.terminal.screen import Screen
    from gill.loading import Gill
    from pipeline.talking.answers import Event

app = CommandLine(help="Talk to a trained GILL: text and pictures in, text and pictures out.")


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
Out = Annotated[
    Path, typer.Option(help="Below it every answer, or talk, gets a new folder for its pictures.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
WantOption = Annotated[
    Want, typer.Option(help="Text only, a retrieved, a generated picture, or its choice.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of sampled text and generated pictures.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Longest answer; a picture counts as one.")]
MostTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer; default: 32, of a chat model 256.")
]
System = Annotated[
    str | None, typer.Option(help="To a chat model, before the turns; default: the run's params.")
]
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


class ReadBack(StrEnum):
    """What is read in place of a picture as an answer goes on."""

    nothing = "nothing"
    picture = "picture"
    image_tokens = "image_tokens"
    image_tokens_and_picture = "image_tokens_and_picture"


class Places(StrEnum):
    """Where the pictures of a story stand."""

    model = "model"
    even = "even"


ReadBackOption = Annotated[
    ReadBack | None,
    typer.Option(help="What is read in place of an own picture; default: the run's params."),
]
Negative = Annotated[str, typer.Option(help="What generated pictures are guided away from.")]

ARTIFACTS, OUT = Path("artifacts"), Path("answer")


@app.callback()
def callback() -> None:
    """Talk to a trained GILL: text and pictures in, text and pictures out."""


def _knobs(
    want: WantOption = Want.auto,
    seed: Seed = 0,
    max_tokens: MostTokens = None,
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
    read_back: ReadBackOption = None,
) -> dict[str, Any]:
    """The options that shape an answer, as `Gill.settings` takes them."""
    return {n: v.value if isinstance(v, StrEnum) else v for n, v in locals().items()}


def _with_knobs(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `_knobs` besides its own."""

    def run(**given: Any) -> None:
        knobs = _knobs(**{name: given.pop(name) for name in shared})
        command(**given, **knobs)

    shared = inspect.signature(_knobs, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)
    options = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options += shared.values()
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = own.replace(parameters=options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


@app.command()
@_with_knobs
def ask(
    parts: Parts,
    artifacts: Artifacts = ARTIFACTS,
    out: Out = OUT,
    as_json: AsJson = False,
    system: System = None,
    **knobs: Any,
) -> None:
    """Ask once. An argument that names a picture file is read as one; anything else is text.

    Prints the text of the answer, shows its pictures where the terminal can, and writes them to a
    new folder below --out.
    """
    screen = _open_screen(as_json)
    turn = [_part(text) for text in parts]
    from app.terminal.answer_files import AnswerFolder

    folder = AnswerFolder(out)
    gill = _load(artifacts)
    from app.terminal.narrator import Narrator

    narrator = Narrator(folder, screen, quiet=as_json)
    settings = gill.settings(**knobs)
    conversation = gill.conversation(system_prompt=system)
    described = narrator.tell(conversation.stream(turn, settings))
    if as_json:
        typer.echo(json.dumps(described, indent=1))


@app.command()
@_with_knobs
def chat(
    artifacts: Artifacts = ARTIFACTS,
    out: Out = OUT,
    as_json: AsJson = False,
    system: System = None,
    **knobs: Any,
) -> None:
    """Talk, line by line. Words that name picture files are read as pictures.

    /help lists what else can be said: asking again or otherwise, saving, starting anew. quit, exit
    and Ctrl-D end; Ctrl-C breaks an answer off. Pictures are shown where the terminal can, and
    written to a new folder below --out. With --json one JSON object per answer is printed.
    """
    screen = _open_screen(as_json)
    from app.terminal.answer_files import AnswerFolder

    folder = AnswerFolder(out)
    gill = _load(artifacts)
    from app.talk import Talk
    from app.terminal.narrator import Narrator

    talk = Talk(gill, knobs, system)
    if not as_json:
        typer.echo("Say something; words like photo.png are read as pictures. /help, quit.")
    for line in _lines(prompt="" if as_json else "> "):
        narrator = Narrator(folder, screen, quiet=as_json)
        try:
            events = _events(talk, line)
            if events is None:
                continue
            described = narrator.tell(events)
        except GillError as failure:
            typer.secho(f"error: {failure}", fg="red", err=True)
            continue
        except KeyboardInterrupt:
            typer.secho("\n(broken off: as if it had not been asked)", dim=True, err=True)
            continue
        forgotten = narrator.reply.forgotten_turns
        if as_json:
            typer.echo(json.dumps({"answer": described, "forgotten_turns": forgotten}))
        elif forgotten:
            typer.secho(f"(forgot the oldest {forgotten} turns)", dim=True)


@app.command()
def tell(
    story: Annotated[list[str], typer.Argument(help="Text, files of text, or - for the input.")],
    pictures: Annotated[int, typer.Option(min=1, max=64, help="Most pictures.")] = 4,
    sentences: Annotated[
        int | None,
        typer.Option(
            "--continue",
            min=0,
            max=64,
            help="Sentences that the model adds, which get the pictures; default: 4 to a text of "
            "one sentence, none to a longer one.",
        ),
    ] = None,
    places: Annotated[
        Places, typer.Option(help="Pictures where the model says [IMG1], or evenly spread.")
    ] = Places.model,
    out: Annotated[
        Path | None, typer.Option(help="The page; default: the first free story.html, story-2.html")
    ] = None,
    title: Annotated[str, typer.Option(help="Of the page.")] = "A story",
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
    want: WantOption = Want.auto,
    seed: Seed = 0,
    temperature: Temperature = 0.0,
    candidates: Candidates = 1,
    steps: Steps = None,
    guidance: Guidance = None,
    scheduler: SchedulerOption = None,
    negative_prompt: Negative = "",
    read_back: ReadBackOption = None,
) -> None:
    """Tell a story with pictures: writes an illustrated page (HTML) that needs nothing else.

    A text of several sentences is a whole story: each is read, and pictures come behind those after
    which the model says [IMG1], evenly spread ones where there are more of them than --pictures.
    With --places even they are spread over all sentences, whatever the model says. A text of one
    sentence is a beginning: the model goes on, with pictures where it says [IMG1]. --continue says
    otherwise for both.

    The same text, model, options and --seed give the same page; picture n has the seed --seed + n.
    """
    from app.story import choose_page, describe, read_story, write_story_page

    text, path = read_story(story), choose_page(out)
    gill = _load(artifacts)
    from pipeline.talking.answers import PictureProgress, Reply, Text
    from pipeline.talking.sentences import sentences_of
    from pipeline.talking.telling import TellingSettings, tell

    if sentences is None:
        sentences = 4 if sum(map(len, sentences_of(text))) == 1 else 0
    telling = TellingSettings(pictures=pictures, places=places.value, added_sentences=sentences)
    settings = gill.settings(
        want=want.value,
        seed=seed,
        temperature=temperature,
        candidates=candidates,
        steps=steps,
        guidance=guidance,
        scheduler=None if scheduler is None else scheduler.value,
        negative_prompt=negative_prompt,
        read_back=None if read_back is None else read_back.value,
    )
    told = Reply()
    for event in tell(gill, text, telling, settings):
        told.add(event)
        if isinstance(event, Text) and not as_json:
            typer.echo(event.text, nl=False)
        elif isinstance(event, PictureProgress):
            continue
        elif told.images and told[-1] is event and not as_json:
            typer.echo(f" [picture {len(told.images)}]", nl=False)
    write_story_page(path, told, title)
    if as_json:
        typer.echo(json.dumps({"page": str(path), "story": describe(told)}, indent=1))
        return
    typer.echo(f"\n\n{len(told.images)} pictures: {path}")
    if not told.images:
        typer.echo("(the model says [IMG1] behind none of its sentences: see --places)", err=True)


@app.command()
def retrieve(
    parts: Parts,
    artifacts: Artifacts = ARTIFACTS,
    n: Annotated[int, typer.Option("-n", min=1, help="How many pictures.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Find the candidate pictures that suit text and pictures best; prints score, path, caption."""
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
    config: Annotated[
        Path | None, typer.Option(help="YAML with any setting of the service; options go before.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the model, in requests.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests at one time.")] = None,
    max_waiting: Annotated[int | None, typer.Option(help="Requests in line.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Requests answered together.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds for a request.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    max_pictures: Annotated[int | None, typer.Option(help="Pictures in a request.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A host whose pictures are fetched; repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="A web page that may call (CORS); repeatable.")
    ] = None,
) -> None:
    """Serve the model over HTTP in the shapes of OpenAI's chat completions, responses and images.

    app/serving/settings.py has all settings of --config, with their meanings and defaults.
    """
    from app.listening import listen
    from app.serving.settings import read_settings

    settings = read_settings(
        config,
        model=name,
        max_requests=max_requests,
        max_waiting=max_waiting,
        max_batch=max_batch,
        timeout_s=timeout,
        limits_max_tokens=max_tokens,
        limits_max_pictures=max_pictures,
        remote_allowed_hosts=tuple(allow_host) if allow_host else None,
        allowed_origins=tuple(allow_origin) if allow_origin else None,
    )
    with listen(host, port, guarded=bool(api_key)) as listening:
        from app.serving.service import serve as run

        run(artifacts, listening, api_key=api_key, settings=settings)


@app.command(name="app")
def page(
    artifacts: Artifacts = ARTIFACTS,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 7860,
) -> None:
    """Open the page in the browser: talk, look into the cache, annotate."""
    from app.listening import listen

    with listen(host, port) as listening:
        from app.page.page import launch

        launch(artifacts, listening, host)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def annotate(context: typer.Context) -> None:
    """Serve the annotation page over a folder of picture pairs, or export its votes (--help)."""
    from app.annotate import main as run

    sys.argv = ["gill annotate", *context.args]
    run()


app.command()(push)
app.command()(pull)


def _load(artifacts: Path) -> Gill:
    from app.terminal.screen import told_if_long

    with told_if_long("loading the model"):
        from gill.loading import Gill
        from pipeline.devices import quieten_libraries

        quieten_libraries()
        return Gill.load(artifacts)


def _open_screen(as_json: bool) -> Screen:
    from app.terminal.screen import open_screen

    screen = open_screen()
    if screen.blank and not as_json:
        typer.secho(f"(pictures are written, not shown: {screen.blank})", dim=True, err=True)
    return screen


def _part(text: str) -> str | Image.Image:
    """The picture in the file that the argument names, whatever it is called, else the text.

    One word that is called like a picture, or written like a path, names a file: where there is
    none, or no picture in it, that is an error.
    """
    from corpora.pictures import PICTURE_SUFFIXES, PictureError, open_picture

    called_so = Path(text).suffix[1:].lower() in PICTURE_SUFFIXES
    path_like = text.startswith(("/", "./", "../", "~/"))
    names_a_file = (called_so or path_like) and len(text.split()) == 1
    if not names_a_file and not os.path.isfile(text):
        return text
    try:
        return open_picture(os.path.expanduser(text) if path_like else text)
    except PictureError:
        if names_a_file:
            raise
        return text


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


_HELP = """\
WORDS photo.png WORDS    say something; words that name picture files are pictures
/generate [WORDS]        answer with a generated picture; without words: the last turn again
/retrieve [WORDS]        answer with a retrieved picture; without words: the last turn again
/text [WORDS]            answer with words alone; without words: the last turn again
/auto [WORDS]            let the model choose; without words: the last turn again
/again                   the last turn again, with another seed
/save FILE               write all that was said, as a page (.html) or for programs (.json)
/new                     forget everything
/help                    this
quit, exit, Ctrl-D       end"""


def _events(talk: Talk, line: str) -> Iterable[Event] | None:
    """The answer to a typed line; None where a command was done that has none.

    Raises InputError for a command that does not exist or cannot be done.
    """
    if not line.startswith("/"):
        return talk.ask(_turn(line))
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    command = name[1:]
    if command in list(Want):
        return talk.ask(_turn(rest), want=command) if rest else talk.again(want=command)
    if command == "again" and not rest:
        return talk.again()
    if command == "save" and rest:
        talk.save(Path(rest))
        typer.echo(f"written to {rest}", err=True)
    elif command == "new" and not rest:
        talk.restart()
    elif command == "help":
        typer.echo(_HELP, err=True)
    else:
        raise InputError(f"{line}: no such command; /help lists them")
    return None


def _lines(prompt: str) -> Iterator[str]:
    """What a person types, or a script sends, until `quit`, `exit` or the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            if prompt:
                typer.echo()
            return
        if line in ("quit", "exit"):
            return
        if line:
            yield line.replace("\\n", "\n")


_ANSWER_ONCE = ("ask", "caption", "retrieve")


def main() -> None:
    """The console script."""
    if set(sys.argv[1:2]) & set(_ANSWER_ONCE):
        gc.disable()  # what they make goes with them
    run_as_process(app)
