"""The tab in which one talks: what is said, what can be done with it, and its settings."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import gradio as gr

from app.page.examples import Example
from app.page.guard import VISITOR_COOKIE
from app.page.visitor_talks import VisitorTalks
from app.serving.job import Failed, Job
from app.serving.knobs import Knobs
from app.serving.worker import BusyError, Worker
from app.transcript import Exchange, Piece, to_html, to_json, to_page
from corpora.pictures import PictureError, open_picture
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

_MAX_PICTURES = 8
_MAX_LETTERS = 20_000

Other = Literal["same", "retrieve", "generate"]
_READY: dict[str, Any] = {"stop_btn": False, "submit_btn": True}

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

    def as_it_was(self) -> Chat:
        """A copy that goes its own way; without an answer that is not finished."""
        unfinished = bool(self.exchanges and self.exchanges[-1].working)
        if unfinished and self.before is not None:
            return Chat(self.before.fork(), None, self.exchanges[:-1])
        before = None if self.before is None else self.before.fork()
        return Chat(self.conversation.fork(), before, list(self.exchanges))


def talk_tab(
    page: gr.Blocks,
    gill: Gill,
    worker: Worker,
    defaults: ReplySettings,
    examples: Sequence[Example],
    forget_after: float,
) -> None:
    """Build it inside `page`; a conversation is kept for `forget_after` seconds."""
    talks: VisitorTalks[Chat] = VisitorTalks(forget_after)
    chat = gr.State(None, time_to_live=forget_after, delete_callback=_abandon)
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
                autofocus=True,
                label="What you say",
                **_READY,
            )
            with gr.Row():
                other = gr.Button(
                    "The other one", size="sm", min_width=150, interactive=False, elem_id="other"
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

    def send(
        request: gr.Request, state: Chat | None, said: dict[str, Any], *values: Any
    ) -> Iterator[Any]:
        state = state or Chat(gill.conversation())
        try:
            exchange = Exchange(_read(said), knobs.settings(values))
        except (ValueError, PictureError) as error:
            gr.Warning(str(error))
            yield [state, gr.skip(), gr.skip(), gr.skip(), gr.skip()]
            return
        state.before = state.conversation.fork()
        state.exchanges.append(exchange)
        talks.keep(_visitor(request), state)
        yield [state, gr.skip(), gr.skip(), gr.skip(), gr.MultimodalTextbox(value=None)]
        yield from answer(state)

    def retry(which: Literal["other", "same"]) -> Any:
        def redo(state: Chat | None, *values: Any) -> Iterator[Any]:
            if state is None or state.before is None or not state.exchanges:
                yield [gr.skip()] * (len(outputs) + 1)
                return
            last = state.exchanges.pop()
            settings, only = last.settings, last.only
            seen = state.conversation.shown
            state.conversation = state.before.fork()
            if which == "same":
                settings = settings.model_copy(update={"seed": random.randrange(2**31)})
                state.conversation.shown = list(seen)
            elif (kind := _other_kind(last)) != "same":
                only = kind
                if settings.want in ("retrieve", "generate"):
                    settings = settings.model_copy(update={"want": kind})
            state.exchanges.append(Exchange(last.turn, settings, only=only))
            yield from answer(state)

        return redo

    def answer(state: Chat) -> Iterator[Any]:
        """What the page shows as the last exchange is answered; the box shows Stop meanwhile."""
        only = state.exchanges[-1].only
        if only == "retrieve":
            state.conversation.speaker = replace(gill, generator=None)
        elif only == "generate":
            state.conversation.speaker = replace(gill, index=None)
        try:
            stopped_by: Any = gr.MultimodalTextbox(stop_btn=True, submit_btn=False)
            for update in _answer(state, worker):
                yield [*update, stopped_by]
                stopped_by = gr.skip()
            yield [*_view(state, working=False), gr.MultimodalTextbox(**_READY)]
        finally:
            state.conversation.speaker = gill

    def restart(request: gr.Request, state: Chat | None) -> list[Any]:
        talks.forget(_visitor(request))
        _abandon(state)
        off = gr.Button(interactive=False)
        return [None, _HELLO, off, off, gr.MultimodalTextbox(**_READY)]

    def resume(request: gr.Request) -> list[Any]:
        talk = talks.of(_visitor(request))
        state = None if talk is None else talk.as_it_was()
        if state is None or not state.exchanges:
            return [gr.skip()] * len(outputs)
        return _view(state, working=False)

    def stop(state: Chat | None) -> None:
        if state is not None and state.job is not None:
            state.job.cancel()

    hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    one_at_a_time: dict[str, Any] = {"trigger_mode": "once", **hidden}
    sending = box.submit(send, [chat, box, *knobs.fields], [*outputs, box], **one_at_a_time)
    box.stop(stop, [chat], None, **hidden)
    flipping = other.click(retry("other"), [chat], [*outputs, box], **one_at_a_time)
    repeating = again.click(retry("same"), [chat], [*outputs, box], **one_at_a_time)
    running: list[Any] = [sending, flipping, repeating]
    fresh.click(restart, [chat], [*outputs, box], cancels=running, **hidden)
    page.load(resume, None, outputs, **hidden)
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
            pieces.append(Piece(picture=open_picture(str(path))))
        except PictureError as error:
            raise ValueError(f"{Path(str(path)).name}: {error.detail}") from error
    return [*pieces, Piece(text=text)] if text else pieces


def _exporter(render: Callable[[Sequence[Exchange]], str]) -> Callable[[Chat | None], str]:
    return lambda state: render(state.exchanges if state else [])


def _visitor(request: gr.Request) -> str:
    """Who the page's guard says that it is."""
    return str(request.cookies.get(VISITOR_COOKIE, ""))


def _abandon(state: Chat | None) -> None:
    if state is not None and state.job is not None:
        state.job.cancel()


_HELLO = """<div id="hello"><p><b>Text and pictures in, text and pictures out.</b> Type, or drop a
picture into the box below, or click on an example. Every picture of an answer says whether it was
retrieved or generated.</p></div>"""
