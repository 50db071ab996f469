"""The page's third tab: compare a retrieved with a generated picture, as people did for Table 6.

The study lies in the folder `study` beside the artifacts, where `stages make-pairs` puts it. Where
there is none, a button draws a small one from the prompts at hand.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.types import ASGIApp, Receive, Scope, Send

from app.annotate import create_app, export
from app.annotations import PAIRS, Annotations
from app.serving.job import Failed, Job
from app.serving.worker import Worker
from corpora.caption_table import CaptionTable
from corpora.parti_prompts import PartiPrompt, read_prompts
from gill.artifacts import Artifacts
from gill.loading import Gill
from pipeline.frozen.provenance import png_chunks
from pipeline.talking.answers import Ended, Event, ReplySettings, Want
from pipeline.talking.decoding import DecodingSettings

_PATHS = ("/answers", "/progress", "/pairs/")
"""What the annotation page asks for, beside itself."""


class AnnotationRoutes:
    """An ASGI application: the annotation page at /annotate and its addresses, else `page`."""

    page: ASGIApp

    def __init__(
        self,
        artifacts: Artifacts,
        gill: Gill,
        worker: Worker,
        hosts: Sequence[str],
    ) -> None:
        self.folder = artifacts.root.parent / "study"
        self.artifacts, self.gill, self.worker, self.hosts = artifacts, gill, worker, hosts
        self.annotations: Annotations | None = None
        self._app: ASGIApp | None = None
        if (self.folder / PAIRS).is_file():
            self.open()

    def open(self) -> None:
        """Open the study; AnnotationError when it is unusable."""
        self.annotations = Annotations(self.folder)
        self._app = create_app(self.annotations, self.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer below /annotate where there is a study; hand everything else on (ASGI)."""
        path = scope.get("path", "")
        if self._app is not None and scope["type"] == "http":
            if path == "/annotate":
                await self._app({**scope, "path": "/", "raw_path": b"/"}, receive, send)
                return
            if path.startswith(_PATHS):
                await self._app(scope, receive, send)
                return
        await self.page(scope, receive, send)


def annotation_tab(routes: AnnotationRoutes) -> None:
    """The embedded page, or the button that draws a study."""
    gr.Markdown(
        "Two pictures for one prompt, one retrieved and one generated, in random order: which is "
        "more relevant, which more realistic? The answers teach the model when to retrieve "
        "(`decision.votes` in `params.yaml`)."
    )
    frame = gr.HTML(_frame() if routes.annotations else "", elem_id="annotate")
    with gr.Row(visible=routes.annotations is None) as making:
        number = gr.Number(20, minimum=1, maximum=500, precision=0, label="number of prompts")
        draw = gr.Button("Draw a study", elem_id="draw-study")
    state = gr.Markdown("" if routes.annotations else "There is no study yet.")
    votes = gr.Button(
        "Write the votes", visible=routes.annotations is not None, size="sm", elem_id="votes"
    )

    def make(wanted: float, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008 - gradio's way
        try:
            write_study(routes, int(wanted), lambda done, total: progress((done, total)))
            routes.open()
        except (ValueError, RuntimeError) as error:
            return gr.skip(), gr.skip(), str(error), gr.skip()
        return _frame(), gr.Row(visible=False), "", gr.Button(visible=True)

    def write() -> str:
        assert routes.annotations is not None
        summary = export(routes.annotations, routes.folder / "votes")
        return f"```\n{summary}\n```\nwritten to `{routes.folder / 'votes'}`"

    draw.click(
        make, [number], [frame, making, state, votes], api_visibility="private", concurrency_limit=1
    )
    votes.click(write, None, state, api_visibility="private")


def write_study(routes: AnnotationRoutes, number: int, report: Callable[[int, int], None]) -> None:
    """Draw both pictures for `number` prompts and write the study.

    ValueError where there is no index, no generator or no prompt, or where a picture is refused.
    """
    gill = routes.gill
    if gill.index is None or gill.generator is None:
        raise ValueError("a study needs both a candidate index and an image generator")
    prompts = _prompts(routes.artifacts, number)
    if not prompts:
        raise ValueError(f"no prompts: neither prompts.tsv nor {routes.artifacts.captions}")
    pairs = []
    routes.folder.mkdir(parents=True, exist_ok=True)
    for place, prompt in enumerate(prompts):
        names = {}
        for side, want in (("retrieved", "retrieve"), ("generated", "generate")):
            names[side] = f"{place:04d}_{side}.png"
            _draw(routes, prompt.prompt, want, routes.folder / names[side])  # type: ignore[arg-type]
        about = {"category": prompt.category, "challenge": prompt.challenge, "note": prompt.note}
        pairs.append({"prompt": prompt.prompt, **about, **names})
        report(place + 1, len(prompts))
    # Last, and whole: with it the study exists.
    partial = routes.folder / f".{PAIRS}.partial"
    partial.write_text(json.dumps(pairs, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(routes.folder / PAIRS)


def _draw(routes: AnnotationRoutes, prompt: str, want: Want, path: Path) -> None:
    """Have the worker answer the prompt with a picture, and save it."""
    ended = threading.Event()
    events: list[Event | Failed] = []

    def listen(event: Event | Failed) -> None:
        events.append(event)
        if isinstance(event, Ended | Failed):
            ended.set()

    settings = ReplySettings(want=want, decoding=DecodingSettings(max_tokens=1))
    routes.worker.submit(Job(routes.gill.conversation(), lambda: [prompt], settings, listen))
    ended.wait()
    if isinstance(last := events[-1], Failed):
        raise ValueError(f"{prompt!r}: {last.reason}")
    pictures = [one.picture for one in events if hasattr(one, "picture")]
    pictures[0].save(path, pnginfo=png_chunks(pictures[0]))


def _prompts(artifacts: Artifacts, number: int) -> list[PartiPrompt]:
    """Prompts that the model was not trained on, in a fixed random order, each once."""
    written = artifacts.miniature / "prompts.tsv"
    if written.is_file():
        found = list(read_prompts(written))
    elif artifacts.captions.is_file():
        table = CaptionTable(artifacts.captions)
        held_out = [*table.rows_of_split("test"), *table.rows_of_split("val")][:100_000]
        texts = dict.fromkeys(text for text in table.captions(held_out) if "\t" not in text)
        found = [PartiPrompt(text, "", "", "") for text in texts]
    else:
        return []
    random.Random(0).shuffle(found)
    return found[:number]


def _frame() -> str:
    return (
        '<iframe src="/annotate" title="annotation" style="width:100%;height:78vh;border:0">'
        '</iframe><p><a href="/annotate" target="_blank">open it in a window of its own</a></p>'
    )
