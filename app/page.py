"""The web page: talk to a trained GILL, browse its cache, compare its pictures.

    launch("artifacts", listen("127.0.0.1", 7860))

Nothing is sent or fetched anywhere: no analytics, fonts of the reader's own machine, all scripts
from the installed gradio package. Every visitor has a conversation of their own; one model answers
them all, those who ask at one time together.
"""

from __future__ import annotations

import os
import queue
import random
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from app.upload_folder import UPLOAD_FOLDER  # Before gradio, which reads what it sets.

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from fastapi import FastAPI

from app.job import Failed, Job
from app.knobs import Knobs
from app.listening import address_of, run
from app.page_annotation import AnnotationRoutes, annotation_tab
from app.page_cache import cache_tab
from app.page_examples import Example, examples_of
from app.page_guard import PageGuard
from app.page_jobs import Jobs
from app.same_origin import LOOPBACK, SameOrigin, names_of
from app.transcript import Exchange, Piece, style, to_html, to_json, to_page
from app.uploads import Uploads
from app.worker import BusyError, Worker
from corpora.pictures import PictureError, open_picture
from gill.artifacts import Artifacts
from gill.loading import Gill
from pipeline.talking.answers import (
    Ended,
    Event,
    PictureProgress,
    ReplySettings,
    RetrievedImage,
    Started,
    Text,
)
from pipeline.talking.conversation import Conversation

_MAX_PIXELS = 50_000_000
_MAX_PICTURES = 8
_MAX_LETTERS = 20_000
_FORGET_AFTER = 3600
_CLEAN_EVERY = 600

Other = Literal["same", "retrieve", "generate"]

_CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
#said { min-height: 300px; max-height: 62vh; overflow-y: auto !important; padding: 4px 6px; }
.row-facts { display: flex; flex-wrap: wrap; gap: 16px; align-items: flex-start; overflow-x: auto; }
.row-facts img { width: 160px; border-radius: 8px; image-rendering: pixelated; }
.row-facts table { border-collapse: collapse; font-size: 14px; table-layout: fixed;
  flex: 1 1 280px; width: 100%; max-width: 800px; min-width: 0; }
.row-facts th { text-align: left; font-weight: 600; padding: 3px 14px 3px 0; vertical-align: top;
  width: 11em; overflow-wrap: anywhere; }
.row-facts td { padding: 3px 0; overflow-wrap: anywhere; }
.row-facts :is(table, tr, th, td) { border: 0 !important; background: none !important; }
.row-facts tr { border-bottom: 1px solid var(--border-color-primary) !important; }
#cache-tiles .caption-label { left: 0; right: 0; bottom: 0; max-width: none; white-space: normal;
  text-align: left; font-size: 12px; line-height: 1.3; border-radius: 0; }
#hello { color: var(--body-text-color-subdued); }
footer { display: none !important; }
@media (max-width: 600px) {
  .row-facts th { width: 7em; }
  #cache-tiles .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  #cache-tiles .caption-label { white-space: nowrap; }
  #said { max-height: none; overflow-y: visible !important; min-height: 120px; }
  .gradio-container { padding: 8px !important; }
}
"""
_FOLLOW = """
() => { const box = document.querySelector('#said'); if (box) box.scrollTop = box.scrollHeight; }
"""
_SAVE = """
(text) => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/%s'}));
  link.download = 'conversation.%s';
  link.click();
  URL.revokeObjectURL(link.href);
}
"""


@dataclass(eq=False)
class Chat:
    """One visitor's conversation. `before` is as it was ahead of the last turn."""

    conversation: Conversation
    before: Conversation | None = None
    exchanges: list[Exchange] = field(default_factory=list)
    job: Job | None = None


def launch(artifacts: str | Path, listening: socket.socket, host: str = "127.0.0.1") -> None:
    """Load the model and serve the page until interrupted. Call it in the main thread.

    `host` is how `listening` was asked for: see `names_of`. Raises what `Gill.load` raises.
    """
    # Ended so, a process would not delete its folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    places = Artifacts(Path(artifacts))
    gill = Gill.load(places.root)
    if host not in LOOPBACK:
        print(f"anybody who reaches {host} can use this page: there is no password", flush=True)
    app = create_app(gill, places, hosts=names_of(host))
    print(f"open {address_of(listening)}", flush=True)
    run(app, listening)


def create_app(
    gill: Gill,
    artifacts: Artifacts,
    *,
    hosts: Sequence[str] = LOOPBACK,
    settings: ReplySettings | None = None,
) -> AnnotationRoutes:
    """The page as an ASGI application.

    It answers the requests of its own pages alone (`SameOrigin`, `PageGuard`), under the names
    `hosts`. `settings` are what the knobs start from.
    """
    worker = Worker(max_waiting=16)
    if settings is None:
        generation = gill.generation.model_copy(update={"preview_every": 3})
        settings = ReplySettings(generation=generation)
    annotation = AnnotationRoutes(artifacts, gill, worker, hosts)
    blocks = build_page(gill, artifacts, worker, annotation, settings)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    theme = gr.themes.Base(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        theme=theme,
        css=style() + _CSS,
        max_file_size="20mb",
        footer_links=[],
        enable_monitoring=False,
        ssr_mode=False,
    )
    # Gradio's own check of what a job may name waits for this. It knows no visitors and lets
    # addresses pass: PageGuard does not lean on it.
    blocks.has_launched = True
    uploads = Uploads(UPLOAD_FOLDER, _FORGET_AFTER + _CLEAN_EVERY)
    annotation.page = SameOrigin(PageGuard(app, Jobs(blocks), uploads), hosts)
    return annotation


def build_page(
    gill: Gill,
    artifacts: Artifacts,
    worker: Worker,
    annotation: AnnotationRoutes,
    settings: ReplySettings,
) -> gr.Blocks:
    """The three tabs."""
    cleaning = (_CLEAN_EVERY, _FORGET_AFTER)
    with gr.Blocks(title="GILL", analytics_enabled=False, delete_cache=cleaning) as blocks:
        with gr.Tab("Talk"):
            _talk_tab(gill, worker, settings, examples_of(artifacts, gill))
        with gr.Tab("Cache"):
            cache_tab(gill, artifacts)
        with gr.Tab("Annotate"):
            annotation_tab(annotation)
    blocks.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    return blocks


def _talk_tab(
    gill: Gill, worker: Worker, defaults: ReplySettings, examples: Sequence[Example]
) -> None:
    chat = gr.State(None, time_to_live=_FORGET_AFTER, delete_callback=_abandon)
    with gr.Row(equal_height=False):
        with gr.Column(scale=3, min_width=320):
            past = gr.HTML(_HELLO, elem_id="said")
            box = gr.MultimodalTextbox(
                placeholder="Say something; drop pictures here",
                file_types=["image"],
                file_count="multiple",
                sources=["upload"],
                show_label=False,
                elem_id="box",
                max_plain_text_length=_MAX_LETTERS,
                stop_btn=True,
                autofocus=True,
            )
            with gr.Row():
                other = gr.Button(
                    "The other one", size="sm", min_width=90, interactive=False, elem_id="other"
                )
                again = gr.Button(
                    "Again", size="sm", min_width=70, interactive=False, elem_id="again"
                )
                fresh = gr.Button("New conversation", size="sm", min_width=90, elem_id="fresh")
            gr.Examples(
                [[{"text": one.text, "files": list(one.pictures)}] for one in examples],
                inputs=[box],
                label="Examples: click one, then send it, best in a new conversation",
                cache_examples=False,
                examples_per_page=8,
            )
        with gr.Column(scale=1, min_width=260):
            with gr.Accordion("Settings", open=True, elem_id="settings"):
                knobs = Knobs(defaults)
            with gr.Row():
                as_html = gr.Button("Save as HTML", size="sm", min_width=90, elem_id="save-html")
                as_json = gr.Button("Save as JSON", size="sm", min_width=90, elem_id="save-json")
            saved = gr.Textbox(visible="hidden", elem_id="saved")

    outputs = [chat, past, other, again]

    def send(state: Chat | None, said: dict[str, Any], *values: Any) -> Iterator[Any]:
        state = state or Chat(gill.conversation())
        try:
            exchange = Exchange(_read(said), knobs.settings(values))
        except (ValueError, PictureError) as error:
            gr.Warning(str(error))
            yield [state, gr.skip(), gr.skip(), gr.skip(), gr.skip()]
            return
        state.before = state.conversation.fork()
        state.exchanges.append(exchange)
        first = True
        for update in _answer(state, worker):
            yield [*update, gr.MultimodalTextbox(value=None) if first else gr.skip()]
            first = False

    def retry(which: Literal["other", "same"]) -> Any:
        def redo(state: Chat | None, *values: Any) -> Iterator[Any]:
            if state is None or state.before is None or not state.exchanges:
                yield [gr.skip()] * len(outputs)
                return
            last = state.exchanges.pop()
            wanted: Other = "same" if which == "same" else _other_kind(last)
            settings = last.settings
            seen = state.conversation.shown
            state.conversation = state.before.fork()
            speaker = gill
            if wanted == "retrieve":
                speaker = replace(speaker, generator=None)
            elif wanted == "generate":
                speaker = replace(speaker, index=None)
            if wanted == "same":
                settings = settings.model_copy(update={"seed": random.randrange(2**31)})
                state.conversation.shown = list(seen)
            elif settings.want in ("retrieve", "generate"):
                settings = settings.model_copy(update={"want": wanted})
            state.exchanges.append(Exchange(last.turn, settings))
            state.conversation.speaker = speaker
            try:
                yield from _answer(state, worker)
            finally:
                state.conversation.speaker = gill

        return redo

    def restart(state: Chat | None) -> list[Any]:
        _abandon(state)
        return [None, _HELLO, gr.Button(interactive=False), gr.Button(interactive=False)]

    def stop(state: Chat | None) -> None:
        if state is not None and state.job is not None:
            state.job.cancel()

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    one_at_a_time: dict[str, Any] = {"trigger_mode": "once", **hidden}
    sending = box.submit(send, [chat, box, *knobs.fields], [*outputs, box], **one_at_a_time)
    box.stop(stop, [chat], None, **hidden)
    flipping = other.click(retry("other"), [chat], outputs, **one_at_a_time)
    repeating = again.click(retry("same"), [chat], outputs, **one_at_a_time)
    fresh.click(restart, [chat], outputs, cancels=[sending, flipping, repeating], **hidden)
    past.change(None, None, None, js=_FOLLOW, api_visibility="private")
    for button, render, kind in ((as_html, to_page, "html"), (as_json, to_json, "json")):
        button.click(_exporter(render), [chat], saved, **hidden).then(
            None, [saved], None, js=_SAVE % (kind, kind), api_visibility="private"
        )


def _answer(state: Chat, worker: Worker) -> Iterator[list[Any]]:
    """Answer the last exchange; yields the chat, its HTML and its two buttons."""
    exchange = state.exchanges[-1]
    events: queue.SimpleQueue[Event | Failed] = queue.SimpleQueue()
    parts = [one.picture if one.picture is not None else one.text for one in exchange.turn]
    job = Job(state.conversation, lambda: parts, exchange.settings, events.put)
    state.job = job
    try:
        try:
            worker.submit(job)
        except BusyError as error:
            exchange.problem = str(error)
            yield _view(state, working=False)
            return
        exchange.working = "waiting …"
        yield _view(state, working=True)
        while True:
            event = events.get()
            if isinstance(event, Failed):
                exchange.problem = event.reason
                break
            elif isinstance(event, Ended):
                break
            elif isinstance(event, Started):
                exchange.forgotten = event.forgotten_turns
                exchange.working = "thinking …"
            elif isinstance(event, PictureProgress):
                exchange.working = f"drawing … {event.step} of {event.steps}"
                if event.preview is not None:
                    exchange.preview = Piece(picture=event.preview)
            else:
                exchange.working = "" if isinstance(event, Text) else "thinking …"
                exchange.preview = None
                exchange.add(event)
            if events.empty():
                yield _view(state, working=True)
        exchange.working = ""
        yield _view(state, working=False)
    finally:
        job.cancel()
        exchange.working = ""


def _view(state: Chat, *, working: bool) -> list[Any]:
    last = state.exchanges[-1]
    other = _other_kind(last)
    label = {
        "retrieve": "Retrieve instead",
        "generate": "Generate instead",
        "same": "The other one",
    }
    return [
        state,
        to_html(state.exchanges),
        gr.Button(label[other], interactive=not working and other != "same"),
        gr.Button(interactive=not working),
    ]


def _other_kind(exchange: Exchange) -> Other:
    """What the last picture of an answer is not."""
    pictures = [one.answer for one in exchange.answer if one.picture is not None]
    if not pictures:
        return "same"
    return "generate" if isinstance(pictures[-1], RetrievedImage) else "retrieve"


def _read(said: dict[str, Any]) -> list[Piece]:
    """The box's pictures, then its text."""
    text, files = (said.get("text") or "").strip(), said.get("files") or []
    if not text and not files:
        raise ValueError("say something or show a picture")
    if len(text) > _MAX_LETTERS:
        raise ValueError(f"{len(text)} characters, at most {_MAX_LETTERS}")
    if len(files) > _MAX_PICTURES:
        raise ValueError(f"{len(files)} pictures, at most {_MAX_PICTURES} at once")
    pieces = []
    for path in files:
        try:
            pieces.append(Piece(picture=open_picture(str(path), max_pixels=_MAX_PIXELS)))
        except PictureError as error:
            raise ValueError(f"{Path(str(path)).name}: {error.detail}") from error
    return [*pieces, Piece(text=text)] if text else pieces


def _exporter(render: Callable[[Sequence[Exchange]], str]) -> Callable[[Chat | None], str]:
    return lambda state: render(state.exchanges if state else [])


def _abandon(state: Chat | None) -> None:
    if state is not None and state.job is not None:
        state.job.cancel()


_HELLO = """<div id="hello"><p><b>Text and pictures in, text and pictures out.</b> Type, or drop a
picture into the box below, or click on an example. Every picture of an answer says whether it was
retrieved or generated.</p></div>"""
