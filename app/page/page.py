"""The web page: talk to a trained GILL, browse its cache, compare its pictures.

    launch("artifacts", listen("127.0.0.1", 7860))

Nothing is sent or fetched anywhere: no analytics, fonts of the reader's own machine, all scripts
from the installed gradio package. Every visitor has a conversation of their own; one model answers
them all, those who ask at one time together.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from app.page.upload_folder import UPLOAD_FOLDER  # Before gradio, which reads what it sets.

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from fastapi import FastAPI

from app.listening import address_of, run
from app.page.annotation_tab import AnnotationRoutes, annotation_tab
from app.page.cache_tab import NAME_BY_CAPTION, cache_tab
from app.page.examples import examples_of
from app.page.guard import PageGuard
from app.page.jobs import Jobs
from app.page.talk_tab import talk_tab
from app.page.uploads import Uploads
from app.same_origin import LOOPBACK, SameOrigin, names_of
from app.serving.worker import Worker
from app.transcript import style
from gill.artifacts import Artifacts
from gill.loading import Gill
from pipeline.talking.answers import ReplySettings

_FORGET_AFTER = 3600
_CLEAN_EVERY = 600

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
#title h1 { font-size: 20px; font-weight: 650; margin: 0; }
.gradio-container { --body-text-color-subdued: #52525b; --block-info-text-color: #52525b;
  --input-placeholder-color: #62626c; --primary-500: #4f46e5; --trim-region-color: #4f46e5; }
.dark .gradio-container, .gradio-container.dark { --body-text-color-subdued: #b4b4bd;
  --block-info-text-color: #b4b4bd; --input-placeholder-color: #a5a6b0; --primary-500: #a5a2f8;
  --trim-region-color: #a5a2f8; }
.gradio-container button[role=tab].selected { color: #4338ca !important; }
.dark .gradio-container button[role=tab].selected { color: #b6b4fb !important; }
#said { width: 100%; }
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
        settings = gill.settings(preview_every=3)
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
        gr.HTML("<h1>GILL</h1>", elem_id="title")
        blocks.load(None, None, None, js=NAME_BY_CAPTION, api_visibility="private")
        with gr.Tab("Talk"):
            examples = examples_of(artifacts, gill)
            talk_tab(blocks, gill, worker, settings, examples, _FORGET_AFTER)
        with gr.Tab("Cache"):
            cache_tab(gill, artifacts)
        with gr.Tab("Annotate"):
            annotation_tab(annotation)
    blocks.queue(max_size=64, default_concurrency_limit=16, api_open=False)
    return blocks
